"""Rebuilding the journal, when it is new but the folders show that there was one.

A snapshot that was put back is carried on in the same way: the spool has gone on without it. Runs
once at start, before anything else, and ends by writing that the journal is whole; a crash on
the way makes the next start begin again. What follows from what is found is decided in
``comfyd.core.rebuild``.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from comfyd import sdnotify
from comfyd.comfyui.client import Client
from comfyd.config import Config
from comfyd.core import rebuild as core
from comfyd.core.model import JobId, Row, ServerName, State
from comfyd.core.rebuild import Found, Lying, Result, Seen
from comfyd.core.retention import Kept, Place, minted_s
from comfyd.core.wire import QueueItem
from comfyd.errors import ServerError, ServerRefused
from comfyd.journal.schema import WHOLE
from comfyd.journal.store import Batch, Change, Event, Insert, Keep, Raise, Remember, Update
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.services.link import client_of
from comfyd.spool.delivery import MANIFESTS
from comfyd.spool.intake import Intake
from comfyd.spool.layout import Spool, is_job_id, job_of

RESULTS: Final = 1000  # newest results read back for `jobs` and `show`; the others stay folders
BATCH: Final = 256  # jobs in one commit
PAGE: Final = 16  # history records in one answer: each may be as large as the largest graph
MANIFEST_MAX_BYTES: Final = 64 << 20
# A server is asked until it answers, but not for longer than lost_grace and this many more of it.
PATIENCE: Final = 2

_log: Any = structlog.get_logger("comfyd.rebuild")


@dataclass(slots=True)
class _Folders:
    """What lies in the spool, by job. Names only: some hundred bytes a job."""

    claimed: dict[JobId, str] = field(default_factory=dict)  # its file's name
    stages: set[JobId] = field(default_factory=set)  # complete or not
    staged: dict[JobId, Path] = field(default_factory=dict)  # its manifest
    published: dict[JobId, Path] = field(default_factory=dict)

    def jobs(self) -> list[JobId]:
        """Whose rows are made: all with something left to do, and the newest that are over."""
        due = self.claimed.keys() | self.staged.keys()
        over = (job for job in self.published if job not in due)
        return sorted([*due, *heapq.nlargest(RESULTS, over, core.arrival)], key=core.arrival)

    def lying(self, job: JobId) -> Lying:
        """What lies of *job*. Blocking: reads its manifest, if there is one."""
        published, staged = self.published.get(job), self.staged.get(job)
        return Lying(
            claimed=job in self.claimed,
            stage=job in self.stages,
            published=None if published is None else _read(published),
            staged=None if staged is None else _read(staged),
        )

    def unpublished(self) -> set[JobId]:
        return {job for job in self.claimed if job not in self.published}


@dataclass(slots=True)
class _Answers:
    """What the servers said: the attempts they hold, and who could not be asked."""

    found: dict[JobId, dict[tuple[ServerName, int], Found]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    silent: list[ServerName] = field(default_factory=list)

    def of(self, job: JobId) -> list[Found]:
        return list(self.found[job].values()) if job in self.found else []


async def rebuild(config: Config, spool: Spool, clock: Clock, journal: Journal) -> None:
    """Make the journal whole, if it does not say that it is.

    With claimed files that have no result it takes ``audit.lost_grace``, for a prompt may still be
    on its way; three times that if a server does not answer.

    Raises:
      JournalError, DiskFull: From the journal.
      OSError: A folder of the spool cannot be read.

    Cancellation: anywhere; the next start begins again.

    """
    if WHOLE in await journal.remembered():
        return
    folders = await trio.to_thread.run_sync(_list, spool)
    jobs = folders.jobs()
    known = sum(jobs for state, jobs in (await journal.counts()).items() if not state.final)
    if jobs or known:
        unpublished = await journal.without_rows(folders.unpublished())
        _log.error(
            "journal_rebuilding",
            problem="the journal may not know of the jobs in the spool: it was lost, or put back",
            claimed=len(folders.claimed),
            results=len(folders.published),
        )
        answers = _Answers()
        if unpublished or known:
            grace_s = config.audit.lost_grace_s
            _tell("Rebuilding the journal: asking the servers.", (1 + PATIENCE) * grace_s)
            answers = await _ask_all(config, folders.claimed.keys())
        carried_on = await _carry_on(clock, journal, folders, answers)
        counts = await _write(config, spool, clock, journal, folders, answers)
        await _keep(journal, folders)
        _log.warning(
            "journal_rebuilt", silent_servers=answers.silent, carried_on=carried_on, **counts
        )
    await journal.commit(Batch(changes=(Remember(name=WHOLE, value=True),)))


def _tell(status: str, needs_s: float) -> None:
    """Tell systemd what is going on, and ask for that much time and a minute more."""
    micros = int((needs_s + 60) * 1e6)
    sdnotify.notify(STATUS=status, EXTEND_TIMEOUT_USEC=str(micros))


# --- folders -------------------------------------------------------------------------------------


def _list(spool: Spool) -> _Folders:
    folders = _Folders()
    for name in os.listdir(spool.claimed):
        if is_job_id(job_of(name)):
            folders.claimed[job_of(name)] = name
    # done/ after failed/: where both have the job, its result is what counts.
    for place in (spool.failed, spool.done):
        for name in os.listdir(place):
            if is_job_id(name):
                folders.published[JobId(name)] = place / name / MANIFESTS[place.name]
    for name in os.listdir(spool.stage):
        if is_job_id(name) and name not in folders.published:
            folders.stages.add(JobId(name))
            for manifest in MANIFESTS.values():
                if (spool.stage / name / manifest).is_file():
                    folders.staged[JobId(name)] = spool.stage / name / manifest
    return folders


def _read(path: Path) -> Result:
    """The manifest at *path*; an empty one if it is gone by now, or no file."""
    data = b""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with open(fd, "rb", closefd=False) as file:
                    data = file.read(MANIFEST_MAX_BYTES)
        finally:
            os.close(fd)
    done = path.name == MANIFESTS["done"]
    return Result(done=done, manifest=data, sha256=hashlib.sha256(data).hexdigest())


# --- servers -------------------------------------------------------------------------------------


async def _ask_all(config: Config, jobs: Collection[JobId]) -> _Answers:
    answers = _Answers()
    grace_s = config.audit.lost_grace_s

    async def ask(name: ServerName, client: Client) -> None:
        try:
            if not await _ask(name, client, jobs, answers, grace_s=grace_s):
                answers.silent.append(name)
        finally:
            with trio.move_on_after(1, shield=True):
                await client.aclose()

    async with trio.open_nursery() as nursery:
        for server in config.servers:
            nursery.start_soon(ask, ServerName(server.name), client_of(server, config))
    return answers


async def _ask(
    name: ServerName,
    client: Client,
    jobs: Collection[JobId],
    answers: _Answers,
    *,
    grace_s: float,
) -> bool:
    """Look at one server until it is certain what it holds; False if that cannot be learnt.

    Certain is a look that began ``lost_grace`` after our start, when no POST of the daemon before
    us can arrive any more; or two refusals so far apart: then its memory is gone.
    """
    began_s = trio.current_time()
    refused_s: float | None = None
    while True:
        asked_s = trio.current_time()
        try:
            await _look(name, client, jobs, answers)
            refused_s = None
            if asked_s - began_s >= grace_s:
                return True
        except ServerRefused:
            refused_s = asked_s if refused_s is None else refused_s
            if asked_s - refused_s >= grace_s:
                return True
        except ServerError as error:
            refused_s = None
            _log.warning("rebuild_asks_again", server=name, problem=str(error))
        left_s = began_s + (1 + PATIENCE) * grace_s - trio.current_time()
        if left_s <= 0:
            return False
        await trio.sleep(min(left_s, grace_s))


async def _look(
    name: ServerName, client: Client, jobs: Collection[JobId], answers: _Answers
) -> None:
    """Add what the server holds now: its queue first, for prompts go from there to the history."""

    def add(items: Iterable[QueueItem], seen: Seen) -> None:
        for item in items:
            match core.ours(item.prompt_id, item.ours):
                case (job, attempt) if job in jobs:
                    answers.found[job][name, attempt] = Found(
                        job=job,
                        attempt=attempt,
                        server=name,
                        origin=client.endpoint.base_url,
                        seen=seen,
                        number=item.number,
                        client_id=item.client_id,
                    )

    queue = await client.queue()
    add(queue.pending, Seen.PENDING)
    add(queue.running, Seen.RUNNING)
    known: set[str] = set()
    for offset in count(0, PAGE):
        page = await client.recorded(offset, PAGE)
        new = [item for item in page if item.prompt_id not in known]
        if not new:  # the end, or a server that ignores the offset
            return
        known.update(item.prompt_id for item in new)
        add(new, Seen.FINISHED)


# --- rows ----------------------------------------------------------------------------------------


async def _carry_on(clock: Clock, journal: Journal, folders: _Folders, answers: _Answers) -> int:
    """Bring the rows that are there up to date; how many were changed."""
    changed = 0
    active = await journal.active()
    for at in range(0, len(active), BATCH):
        page = active[at : at + BATCH]
        changed += await _carry_on_page(clock, journal, folders, answers, page)
    for state in (State.QUEUED, State.HELD):
        after: int | None = None
        while page := await journal.rows(state, limit=BATCH, after=after):
            after = page[-1].seq
            changed += await _carry_on_page(clock, journal, folders, answers, page)
    return changed


async def _carry_on_page(
    clock: Clock, journal: Journal, folders: _Folders, answers: _Answers, page: tuple[Row, ...]
) -> int:
    now_s = clock.now_s()
    lying = await trio.to_thread.run_sync(lambda: [folders.lying(row.job) for row in page])
    changes: list[Change] = []
    events: list[Event] = []
    for row, there in zip(page, lying, strict=True):
        found = answers.of(row.job)
        new = core.carried_on(row, there, found, all_asked=not answers.silent, now_s=now_s)
        if new is not row:
            changes.append(Update(row=new, expected=row.version))
            told = {"state": new.state.value}
            events.append(Event(job=row.job, at=now_s, kind="rebuilt", data=told))
        changes += [Raise(fence=fence) for fence in core.fences_since(new, row, found)]
    await journal.commit(Batch(changes=tuple(changes), events=tuple(events)))
    return len(events)


async def _keep(journal: Journal, folders: _Folders) -> None:
    """Note the results of jobs without rows, for retention: their age is that of their ids."""
    jobs = list(folders.published)
    for at in range(0, len(jobs), BATCH):
        results = [
            Kept(
                job=job,
                place=Place(folders.published[job].parent.parent.name),
                at=minted_s(job) or 0.0,
            )
            for job in jobs[at : at + BATCH]
        ]
        await journal.commit(Batch(changes=tuple(Keep(kept=kept) for kept in results)))


async def _write(
    config: Config,
    spool: Spool,
    clock: Clock,
    journal: Journal,
    folders: _Folders,
    answers: _Answers,
) -> Mapping[str, int]:
    """Insert the rows, in the order in which the jobs arrived; how many there are of each state."""
    next_seq = count(await journal.last_seq() + 1).__next__
    intake = Intake(
        spool,
        settle_s=config.watch.settle_s,
        max_file_bytes=config.jobs.max_file_bytes,
        max_attempts=config.jobs.max_attempts,
        next_seq=next_seq,
        now_s=clock.now_s,
    )
    counts: Counter[str] = Counter()
    jobs = folders.jobs()
    for at in range(0, len(jobs), BATCH):
        batch = jobs[at : at + BATCH]
        _tell(f"Rebuilding the journal: {at} of {len(jobs)} jobs.", 0)
        missing = await journal.without_rows(batch)
        wanted = [job for job in batch if job in missing]
        rows = await trio.to_thread.run_sync(
            _rows, wanted, folders, answers, intake, next_seq, clock.now_s()
        )
        changes: list[Change] = []
        for row in rows:
            counts[row.state.value] += 1
            changes.append(Insert(row=row))
            changes += [Raise(fence=fence) for fence in core.fences(row, answers.of(row.job))]
        now_s = clock.now_s()
        events = tuple(
            Event(job=row.job, at=now_s, kind="rebuilt", data={"state": row.state.value})
            for row in rows
        )
        await journal.commit(Batch(changes=tuple(changes), events=events))
    return counts


def _rows(
    jobs: Iterable[JobId],
    folders: _Folders,
    answers: _Answers,
    intake: Intake,
    next_seq: Callable[[], int],
    now_s: float,
) -> list[Row]:
    """The row of each of *jobs* whose files are still there."""
    rows: list[Row] = []
    for job in jobs:
        claims = intake.adopt([folders.claimed[job]]).claims if job in folders.claimed else []
        row = claims[0].row if claims else Row(job=job, seq=next_seq(), claimed_at=now_s)
        if job in folders.published:
            rows.append(core.finished(row, _read(folders.published[job])))
        elif job in folders.staged and (ready := core.staged(row, _read(folders.staged[job]))):
            rows.append(ready)
        elif claims:
            all_asked = not answers.silent
            rows.append(core.taken_up(row, answers.of(job), all_asked=all_asked, now_s=now_s))
    return rows
