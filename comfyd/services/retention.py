"""Retention: removes results, stories and rows that are out of their bounds, a few at a time.

What goes is decided in ``comfyd.core.retention``. Only jobs that are over are ever touched, and
the dispatcher never waits for more than one small commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import structlog
import trio

from comfyd.core import retention as core
from comfyd.core.facts import Forgotten
from comfyd.core.model import JobId, Row
from comfyd.core.retention import FORGOTTEN, Bounds, Kept, Place
from comfyd.errors import DiskFull
from comfyd.journal.store import Batch, Change, Drop, Forget, Remember
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.spool import removal
from comfyd.spool.layout import Spool
from comfyd.spool.removal import Removal

FIRST_S: Final = 60.0  # after the start, when there is more urgent work
EVERY_S: Final = 600.0
PAGE: Final = 100  # results or rows looked at in one go, and written in one commit
EVENTS: Final = 500
# Rows looked at in one round by itself: 288,000 a day, more than arrive, and no burden.
ROWS: Final = 2000

_log: Any = structlog.get_logger("comfyd.retention")


@dataclass(frozen=True, slots=True)
class Removed:
    """One result that went, or would go: by which bound."""

    kept: Kept
    why: core.Why


@dataclass(slots=True)
class Report:
    """What one round did.

    Attributes:
      results: The first *limit* removed; *more* says how many there were besides.
      bytes: The size of all of them.
      problems: Sentences about what could not be removed.

    """

    limit: int = 0
    results: list[Removed] = field(default_factory=list)
    more: int = 0
    bytes: int = 0
    events: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, removed: Iterable[Removed]) -> None:
        for each in removed:
            self.bytes += each.kept.bytes
            if len(self.results) < self.limit:
                self.results.append(each)
            else:
                self.more += 1

    @property
    def removed(self) -> int:
        return len(self.results) + self.more


class Retention:
    """See the module.

    Args:
      bounds: Of the results in each place, as they are now.
      events: Of stories, as they are now; None: they, and rows, are kept for ever.
      forgotten_until: What the journal remembers as FORGOTTEN.
      tell: Takes the news for the engine.
      on_removed: Is told of results that went from a place, and how many.

    """

    def __init__(
        self,
        journal: Journal,
        spool: Spool,
        clock: Clock,
        *,
        bounds: Callable[[], Mapping[Place, Bounds]],
        events: Callable[[], Bounds | None],
        forgotten_until: float,
        tell: Callable[[Forgotten], None],
        on_removed: Callable[[str, int], None],
    ) -> None:
        self._journal = journal
        self._spool = spool
        self._clock = clock
        self._bounds = bounds
        self._events = events
        self._until_s = forgotten_until
        self._tell = tell
        self._on_removed = on_removed
        self._turn = trio.Lock()
        self._row = 0  # the seq of the last row that was looked at
        self._told: frozenset[str] = frozenset()  # the problems of the last round

    def is_forgotten(self, job: JobId) -> bool:
        """Whether *job* may be one that was forgotten."""
        return core.is_forgotten(job, self._until_s)

    async def run(self) -> NoReturn:
        """A round every EVERY_S. Cancellation: between two steps of it."""
        await trio.sleep(FIRST_S)
        while True:
            try:
                report = await self.round(rows=ROWS)
            except DiskFull as error:
                _log.warning("retention_waits_for_space", problem=str(error))
            else:
                self._say(report)
            await trio.sleep(EVERY_S)

    async def now(self, *, dry: bool, limit: int) -> Report:
        """A whole round at once, because a person asks for it; *dry*: nothing is changed.

        Raises:
          DiskFull: The disk takes no changes now; what was removed until then is.

        """
        report = await self.round(dry=dry, limit=limit)
        if not dry:
            self._say(report)
        return report

    async def round(self, *, dry: bool = False, limit: int = 0, rows: int | None = None) -> Report:
        """Remove what is out of bounds now; of rows, look at *rows* at most (None: at all)."""
        async with self._turn:
            report = Report(limit=limit)
            if not dry:
                report.problems += await trio.to_thread.run_sync(removal.again, self._spool)
            for place, bounds in self._bounds().items():
                await self._results(place, bounds, report, dry=dry)
            events = self._events()
            if events is not None:
                await self._stories(events, report, dry=dry)
                if not dry:
                    await self._rows(report, rows)
            return report

    def _say(self, report: Report) -> None:
        new = [problem for problem in report.problems if problem not in self._told]
        self._told = frozenset(report.problems)
        for problem in new[:10]:
            _log.warning("not_removed", problem=problem)
        if report.removed or report.events or report.rows:
            _log.info(
                "removed",
                results=report.removed,
                bytes=report.bytes,
                events=report.events,
                rows=report.rows,
            )

    # --- results ---------------------------------------------------------------------------------

    async def _results(self, place: Place, bounds: Bounds, report: Report, *, dry: bool) -> None:
        cut = await self._cut(place, bounds, dry=dry)
        after: Kept | None = None
        while page := await self._journal.kept(place, limit=PAGE, after=after):
            after = page[-1]
            now_s = self._clock.now_s()
            due = [
                Removed(kept, why)
                for kept in page
                if (why := core.why_removed(kept, bounds, cut, now_s=now_s))
            ]
            if dry:
                lying = await trio.to_thread.run_sync(
                    removal.there, self._spool, [each.kept for each in due]
                )
                report.add(each for each in due if each.kept in lying)
            elif due:
                await self._remove(place, due, report)
            if len(due) < len(page):
                return

    async def _cut(self, place: Place, bounds: Bounds, *, dry: bool) -> core.Cut | None:
        """Which results there is no room for, by their number and size: of those really there.

        Reads nothing while no more are known than may be kept. Else it looks at each, the newest
        first, until there is no room: those that consumers took do not count.
        """
        if (await self._journal.tally(place)).exceeds(bounds) is None:
            return None
        count = core.Count(bounds=bounds)
        before: Kept | None = None
        while count.cut is None:
            page = await self._journal.newest_kept(place, limit=PAGE, before=before)
            if not page:
                break
            before = page[-1]
            lying = await trio.to_thread.run_sync(removal.there, self._spool, page)
            count = count.counted(lying)
            if not dry:
                await self._drop(set(page).difference(lying))
        return count.cut

    async def _remove(self, place: Place, due: list[Removed], report: Report) -> None:
        await trio.to_thread.run_sync(removal.sync_claimed, self._spool)
        # One at a time: a stop waits for no more. What is not noted then is found gone later.
        outcomes = [
            (each, await trio.to_thread.run_sync(removal.remove, self._spool, each.kept))
            for each in due
        ]
        over = {Removal.REMOVED, Removal.LEFT, Removal.GONE, Removal.FOREIGN}
        await self._drop(each.kept for each, (what, _) in outcomes if what in over)
        went = [each for each, (what, _) in outcomes if what is Removal.REMOVED]
        report.add(went)
        report.problems += [problem for _, (_, problem) in outcomes if problem]
        self._on_removed(place.value, len(went))

    async def _drop(self, gone: Iterable[Kept]) -> None:
        if changes := tuple(Drop(job=kept.job) for kept in gone):
            await self._journal.commit(Batch(changes=changes))

    # --- stories and rows ------------------------------------------------------------------------

    async def _stories(self, bounds: Bounds, report: Report, *, dry: bool) -> None:
        after: int | None = 0
        while after is not None:
            pruned = await self._journal.prune_events(
                bounds, self._clock.now_s(), after=after, limit=EVENTS, dry=dry
            )
            report.events += pruned.forgotten
            after = pruned.next

    async def _rows(self, report: Report, most: int | None) -> None:
        """Forget rows, going on where the last round ended; from the first one for a person."""
        if most is None:
            self._row = 0
        fenced = {fence.job for fence in await self._journal.fences()}
        looked = 0
        while most is None or looked < most:
            page = await self._journal.past(limit=PAGE, after=self._row)
            if not page:
                self._row = 0
                return
            looked, self._row = looked + len(page), page[-1].row.seq
            now_s = self._clock.now_s()
            free = [
                past.row
                for past in page
                if core.may_go(past, fenced=past.row.job in fenced, now_s=now_s)
            ]
            going = await trio.to_thread.run_sync(_not_lying, self._spool, free)
            if going:
                until_s = core.forgotten_until(self._until_s, (row.job for row in going))
                changes: tuple[Change, ...] = (
                    Remember(name=FORGOTTEN, value=until_s),
                    *(Forget(job=row.job, version=row.version) for row in going),
                )
                _, *done = await self._journal.commit(Batch(changes=changes))
                self._until_s = until_s
                states = [row.state for row, ok in zip(going, done, strict=True) if ok]
                report.rows += len(states)
                self._tell(Forgotten(states=tuple(states)))


def _not_lying(spool: Spool, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not removal.lies(spool, row)]
