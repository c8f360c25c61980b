"""Space: whether the disks of spool and state take what jobs will write, looked at all the time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from comfyd.core.facts import SpaceSeen
from comfyd.errors import DiskFull
from comfyd.spool.layout import free_bytes, full_disk_told

LOOK_S: Final = 2.0
# A job has a folder and a handful of files; without inodes a disk is as full as without bytes.
INODES: Final = 128
# Thousands of commits: state/ may lie on a partition that is smaller than min_free_bytes.
JOURNAL_BYTES: Final = 16 << 20
# Once too little was free, so much more than enough must be, or it would go on and off.
MORE: Final = 1 / 16
PROBE_BYTES: Final = 64 << 10

_log: Any = structlog.get_logger("comfyd.space")


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system, and what is to stay free on it.

    Attributes:
      folder: In words for people, and where to look.
      scratch: A folder there whose files nobody else sees, for trying.

    """

    folder: Path
    scratch: Path
    keep_bytes: int

    def problem(self, *, eager: bool, refused: bool) -> str:
        """Why nothing more should be written there, as a sentence; "" if it may. Blocking.

        Args:
          eager: Ask for a little more than enough: it was too little just now.
          refused: A write was refused: try one, for a quota shows in no number.

        """
        found = os.statvfs(self.folder)
        more = 1 + MORE if eager else 1
        free = free_bytes(found)
        if found.f_flag & os.ST_RDONLY:
            return f"Waiting: the file system of {self.folder} is read-only; remount it writable."
        if free < self.keep_bytes * more:
            kept = f"{_size(self.keep_bytes)} are kept free (outputs.min_free_bytes)"
            return (
                f"Waiting for space: the file system of {self.folder} has {_size(free)} free, and"
                f" {kept}; make room."
            )
        # A file system that makes inodes as it needs them counts none.
        if found.f_files and found.f_favail < INODES * more:
            return (
                f"Waiting for space: the file system of {self.folder} has only {found.f_favail}"
                " inodes left; remove files that nobody needs."
            )
        return self._tried() if refused else ""

    def _tried(self) -> str:
        probe = self.scratch / ".space"
        try:
            with full_disk_told():
                fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    if os.write(fd, bytes(PROBE_BYTES)) < PROBE_BYTES:
                        return f"Waiting for space: the disk of {self.folder} is full; make room."
                    os.fsync(fd)
                finally:
                    os.close(fd)
                    probe.unlink(missing_ok=True)
        except DiskFull as error:
            return f"Waiting for space: writing is refused ({error}); make room or raise the quota."
        return ""


def disks(spool: Path, state: Path, min_free_bytes: int) -> list[Disk]:
    """The file systems that the daemon writes to: one or two."""
    found = [Disk(spool, spool / "stage", min_free_bytes)]
    if spool.stat().st_dev != state.stat().st_dev:
        found.append(Disk(state, state, min(min_free_bytes, JOURNAL_BYTES)))
    return found


class Space:
    """Looks at *disks*, the spool's first, every LOOK_S, and at once when a write was refused.

    Attributes:
      waiting: What everything waits for, as a sentence; "" if there is enough.
      disks: May be replaced; the next look is at those.

    Args:
      tell: Takes the news: at the start, and whenever it changes.

    """

    def __init__(self, disks: list[Disk], tell: Callable[[SpaceSeen], None]) -> None:
        self.disks = disks
        self._tell = tell
        self._told: bool | None = None
        self._refused = trio.Event()
        self.waiting = ""

    @property
    def min_free_bytes(self) -> int:
        """What is to stay free on the spool's file system."""
        return self.disks[0].keep_bytes

    def refused(self) -> None:
        """A write was refused: see soon whether that is so for others too."""
        self._refused.set()

    async def look(self) -> None:
        """Look now. Cancellation: before it."""
        refused = self._refused.is_set()
        eager = refused or bool(self.waiting)
        self.waiting = await trio.to_thread.run_sync(self._problem, eager, refused)
        enough = not self.waiting
        if enough:
            self._refused = trio.Event()
        if enough is not self._told:
            if not enough:
                _log.warning("waiting_for_space", problem=self.waiting)
            elif self._told is not None:
                _log.info("space_again")
            self._told = enough
            self._tell(SpaceSeen(enough=enough))

    def _problem(self, eager: bool, refused: bool) -> str:
        problems = (disk.problem(eager=eager, refused=refused) for disk in self.disks)
        return next(filter(None, problems), "")

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            # While it waits, the pace is even: what is refused meanwhile is nothing new.
            wake = trio.Event() if self.waiting else self._refused
            with trio.move_on_after(LOOK_S):
                await wake.wait()


def _size(count: int) -> str:
    """Bytes as people read them, in the units of the configuration."""
    power = min(4, int(math.log2(count) / 10)) if count else 0
    number = f"{count / 1024**power:.1f}".removesuffix(".0")
    return f"{number} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
