"""Where things lie in the spool, how they are named, and how they get there without being lost.

The spool is six folders on one file system; a job moves between them by rename alone. ``new/`` and
``tmp/`` belong to producers, everything else to the daemon only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from comfyd.core.model import JobId
from comfyd.errors import ConfigError, DiskFull

MODES: Final = {  # setgid: what is made inside belongs to the submit group; sticky: others' files
    "new": 0o3770,
    "tmp": 0o3770,
    "claimed": 0o700,
    "stage": 0o700,
    "done": 0o2750,
    "failed": 0o2750,
}
ULID_BYTES: Final = 10  # of randomness in one

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_IGNORED_ENDS = ("~", ".tmp", ".part", ".swp")
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_JOB_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,63}}\.{_ULID.pattern}")
_PROBES = 20  # nobody takes so many folders in a row, each within a moment
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = _FULL | {errno.EROFS}


@dataclass(frozen=True)
class Spool:
    """The folders of one spool. Making one touches nothing; see ``prepare``."""

    root: Path

    @property
    def new(self) -> Path:
        return self.root / "new"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def claimed(self) -> Path:
        return self.root / "claimed"

    @property
    def stage(self) -> Path:
        return self.root / "stage"

    @property
    def done(self) -> Path:
        return self.root / "done"

    @property
    def failed(self) -> Path:
        return self.root / "failed"

    def prepare(self) -> None:
        """Make what is missing, with the modes of MODES, and try the moves a job will make.

        Modes of folders that exist are kept, if nobody but the owner may write where only the
        daemon should.

        Raises:
          ConfigError: The spool cannot be used; says why and what to do.
          DiskFull: There is no space for an empty folder.

        """
        with full_disk_told():
            try:
                if not self.root.parent.is_dir():
                    raise _unusable(f"its parent {self.root.parent} is no folder; make it first")
                _make(self.root, 0o755)
                for name in MODES:
                    self.make(name)
                self.try_moves()
            except OSError as error:
                if error.errno in _FULL:
                    raise
                remedy = (
                    "all of it must lie on one file system" if error.errno == errno.EXDEV else ""
                )
                raise _unusable(": ".join(filter(None, [str(error), remedy]))) from error

    def make(self, name: str) -> None:
        """Make the folder *name* of MODES if it is missing, and check it if it is there."""
        path, mode = self.root / name, MODES[name]
        _make(path, mode)
        if not mode & stat.S_IWGRP:
            _check_private(path)

    def check_private(self) -> None:
        """See to it that nobody else may write where only the daemon should.

        Raises:
          ConfigError: Somebody may; says where and what to do.

        """
        _check_private(self.root)
        for name, mode in MODES.items():
            if not mode & stat.S_IWGRP:
                _check_private(self.root / name)

    def try_moves(self) -> None:
        """Take every way a job can take; done/ and failed/ backwards, so no consumer wakes up.

        Raises:
          ConfigError: Others may write where only the daemon should.
          OSError: One of them cannot be taken.

        """
        _check_private(self.root)
        for start in (self.new, self.claimed, self.done, self.failed):
            tries = 0
            while True:
                tries += 1
                try:
                    self._try_move(start)
                    break
                except FileNotFoundError:  # a consumer that takes whatever it sees was quicker
                    if tries >= _PROBES:
                        raise
        probe = _probe()
        waiting = self.tmp / probe
        os.close(os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            waiting = waiting.rename(self.new / probe)
        finally:
            waiting.unlink()

    def _try_move(self, start: Path) -> None:
        probe = _probe()
        here = start / probe
        here.mkdir(0o700)
        try:
            here = here.rename(self.stage / probe)
            share(here, start)
        finally:
            with contextlib.suppress(FileNotFoundError):
                here.rmdir()


def _probe() -> str:
    return f".probe-{os.urandom(6).hex()}"


def _unusable(problem: str) -> ConfigError:
    return ConfigError("spool", f"the spool cannot be used: {problem}")


def _make(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode)
    except FileExistsError:
        found = path.lstat().st_mode
        if not stat.S_ISDIR(found):
            what = "a symbolic link" if stat.S_ISLNK(found) else "no folder"
            raise _unusable(f"{path} is {what}; it must be a real folder") from None
        return
    path.chmod(mode)  # mkdir's mode goes through the umask and drops the setgid bit
    fsync_dir(path.parent)


def _check_private(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise _unusable(f"{path} may be written by others; run: chmod go-w {path}")


def share(path: Path, place: Path) -> None:
    """Give the folder *path* the group of *place*, and make what will be in it inherit that."""
    group = place.stat().st_gid
    if path.stat().st_gid != group:
        os.chown(path, -1, group)
    path.chmod(0o2700)


# --- names ---------------------------------------------------------------------------------------


def ignored(name: str) -> bool:
    """Whether a name in ``new/`` says that its writer is not done with it."""
    return name.startswith(".") or name.endswith(_IGNORED_ENDS)


def new_ulid(now_s: float, random_bytes: bytes) -> str:
    """A ULID: 48 bits of milliseconds since the epoch, 80 of randomness; sorts by time.

    Args:
      now_s: Seconds since the Unix epoch, UTC.
      random_bytes: ULID_BYTES of them.

    """
    number = (int(now_s * 1000) % 2**48) << 80 | int.from_bytes(random_bytes)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def safe(text: str, *, limit: int = 64) -> str:
    """*text* in ``[A-Za-z0-9_-]``, never empty and never like a command line option."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:limit].lstrip("-") or "job"


def job_id_for(name: str, ulid: str, *, used: Callable[[JobId], bool]) -> JobId:
    """The job id of a file called *name*: its stem made safe, and its own ULID or *ulid*.

    Args:
      used: Whether a job of that id exists; only asked of a name that carries a ULID.

    """
    base, dot, extension = name.rpartition(".")
    if not dot or _ULID.fullmatch(extension):
        base = name
    stem, _, own = base.rpartition(".")
    if not _ULID.fullmatch(own):
        stem, own = base, ""
    stem = safe(stem)
    if own:
        kept = JobId(f"{stem}.{own}")
        if not used(kept):
            return kept
    return JobId(f"{stem}.{ulid}")


def is_job_id(text: str) -> bool:
    """Whether *text* has the form of a job id, so that it is a safe file name too."""
    return _JOB_ID.fullmatch(text) is not None


def extension_of(name: str) -> str:
    """``.yaml`` if *name* says so; everything else is JSON."""
    return ".yaml" if name.lower().endswith((".yaml", ".yml")) else ".json"


def job_of(payload: str) -> JobId:
    """The job id of a name under ``claimed/``."""
    return JobId(payload.removesuffix(extension_of(payload)))


# --- durability ----------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk_told() -> Iterator[None]:
    """Turn ENOSPC, EDQUOT and EROFS into ``DiskFull``: a pause for the caller, not a crash."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            where = f"{error.filename}: " if error.filename else ""
            raise DiskFull(f"{where}{os.strerror(error.errno)}") from error
        raise


def free_bytes(found: os.statvfs_result) -> int:
    """What statvfs found free for us, who are not root."""
    return found.f_bavail * found.f_frsize


def open_dir(path: Path) -> int:
    """A descriptor of the folder *path* itself, never of where a link leads; close it."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def fsync_dir(path: Path) -> None:
    """Make renames in *path* survive a power cut."""
    fd = open_dir(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(
    target: Path, data: bytes, *, aside: Path, mode: int = 0o640, sync_dir: bool = True
) -> None:
    """Make *target* hold *data*: whole or not at all, also after a power cut.

    Args:
      aside: Where it is written first; same file system, not there yet.
      sync_dir: False if the caller syncs the folder later, for all its files at once.

    Raises:
      DiskFull: Nothing is left behind.
      FileExistsError: *aside* exists.

    """
    with full_disk_told():
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(aside, flags, mode)
        try:
            with open(fd, "wb") as file:
                os.fchmod(fd, mode)  # whatever the umask
                file.write(data)
                file.flush()
                os.fsync(fd)
            aside.rename(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if sync_dir:
            fsync_dir(target.parent)


def drop(spool: Spool, name: str, data: bytes, *, ulid: str | None = None) -> JobId:
    """Submit *data* as a job file called *name*; the id is known at once, daemon or not.

    Args:
      ulid: The job's own; by default one of now.

    Raises:
      DiskFull: Nothing was submitted.
      OSError: There is no such spool, or we may not write there.

    """
    job = job_id_for(name, ulid or new_ulid(time.time(), os.urandom(ULID_BYTES)), used=_always)
    file_name = job + extension_of(name)
    write_durably(spool.new / file_name, data, aside=spool.tmp / f".{file_name}.part")
    return job


def _always(job: JobId) -> bool:
    return True
