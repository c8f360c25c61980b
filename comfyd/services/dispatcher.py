"""The dispatcher: the one task that owns the engine. Facts in, one commit, then orders out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

import structlog
import trio

from comfyd.core.engine import Batch as EngineBatch
from comfyd.core.engine import Change, Engine
from comfyd.core.facts import Claimed, Fact, Summoned, Tick
from comfyd.core.keys import Absorbed, judge
from comfyd.core.model import Row
from comfyd.core.notes import Note
from comfyd.core.orders import Expire, Read, Refill, Summon, Task
from comfyd.errors import DiskFull, JournalError
from comfyd.journal.store import Alias, Batch, Event, Insert, Lift, Raise, Remember, Update
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.services.inbox import Inbox

# Changes that nothing waits for ride with the next commit, but not for longer than this.
LAZY_S: Final = 1.0
FULL_DISK_RETRY_S: Final = 2.0

_log: Any = structlog.get_logger("comfyd.dispatcher")


class Dispatcher:
    """See the module.

    Args:
      perform: Starts carrying out an order, without blocking; its answer comes by the inbox.
      observe: Is told every note once what it tells of is committed.
      on_deadline: Is told when the engine next wants a Tick (the clock's seconds; inf for never).
      on_refused: Is told that the journal's disk refused a commit, which is then tried again.
      on_absorbed: Is told of each drop that is another job, once that is committed: it may go.

    Cancellation of `run`: while it waits for facts or for space on the disk. A commit is never
    cut short, and what was not committed was not acted on.

    """

    def __init__(
        self,
        engine: Engine,
        inbox: Inbox,
        journal: Journal,
        clock: Clock,
        *,
        perform: Callable[[Task], None],
        observe: Callable[[Iterable[Note]], None],
        on_deadline: Callable[[float], None],
        on_absorbed: Callable[[Absorbed], None],
        on_refused: Callable[[], None] = lambda: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._journal = journal
        self._clock = clock
        self._perform = perform
        self._observe = observe
        self._on_deadline = on_deadline
        self._on_refused = on_refused
        self._on_absorbed = on_absorbed
        self._draw = draw
        self._waiting = EngineBatch()  # changes that ride with the next commit
        self._absorbed: list[Absorbed] = []  # the next commit makes them aliases
        self._lazy_since_s = math.inf
        self.waits_for_space = False
        self._settled = trio.Event()
        self._settled_to = 0
        self._turned = trio.Event()

    async def run(self) -> NoReturn:
        """Drive the engine for ever.

        Raises:
          JournalError: The journal can no longer be trusted.
          ProtocolViolation: A bug.

        """
        await self._settle()  # the orders of `Engine.load`
        while True:
            with trio.move_on_at(self._clock.trio_s(self._lazy_since_s + LAZY_S)):
                await self._inbox.wait()
            self._handle(await self._judged(self._inbox.take()))
            await self._settle()

    def _handle(self, facts: list[Fact]) -> None:
        now_s = self._clock.now_s()
        for fact in facts:
            self._engine.handle(fact, now_s=now_s, u=self._draw())

    async def _judged(self, facts: list[Fact]) -> list[Fact]:
        """*facts* without the claims that are other jobs by their keys: those become aliases."""
        holders: dict[str, Row] = {}  # of this batch, not committed yet
        kept: list[Fact] = []
        for fact in facts:
            if isinstance(fact, Claimed) and fact.row.key is not None:
                key = fact.row.key
                with trio.CancelScope(shield=True):  # what was taken from the inbox is not lost
                    verdict = judge(fact.row, holders.get(key) or await self._journal.keyed(key))
                if isinstance(verdict, Absorbed):
                    self._absorbed.append(verdict)
                    continue
                if verdict.key is not None:
                    holders[key] = verdict
                fact = Claimed(row=verdict)
            kept.append(fact)
        return kept

    async def settled(self, number: int | None = None) -> None:
        """Until the next batch of facts has been dealt with: committed, and its orders given.

        Args:
          number: Of a fact (`Inbox.leave`): until that one has been dealt with, if it is not yet.

        """
        while number is None or self._settled_to < number:
            if self._settled.is_set():
                self._settled = trio.Event()
            await self._settled.wait()
            if number is None:
                return

    async def turned(self) -> None:
        """Until it has come round once more: dealt with facts, or found the disk still full."""
        if self._turned.is_set():
            self._turned = trio.Event()
        await self._turned.wait()

    async def _settle(self) -> None:
        """Commit what came of the facts, then release it."""
        while True:
            now_s = self._clock.now_s()
            batch = self._engine.take(now_s=now_s, u=self._draw())
            self._waiting = _joined(self._waiting, batch)
            if batch.urgent or self._absorbed or now_s >= self._lazy_since_s + LAZY_S:
                await self._commit()
            elif self._waiting != EngineBatch():
                self._lazy_since_s = min(self._lazy_since_s, now_s)
            self._observe(batch.notes)
            reads: list[Read] = []
            for order in batch.orders:
                if isinstance(order, Read):
                    reads.append(order)
                else:
                    self._perform(order)
            if not reads:
                break
            if any(isinstance(order, Summon) for order in reads):
                await self._commit()  # or it could answer with what is no longer so
            # Read here and now, so that what is read cannot be older than what is in memory.
            self._handle([await self._read(order) for order in reads])
        self._settled_to = self._inbox.taken
        self._settled.set()
        self._turned.set()
        self._on_deadline(self._engine.next_deadline_s())

    async def _read(self, order: Read) -> Fact:
        now_s = self._clock.now_s()
        match order:
            case Refill():
                return await self._journal.candidates(order.count, now_s, order.shelf)
            case Expire():
                return await self._journal.overdue(order.count, now_s)
            case Summon():
                jobs = dict.fromkeys(purpose.job for purpose in order.purposes)
                rows = [await self._journal.get(job) for job in jobs]
                known = tuple(row for row in rows if row is not None)
                return Summoned(rows=known, purposes=order.purposes)

    async def flush(self) -> None:
        """Commit what waits for company; for the very end."""
        self._absorbed.clear()  # nobody is left to clear them away: the next start finds them
        await self._commit()

    async def _commit(self) -> None:
        batch, self._waiting = self._waiting, EngineBatch()
        absorbed, self._absorbed = self._absorbed, []
        self._lazy_since_s = math.inf
        if batch == EngineBatch() and not absorbed:
            return
        at_s = self._clock.now_s()
        stored = Batch(
            changes=(
                *(_stored(change) for change in batch.changes),
                *(Raise(fence=fence) for fence in batch.raised),
                *(Lift(prompt_id=prompt_id) for prompt_id in batch.lifted),
                *(Remember(name=name, value=value) for name, value in batch.settings),
                *(Alias(name=each.row.job, job=each.into) for each in absorbed),
            ),
            events=(
                *(_story(each, at_s) for each in absorbed),
                *(
                    Event(job=note.job, at=at_s, kind=note.kind, data=_told(note))
                    for note in batch.notes
                    if note.story and note.job is not None
                ),
            ),
        )
        while True:
            try:
                results = await self._journal.commit(stored)
            except DiskFull as error:
                if not self.waits_for_space:
                    _log.warning("journal_waits_for_space", problem=str(error))
                self.waits_for_space = True
                self._on_refused()
                self._turned.set()
                await trio.sleep(FULL_DISK_RETRY_S)
                continue
            break
        if self.waits_for_space:
            _log.info("journal_has_space_again")
        self.waits_for_space = False
        ours = len(results) - len(absorbed)
        refused = [str(c) for c, ok in zip(stored.changes[:ours], results, strict=False) if not ok]
        if refused:
            raise JournalError(f"the journal refused {'; '.join(refused[:3])}: two owners?")
        for each, ok in zip(absorbed, results[ours:], strict=True):
            # Not applied: committed before a crash, or its job is forgotten and the next start asks
            # again.
            if ok or await self._journal.find(each.row.job):
                self._on_absorbed(each)


def _joined(first: EngineBatch, second: EngineBatch) -> EngineBatch:
    """What is to be written, of both."""
    return EngineBatch(
        changes=first.changes + second.changes,
        raised=first.raised + second.raised,
        lifted=first.lifted + second.lifted,
        settings=first.settings + second.settings,
        notes=first.notes + second.notes,
    )


def _stored(change: Change) -> Insert | Update:
    if change.expected is None:
        return Insert(row=change.row)
    return Update(row=change.row, expected=change.expected)


def _story(absorbed: Absorbed, at_s: float) -> Event:
    return Event(job=absorbed.into, at=at_s, kind="absorbed", data={"name": absorbed.row.job})


def _told(note: Note) -> dict[str, object]:
    return note.data if note.server is None else {"server": note.server, **note.data}


class Auditor:
    """Sleeps until the engine's next deadline and says so. The verdicts are the engine's."""

    def __init__(self, inbox: Inbox, clock: Clock) -> None:
        self._inbox = inbox
        self._clock = clock
        self._deadline_s = math.inf
        self._changed = trio.Event()

    def set_deadline(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._changed.set()

    async def run(self) -> NoReturn:
        """Send a Tick at each deadline. Cancellation: while asleep."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(self._clock.trio_s(self._deadline_s)) as slept:
                await self._changed.wait()
            if slept.cancelled_caught:
                self._deadline_s = math.inf  # until the engine has taken this one
                self._inbox.put(Tick())
