"""The journal's async face: one thread at a time does everything with the store, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import trio

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.model import Fence, JobId, Row, Shelf, State
from comfyd.core.retention import Bounds, Kept, Past, Place, Tally
from comfyd.journal.copy import check_copy
from comfyd.journal.store import Batch, Event, Pruned, Store

P = ParamSpec("P")
T = TypeVar("T")


class Journal:
    """A Store for tasks: the same questions and answers, awaited.

    As a context manager it closes the store: cleanly, unless an exception passes. So it belongs
    outside the scope that a shutdown cancels.

    Args:
      open_store: Opens the store, where it will be used.
      inline: Work in the calling task instead of a thread: for stores in memory, where a thread
        would let a test's clock run on while it works.
      on_commit: Is told how long each commit took, in seconds, its wait for the thread included.

    Cancellation: a call that has begun is finished and its result returned. A commit cannot be
    cancelled even before it begins; every other call can.

    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        *,
        inline: bool = False,
        on_commit: Callable[[float], None] | None = None,
    ) -> None:
        self._open_store = open_store
        self._inline = inline
        self._on_commit = on_commit
        # One: the store has one owner. Waiting calls are served in the order they came.
        self._turn = trio.CapacityLimiter(1)
        self._store: Store

    async def __aenter__(self) -> Self:
        """Open the store; raises what that raises."""
        self._store = await self._call(self._open_store)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._call(self._store.close, clean=error is None)

    async def commit(self, batch: Batch) -> tuple[bool, ...]:
        """See ``Store.commit``. Committed or not, the answer is always heard: it is shielded."""
        began_s = trio.current_time()
        with trio.CancelScope(shield=True):
            results = await self._call(self._store.commit, batch)
        if self._on_commit is not None:
            self._on_commit(trio.current_time() - began_s)
        return results

    async def prune_events(
        self, bounds: Bounds, now_s: float, *, after: int = 0, limit: int = 1000, dry: bool = False
    ) -> Pruned:
        prune = self._store.prune_events
        return await self._call(prune, bounds, now_s, after=after, limit=limit, dry=dry)

    async def copy_to(self, target: Path) -> None:
        """A snapshot, read through. Other calls are answered between two pieces of the copying.

        Cancellation: between two pieces, and while it is read through; no whole file may be left.

        """

        async def let_others() -> None:
            self._turn.release_on_behalf_of(turn)
            with trio.CancelScope(shield=True):  # the copy has the store again, whoever is told
                await self._turn.acquire_on_behalf_of(turn)
            await trio.lowlevel.checkpoint_if_cancelled()

        turn = object()  # the copy has the store, but for its pauses
        await self._turn.acquire_on_behalf_of(turn)
        try:
            pause = partial(trio.from_thread.run, let_others)
            await trio.to_thread.run_sync(self._store.copy_to, target, pause)
        finally:
            self._turn.release_on_behalf_of(turn)
        await trio.to_thread.run_sync(check_copy, target, abandon_on_cancel=True)

    async def active(self) -> tuple[Row, ...]:
        return await self._call(self._store.active)

    async def candidates(self, count: int, now_s: float, shelf: Shelf) -> Candidates:
        return await self._call(partial(self._store.candidates, count, now_s, shelf))

    async def overdue(self, count: int, now_s: float) -> Overdue:
        return await self._call(self._store.overdue, count, now_s)

    async def fences(self) -> tuple[Fence, ...]:
        return await self._call(self._store.fences)

    async def remembered(self) -> dict[str, Any]:
        return await self._call(self._store.remembered)

    async def get(self, job: JobId) -> Row | None:
        return await self._call(self._store.get, job)

    async def keyed(self, key: str) -> Row | None:
        return await self._call(self._store.keyed, key)

    async def find(self, text: str) -> tuple[Row, ...]:
        return await self._call(self._store.find, text)

    async def rows(
        self, state: State | None = None, *, limit: int, after: int | None = None
    ) -> tuple[Row, ...]:
        return await self._call(self._store.rows, state, limit=limit, after=after)

    async def latest(self, state: State, *, limit: int) -> tuple[Row, ...]:
        return await self._call(self._store.latest, state, limit=limit)

    async def events(self, job: JobId) -> tuple[Event, ...]:
        return await self._call(self._store.events, job)

    async def counts(self) -> dict[State, int]:
        return await self._call(self._store.counts)

    async def oldest(self, state: State) -> float | None:
        return await self._call(self._store.oldest, state)

    async def without_rows(self, jobs: Iterable[JobId]) -> set[JobId]:
        return await self._call(self._store.without_rows, jobs)

    async def kept(
        self, place: Place, *, limit: int, after: Kept | None = None
    ) -> tuple[Kept, ...]:
        return await self._call(self._store.kept, place, limit=limit, after=after)

    async def newest_kept(
        self, place: Place, *, limit: int, before: Kept | None = None
    ) -> tuple[Kept, ...]:
        return await self._call(self._store.newest_kept, place, limit=limit, before=before)

    async def tally(self, place: Place) -> Tally:
        return await self._call(self._store.tally, place)

    async def past(self, *, limit: int, after: int = 0) -> tuple[Past, ...]:
        return await self._call(self._store.past, limit=limit, after=after)

    async def last_seq(self) -> int:
        return await self._call(self._store.last_seq)

    async def turn(self) -> None:
        """Until its thread has come round to us: whatever it was doing is done."""
        await self._call(lambda: None)

    def opened_cleanly(self) -> bool:
        """See ``Reads.opened_cleanly``; known since the opening, so nothing is awaited."""
        return self._store.opened_cleanly()

    async def _call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._inline:
            await trio.lowlevel.checkpoint()
            return work(*args, **kwargs)
        # Not abandoned when cancelled, which is the default: two threads would have the store.
        return await trio.to_thread.run_sync(lambda: work(*args, **kwargs), limiter=self._turn)
