"""Watching ``new/``: events make it quick, looking makes it sure.

An event (moved in, closed after writing) only names a file that may be claimed at once; whatever
events miss, a look finds: at start, after an overflow, when ``new/`` was replaced, and every
``rescan_s``. Files that cannot be taken yet stay in ``new/``: that is the back-pressure.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import structlog
import trio
from inotify_simple import INotify, flags

from comfyd.core.facts import Claimed
from comfyd.errors import DiskFull
from comfyd.spool.intake import BATCH, Entry, Intake
from comfyd.spool.layout import Spool, full_disk_told

# Names told by events and not yet claimed. As many as the kernel queues by default
# (fs.inotify.max_queued_events): beyond that a look is cheaper than remembering.
MAX_NAMES: Final = 16_384

MIN_POLL_S: Final = 0.05  # without events, however short files settle

_TAKE: Final = flags.MOVED_TO | flags.CLOSE_WRITE
_GONE: Final = flags.DELETE_SELF | flags.MOVE_SELF | flags.IGNORED | flags.UNMOUNT
_WATCHED: Final = _TAKE | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR | flags.DONT_FOLLOW

_log = structlog.get_logger("comfyd.spool")


def why_no_events(folder: Path) -> str:
    """Why the kernel would tell nothing of *folder*, "" if it would. Blocking, for a moment.

    Raises:
      OSError: There is no such folder.

    """
    folder.stat()
    try:
        with INotify(nonblocking=True) as trial:
            trial.add_watch(folder, _WATCHED)
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Doorbell:
    """An inotify watch of ``new/``, put up again when the folder is replaced.

    Where the kernel grants none, it does not ring, says so once, and asks again at each ``arm``.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._inotify: Any = None
        self._inode: tuple[int, int] | None = None
        self._refused = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disarm()

    @property
    def rings(self) -> bool:
        """Whether events can be expected at all."""
        return self._inotify is not None

    def arm(self) -> None:
        """Make ``new/`` if it is gone, and watch the one that is there. Blocking.

        Raises:
          DiskFull: There is no space for an empty folder.

        """
        with full_disk_told():
            self._spool.make("new")
        found = self._spool.new.stat()
        inode = (found.st_dev, found.st_ino)
        if self._inotify is not None and inode == self._inode:
            return
        self._disarm()
        try:
            self._inotify = INotify(nonblocking=True)
            self._inotify.add_watch(self._spool.new, _WATCHED)
            self._inode = inode
            self._refused = False
        except OSError as error:
            self._disarm()
            if not self._refused:
                _log.warning("polling_new", problem=str(error))
            self._refused = True

    def _disarm(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    async def wait(self) -> None:
        """Return once there are events; never, if none can come."""
        if self._inotify is None:
            await trio.sleep_forever()
        await trio.lowlevel.wait_readable(self._inotify.fileno())

    def drain(self, names: dict[str, None]) -> bool:
        """Add the names that events told to *names*.

        Returns:
          Whether events were lost, so that only a look can tell what is there.

        """
        if self._inotify is None:
            return False
        lost = False
        for event in self._inotify.read(timeout=0):
            if event.mask & _GONE:
                self._inode = None
                lost = True
            elif event.mask & flags.Q_OVERFLOW:
                lost = True
            elif event.mask & _TAKE:
                names[event.name] = None
        return lost


class _Eyes:
    """What ``watch`` knows of ``new/`` between two steps."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}  # told by events, in order
        self.ready: list[Entry] = []  # found by the last look and not yet claimed
        self.look_at_s = -math.inf  # trio's clock

    def forget(self) -> None:
        """Trust nothing but the next look, which is due at once."""
        self.names.clear()
        self.ready.clear()
        self.look_at_s = -math.inf


def _nobody() -> None:
    """Nobody wants to be told."""


async def watch(
    intake: Intake,
    *,
    rescan_s: Callable[[], float],
    send: Callable[[list[Claimed]], Awaitable[None]],
    paused: Callable[[], bool],
    on_pickup: Callable[[float], None],
    on_unmovable: Callable[[], None] = _nobody,
    on_refused: Callable[[], None] = _nobody,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Claim what is dropped into ``new/``, for ever; started once it is watched.

    Args:
      rescan_s: How often to look anyway, and to try again when the disk is full. Where there are
        no events, the look comes as often as files settle.
      send: Takes the claims of one batch, BATCH at most; nothing more is claimed until it returns.
      paused: Whether to leave everything in ``new/``.
      on_pickup: Told for each claim how long the file was waiting, in seconds.
      on_unmovable: Told of each entry that cannot be taken; the log says which.
      on_refused: Told that the disk refused a claim: it is full, over quota or read-only.

    Cancellation: between claims and *send* the claimed files have no rows; ``Intake.adopt`` finds
    them at the next start.

    """
    eyes = _Eyes()
    full = False

    def poll_s() -> float:
        return max(intake.settle_s, MIN_POLL_S)

    async def take(entries: list[Entry]) -> None:
        nonlocal full
        taken = await trio.to_thread.run_sync(intake.claim, entries)
        full = False
        for sentence in taken.unmovable:
            _log.warning("left_in_new", problem=sentence)
            on_unmovable()
        for seconds in taken.pickup_s:
            on_pickup(seconds)
        if taken.claims:
            await send(taken.claims)

    async def step(bell: Doorbell) -> None:
        try:
            await see(bell)
        except FileNotFoundError as error:
            if error.filename is None or Path(error.filename) != intake.spool.new:
                raise
            eyes.forget()  # new/ was removed under our eyes

    async def see(bell: Doorbell) -> None:
        if eyes.names:
            batch = list(islice(eyes.names, BATCH))
            for name in batch:
                del eyes.names[name]
            await take(await trio.to_thread.run_sync(intake.named, batch))
        if eyes.ready:
            batch_found, eyes.ready = eyes.ready[:BATCH], eyes.ready[BATCH:]
            await take(batch_found)
        elif trio.current_time() >= eyes.look_at_s:
            look = await trio.to_thread.run_sync(intake.scan)
            eyes.ready = look.ready
            period_s = rescan_s() if bell.rings else min(poll_s(), rescan_s())
            again_s = period_s if look.again_s is None else min(look.again_s, period_s)
            eyes.look_at_s = trio.current_time() + again_s
        elif not eyes.names:
            with trio.move_on_at(eyes.look_at_s):
                await bell.wait()

    with Doorbell(intake.spool) as bell:
        await trio.to_thread.run_sync(bell.arm)
        task_status.started()
        while True:
            try:
                if trio.current_time() >= eyes.look_at_s:
                    await trio.to_thread.run_sync(bell.arm)  # before looking, or a file slips by
                if bell.drain(eyes.names) or len(eyes.names) > MAX_NAMES:
                    eyes.forget()
                elif paused():
                    eyes.forget()
                    await trio.sleep(poll_s())
                else:
                    await step(bell)
            except DiskFull as error:
                if not full:
                    _log.warning("claims_wait_for_space", problem=str(error))
                full = True
                on_refused()
                eyes.forget()
                await trio.sleep(rescan_s())
