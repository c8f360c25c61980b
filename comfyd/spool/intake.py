"""Taking what is dropped in ``new/``: look, wait until it is settled, claim by rename, read, judge.

Blocking throughout. The rename into ``claimed/`` is the claim: nothing is read before it, nobody
but the daemon can reach the file after it, and a claim whose row never got committed is found by
``adopt``. That the content outlives a power cut is its producer's part, as ``layout.drop`` does it;
a file that lost some is found by its hash, and its job fails. What lies in ``new/`` is hostile: it
is never followed, opened or trusted beyond what lstat says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from msgspec.structs import replace

from comfyd.core.facts import Claimed
from comfyd.core.model import JobId, Outcome, Reason, Row, State, Timeouts
from comfyd.errors import DiskFull, JobFileError
from comfyd.spool import bundle, jobfile
from comfyd.spool.claimedfile import Claim, opened_bundle, read_claim
from comfyd.spool.layout import (
    ULID_BYTES,
    Spool,
    extension_of,
    full_disk_told,
    ignored,
    is_job_id,
    job_id_for,
    job_of,
    new_ulid,
    open_dir,
)
from comfyd.spool.library import pin, read_workflow, wrap

BATCH: Final = 256  # claims between two pairs of folder fsyncs, and in one message
WINDOW: Final = 4096  # entries one look considers, the oldest first: memory stays bounded

# This entry cannot be moved, whatever we do: not ours, immutable, or a mount point.
_UNMOVABLE: Final = {errno.EPERM, errno.EACCES, errno.EBUSY, errno.EXDEV}

_log = structlog.get_logger("comfyd.spool")


class Entry(NamedTuple):
    """Something in ``new/`` as lstat saw it; equal as long as it is unchanged, sorts by age.

    Of a folder, a look takes the newest ctime and the size of all that is in it.
    """

    ctime_ns: int
    name: str
    inode: int
    size_bytes: int
    mtime_ns: int
    folder: bool


class Look(NamedTuple):
    """What one look into ``new/`` found.

    Attributes:
      ready: To be claimed now, in this order.
      again_s: When the next look is worth it, in seconds; None if nothing there is waiting.

    """

    ready: list[Entry]
    again_s: float | None


class Taken(NamedTuple):
    """What became of some entries.

    Attributes:
      claims: In arrival order.
      pickup_s: From completion to claim, in seconds, one for each claim.
      unmovable: One sentence for each entry that has to stay, told once.

    """

    claims: list[Claimed]
    pickup_s: list[float]
    unmovable: list[str]


def seeds_of(job: JobId) -> Callable[[], int]:
    """What draws the seeds of *job*: the same ones again, should its row be lost."""
    return partial(random.Random(job).getrandbits, 53)


def _never(job: JobId) -> bool:
    return False


class Intake:
    """Claims files and bundles and makes their first rows; one thread at a time, but for ``adopt``.

    Args:
      settle_s: Without an event, an entry is taken once unchanged for so long.
      max_file_bytes: Nothing larger is read.
      max_attempts, queue_timeout_s: For jobs that do not say.
      workflows: The folder of named workflows, if there is one.
      next_seq: The next arrival number.
      draw: Makes, for one job, what draws its seeds: random integers of 50 bits or more.
      now_s: Seconds since the epoch, never going back (see ``comfyd.clock``).
      known: Whether the journal knows a job; asked only of names that carry a ULID.

    """

    def __init__(
        self,
        spool: Spool,
        *,
        settle_s: float,
        max_file_bytes: int,
        max_attempts: int,
        queue_timeout_s: float | None = None,
        workflows: Path | None = None,
        next_seq: Callable[[], int],
        now_s: Callable[[], float],
        draw: Callable[[JobId], Callable[[], int]] = seeds_of,
        known: Callable[[JobId], bool] = _never,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.spool = spool
        self.limit(
            settle_s=settle_s,
            max_file_bytes=max_file_bytes,
            max_attempts=max_attempts,
            queue_timeout_s=queue_timeout_s,
            workflows=workflows,
        )
        self._next_seq = next_seq
        self._draw = draw
        self._now_s = now_s
        self._known = known
        self._random_bytes = random_bytes
        self._since_s: dict[Entry, float] = {}  # first seen so; WINDOW at most
        # Told of, with their ctime: tried again when they change, forgotten when they are gone.
        self._unmovable: dict[tuple[str, int], int] = {}

    def limit(
        self,
        *,
        settle_s: float,
        max_file_bytes: int,
        max_attempts: int,
        queue_timeout_s: float | None,
        workflows: Path | None,
    ) -> None:
        """Set what holds for entries that are claimed from now on; from any thread."""
        self.settle_s = settle_s
        self._max_file_bytes = max_file_bytes
        self._max_attempts = max_attempts
        self._queue_timeout_s = queue_timeout_s
        self._workflows = workflows

    # --- looking ---------------------------------------------------------------------------------

    def scan(self) -> Look:
        """Look at everything in ``new/``; only what is settled by now is ready."""
        now_s = self._now_s()
        known: dict[tuple[str, int], int] = {}
        total = 0

        def movable() -> Iterator[Entry]:
            nonlocal total
            for entry in self._entries():
                total += 1
                key = (entry.name, entry.inode)
                if key in self._unmovable:
                    known[key] = self._unmovable[key]
                if not self._is_stuck(entry):
                    yield entry

        oldest = [self._whole(entry) for entry in heapq.nsmallest(WINDOW, movable())]
        self._unmovable = known
        self._since_s = {entry: self._since_s.get(entry, now_s) for entry in oldest}
        left_s = {
            entry: since_s + self.settle_s - now_s for entry, since_s in self._since_s.items()
        }
        ready = [entry for entry in oldest if left_s[entry] <= 0]
        again_s = min((left for left in left_s.values() if left > 0), default=None)
        if ready and total > WINDOW:
            again_s = 0.0
        return Look(ready, again_s)

    def named(self, names: Iterable[str]) -> list[Entry]:
        """The entries of *names* whose writer is known to be done, oldest first."""
        found = []
        fd = open_dir(self.spool.new)
        try:
            for name in names:
                if ignored(name):
                    continue
                try:
                    entry = _entry(name, os.stat(name, dir_fd=fd, follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if not self._is_stuck(entry):
                    found.append(entry)
        finally:
            os.close(fd)
        return sorted(found)

    def _is_stuck(self, entry: Entry) -> bool:
        """Whether it could not be moved, and nobody did anything about it since."""
        return entry.ctime_ns <= self._unmovable.get((entry.name, entry.inode), 0)

    def _entries(self) -> Iterator[Entry]:
        fd = open_dir(self.spool.new)
        try:
            with os.scandir(fd) as scan:
                for found in scan:
                    if ignored(found.name):
                        continue
                    try:
                        yield _entry(found.name, found.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        continue
        finally:
            os.close(fd)

    def _whole(self, entry: Entry) -> Entry:
        """*entry* as old as the youngest thing in it: a folder is filled after it is made."""
        if not entry.folder:
            return entry
        try:
            fd = open_dir(self.spool.new / entry.name)
        except OSError:  # gone, another thing by now, or not for us: a claim will tell
            return entry
        try:
            ctime_ns, size_bytes = bundle.newest(fd)
        finally:
            os.close(fd)
        return entry._replace(ctime_ns=ctime_ns, size_bytes=size_bytes)

    # --- claiming --------------------------------------------------------------------------------

    def claim(self, entries: Sequence[Entry]) -> Taken:
        """Claim *entries*, BATCH at most, in order; what is gone by now is skipped.

        Raises:
          DiskFull: Nothing was claimed.

        """
        moved: list[tuple[str, float]] = []
        unmovable: list[str] = []
        new_fd, claimed_fd = open_dir(self.spool.new), open_dir(self.spool.claimed)
        try:
            for entry in entries[:BATCH]:
                now_s = self._now_s()
                try:
                    with full_disk_told():
                        payload = self._move(entry, new_fd, claimed_fd, now_s)
                except FileNotFoundError:
                    continue
                except DiskFull:
                    if moved:
                        break  # the next call will find out again
                    raise
                except OSError as error:
                    if error.errno not in _UNMOVABLE:
                        raise
                    key = (entry.name, entry.inode)
                    if key not in self._unmovable:
                        what = f"{entry.name!r} in new/ cannot be moved: {error.strerror}"
                        remedy = "; let its group write it (chmod -R g+rwX)" if entry.folder else ""
                        unmovable.append(what + remedy)
                    self._unmovable[key] = entry.ctime_ns
                else:
                    moved.append((payload, max(0.0, now_s - entry.ctime_ns / 1e9)))
            if moved:
                os.fsync(claimed_fd)
                os.fsync(new_fd)
            claims, pickup_s = [], []
            full: DiskFull | None = None
            for payload, waited_s in moved:
                try:
                    row = self._row(claimed_fd, payload)
                except DiskFull as error:
                    full = error
                    _give_back(payload, claimed_fd, new_fd)
                    continue
                if row is not None:
                    claims.append(Claimed(row=row))
                    pickup_s.append(waited_s)
            if full is not None and not claims:
                raise full
        finally:
            os.close(new_fd)
            os.close(claimed_fd)
        return Taken(claims, pickup_s, unmovable)

    def adopt(self, names: Iterable[str]) -> Taken:
        """Make rows for what is in ``claimed/`` without one: the ids are in the names.

        Raises:
          DiskFull: Nothing came of it; try again when there is space.

        """
        claims, odd = [], []
        claimed_fd = open_dir(self.spool.claimed)
        try:
            for payload in names:
                if ignored(payload):
                    continue
                job = job_of(payload)
                if not is_job_id(job):
                    odd.append(f"{payload!r} in claimed/ is none of ours and is left alone")
                    continue
                # A try that found the disk full may have made it a bundle already.
                row = self._row(claimed_fd, payload) or self._row(claimed_fd, job)
                if row is not None:
                    claims.append(Claimed(row=row))
        finally:
            os.close(claimed_fd)
        return Taken(claims, [0.0] * len(claims), odd)

    def _move(self, entry: Entry, new_fd: int, claimed_fd: int, now_s: float) -> str:
        ulid = new_ulid(now_s, self._random_bytes(ULID_BYTES))
        if entry.folder:  # a dot in its name is part of the name
            payload: str = job_id_for(f"{entry.name}.folder", ulid, used=self._used)
        else:
            payload = job_id_for(entry.name, ulid, used=self._used) + extension_of(entry.name)
        os.rename(entry.name, payload, src_dir_fd=new_fd, dst_dir_fd=claimed_fd)
        return payload

    def _used(self, job: JobId) -> bool:
        spool = self.spool
        places: tuple[Path, ...] = (
            spool.claimed / job,
            spool.claimed / f"{job}.json",
            spool.claimed / f"{job}.yaml",
            spool.stage / job,
            spool.done / job,
            spool.failed / job,
        )
        return any(os.path.lexists(place) for place in places) or self._known(job)

    # --- reading ---------------------------------------------------------------------------------

    def _row(self, claimed_fd: int, payload: str) -> Row | None:
        """The first row of what was claimed; None if it is gone, by an operator's hand.

        Raises:
          DiskFull: There is no space for the workflow that it names.

        """
        sha256 = message = ""
        document = None
        try:
            claim = read_claim(claimed_fd, payload, max_bytes=self._max_file_bytes)
            sha256 = claim.sha256
            lent: dict[str, bytes] = {}
            document = self._judge(claim, claimed_fd, payload, lent)
            for name, data in lent.items():
                payload, sha256 = self._keep(claimed_fd, payload, claim, name, data)
        except FileNotFoundError:
            return None
        except JobFileError as error:
            document, message = None, error.message
        common = Row(
            job=job_of(payload),
            seq=self._next_seq(),
            payload=payload,
            sha256=sha256,
            max_attempts=self._max_attempts,
            claimed_at=self._now_s(),
        )
        if document is None:
            outcome = Outcome(state=State.FAILED, reason=Reason.INVALID_JOB, message=message)
            return replace(common, state=State.COLLECTING, outcome=outcome)
        queue_s = self._queue_timeout_s if document.queue_s is None else document.queue_s
        return replace(
            common,
            priority=document.priority,
            key=document.key,
            metadata=document.metadata,
            drawn=document.drawn,
            warnings=document.warnings,
            max_attempts=document.max_attempts or self._max_attempts,
            accept_partial=document.accept_partial,
            queue_s=queue_s,
            queue_by=None if queue_s is None else common.claimed_at + queue_s,
            timeouts=Timeouts(run_s=document.run_s, stall_s=document.stall_s),
        )

    def _judge(
        self, claim: Claim, claimed_fd: int, payload: str, lent: dict[str, bytes]
    ) -> jobfile.JobDocument:
        """The job in *claim*; a workflow it was lent by the folder of workflows is in *lent*."""

        def named(name: str) -> bytes:
            if claim.pieces is not None and name in claim.pieces:
                with opened_bundle(claimed_fd, payload) as fd:
                    return bundle.read_piece(fd, name, claim.pieces[name])
            if self._workflows is None:
                raise jobfile.not_found(name)
            lent[name] = read_workflow(self._workflows, name, max_bytes=self._max_file_bytes)
            return lent[name]

        try:
            return jobfile.load(
                claim.document,
                claim.name,
                draw=self._draw(job_of(payload)),
                beside=claim.beside,
                named=named,
            )
        except (JobFileError, OSError):
            raise
        except Exception as error:
            # Our own bug, but this file must not kill the daemon again at every start.
            _log.exception("job_file_not_judged", payload=payload)
            raise JobFileError(
                f"comfyd failed to read this file ({type(error).__name__}); please report it."
            ) from error

    def _keep(
        self, claimed_fd: int, payload: str, claim: Claim, name: str, data: bytes
    ) -> tuple[str, str]:
        """Copy a lent workflow beside the job, which then is a bundle: its payload and hash."""
        if claim.pieces is None:
            payload = wrap(claimed_fd, payload)
            document = "job.yaml" if jobfile.is_yaml(claim.name) else "job.json"
            sha256s = {document: claim.sha256}
        else:
            sha256s = {each: piece.sha256 for each, piece in claim.pieces.items()}
        pin(claimed_fd, payload, name, data)
        return payload, bundle.digest({**sha256s, name: hashlib.sha256(data).hexdigest()})


def _give_back(payload: str, claimed_fd: int, new_fd: int) -> None:
    """Back to ``new/``, under its job's name: it is taken again when there is space."""
    for name in (payload, job_of(payload)):  # which it has become if it was made a bundle
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, name, src_dir_fd=claimed_fd, dst_dir_fd=new_fd)


def _entry(name: str, found: os.stat_result) -> Entry:
    folder = stat.S_ISDIR(found.st_mode)
    return Entry(found.st_ctime_ns, name, found.st_ino, found.st_size, found.st_mtime_ns, folder)
