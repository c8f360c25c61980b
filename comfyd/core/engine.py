"""All jobs and servers at hand: routes facts to jobs, finds places for the queue, keeps deadlines.

The engine is told facts (`handle`), and once per batch asked what came of them (`take`): rows to
commit, orders to release after the commit, notes to tell. It holds the active jobs and a bounded
look-ahead of the queue; the rest of the queue lives only in the journal.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import msgspec

from comfyd.core import lifecycle, rules, verdicts
from comfyd.core.facts import (
    Accepted,
    Answer,
    Candidates,
    Claimed,
    Connected,
    Disconnected,
    DrainAsked,
    Fact,
    Fenced,
    Fetched,
    ForgetAsked,
    Health,
    Hint,
    LateSuccess,
    NotSent,
    Overdue,
    PauseAsked,
    Probed,
    QueueLooked,
    QueueSeen,
    Reconfigured,
    Rejected,
    ResumeAsked,
    Sign,
    SpaceSeen,
    StalledPublisher,
    SubmitUnknown,
    Summoned,
    Tick,
    Wish,
)
from comfyd.core.fencing import again_soon, looked
from comfyd.core.fleet import Fleet
from comfyd.core.job import (
    Assigned,
    Context,
    Doubted,
    Due,
    Expired,
    GivenUp,
    Job,
    JobFact,
    NoServerLeft,
    Orphaned,
    Recalled,
    Step,
    is_stale,
    job_of,
    wake_s,
)
from comfyd.core.model import End, Fence, JobId, PromptId, Row, ServerName, State
from comfyd.core.moves import is_recalled
from comfyd.core.notes import Note
from comfyd.core.orders import Dismiss, Enlist, Expire, JobOrder, Order, Refill, Summon
from comfyd.core.orders import Fence as FenceOrder
from comfyd.core.policy import Policy, exponential_s
from comfyd.core.server import Server

# Results that wait for a server or a disk: more would only wait with them.
COLLECTING_MAX: Final = 2048

# Names under which the journal remembers what persons asked for.
PAUSED: Final = "paused"
DRAINING: Final = "draining"

# Enough to keep 16 servers with full windows busy for two rounds between reads of the journal.
LOOK_AHEAD = 512


@dataclass(frozen=True, slots=True)
class Change:
    """One row to commit. *expected* is the version it replaces, or None for a new row."""

    row: Row
    expected: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What came of a batch of facts. Commit the rest and the story of *notes*, then give *orders*.

    Attributes:
      raised, lifted: Fences that are new, and the prompt ids of those that are over.
      settings: What persons asked for, to be remembered by name.
      urgent: False when nothing waits for the commit: it may come together with a later one.

    """

    changes: tuple[Change, ...] = ()
    raised: tuple[Fence, ...] = ()
    lifted: tuple[PromptId, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    orders: tuple[Order, ...] = ()
    notes: tuple[Note, ...] = ()
    urgent: bool = False


@dataclass
class _Pending:
    """What `handle` gathered since the last `take`."""

    dirty: dict[JobId, int | None] = field(default_factory=dict)  # job -> committed version
    raised: list[Fence] = field(default_factory=list)
    lifted: list[PromptId] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    purposes: list[Wish | LateSuccess] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    urgent: bool = False


class Engine:
    """See the module. Not thread-safe; owned by the dispatcher.

    Args:
      servers: Every configured server.
      policy: The numbers to decide by.
      counts: Jobs by state in the journal at start.

    Attributes:
      paused: A person stopped the intake.
      space: There is room on the disk for results; nothing new is sent while there is not.

    """

    def __init__(
        self, servers: Iterable[Server], policy: Policy, counts: Mapping[State, int]
    ) -> None:
        self.policy = policy
        self.fleet = Fleet(servers, policy)
        self.jobs: dict[JobId, Job] = {}
        self.counts: Counter[State] = Counter(counts)
        self.paused = False
        self.space = True
        self._prompts: dict[PromptId, JobId] = {}
        self._queue: list[tuple[int, int, JobId]] = []  # a heap; entries may be outdated
        self._queued = 0  # queued jobs in memory
        self._picky: dict[JobId, None] = {}  # those of them that servers have refused
        self._picked = True  # whether each of those still has a server to wait for
        self._due: list[tuple[float, JobId]] = []  # a heap; entries may come too early
        self._wakes: dict[JobId, float] = {}  # the earliest entry of each job there
        self._more = True  # the journal may hold due rows that are not in memory
        self._next_delayed_s = math.inf  # when the first delayed row in the journal comes due
        self._overdue_s = 0.0  # when the first queued row is past its deadline
        self._recall_s = math.inf  # when to think of fetching a prompt back
        self._now_s = 0.0
        self._refilling = self._expiring = False
        self._pending = _Pending()

    @property
    def servers(self) -> Mapping[ServerName, Server]:
        return self.fleet.servers

    @property
    def on_server(self) -> Mapping[ServerName, Mapping[JobId, None]]:
        """Jobs with a prompt in flight, by server."""
        return self.fleet.on_server

    def fork(self) -> Engine:
        """An independent copy, for exploring what else could happen; nothing may be pending."""
        new = copy.copy(self)
        new.fleet = self.fleet.fork()
        new.jobs, new.counts = dict(self.jobs), self.counts.copy()
        new._prompts, new._queue, new._due = dict(self._prompts), self._queue[:], self._due[:]
        new._picky, new._wakes = dict(self._picky), dict(self._wakes)
        new._pending = _Pending()
        return new

    # --- what the dispatcher calls ---------------------------------------------------------------

    def load(
        self,
        rows: Iterable[Row],
        *,
        crashed: bool,
        now_s: float,
        u: float,
        fences: Iterable[Fence] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Take up what the journal holds as active, with its at-load orders. Times in the future
        (the wall clock was set back) become now, so that no deadline is longer than configured."""
        self.paused = settings.get(PAUSED) is True
        drained = settings.get(DRAINING)
        for name in self.servers:
            draining = isinstance(drained, list) and name in drained
            self._set(name, listen_by_s=now_s + self.policy.listen_grace_s, draining=draining)
        for fence in fences:
            self.fleet.watch(fence)
        rows = tuple(rows)
        beside = Counter((row.server, row.origin) for row in rows if row.state.in_flight)
        for row in rows:
            alone = beside[row.server, row.origin] == 1
            context = Context(now_s=now_s, u=u, policy=self.policy)
            loaded = lifecycle.load(_clamp(row, now_s), context, crashed=crashed, alone=alone)
            self._apply(row, loaded, now_s)

    def handle(self, fact: Fact, *, now_s: float, u: float) -> None:
        """Apply one fact. Raises ProtocolViolation for one that cannot be."""
        match fact:
            case Hint():
                self._hint(fact, now_s, u)
            case Claimed():
                self._claimed(fact.row, now_s, u)
            case Candidates():
                self._candidates(fact, now_s, u)
            case Overdue():
                self._overdue(fact, now_s, u)
            case Summoned():
                self._summoned(fact, now_s, u)
            case Tick():
                self._tick(now_s, u)
            case SpaceSeen():
                self._space(fact, now_s, u)
            case Fenced():
                self._fenced(fact, now_s, u)
            case PauseAsked() | DrainAsked() | ResumeAsked() | ForgetAsked():
                self._asked(fact, now_s, u)
            case Reconfigured():
                self._reconfigured(fact, now_s, u)
            case (
                Connected()
                | Disconnected()
                | StalledPublisher()
                | QueueSeen()
                | QueueLooked()
                | Health()
            ):
                self._server_news(fact, now_s, u)
            case _:
                self._job_fact(fact, now_s, u)

    def take(self, *, now_s: float, u: float) -> Batch:
        """Find places for the queue, then hand over everything since the last call."""
        self._now_s = now_s
        self._place(now_s, u)
        self._part(now_s, u)
        self._fence(now_s)
        pending, self._pending = self._pending, _Pending()
        changes = []
        for job_id, expected in pending.dirty.items():
            job = self.jobs[job_id]
            row = job.row if expected is None else _bump(job.row, expected)
            self.jobs[job_id] = Job(row, job.live)
            changes.append(Change(row, expected))
        self._forget(pending.dirty)
        orders = [self._current(order) for order in pending.orders]
        if pending.purposes:
            orders.append(Summon(purposes=tuple(pending.purposes)))
        return Batch(
            changes=tuple(changes),
            raised=tuple(pending.raised),
            lifted=tuple(pending.lifted),
            settings=tuple(pending.settings.items()),
            orders=tuple(orders),
            notes=tuple(pending.notes),
            urgent=pending.urgent,
        )

    def next_deadline_s(self) -> float:
        """When the next Tick is due; inf if never."""
        deadline_s = min(self._first_wake_s(), self._next_delayed_s, self._overdue_s)
        if self._queued:  # somebody waits for a server to be tried again
            for server in self.servers.values():
                opens_s = server.opens_s
                if self._now_s < opens_s < deadline_s:
                    deadline_s = opens_s
        if self._picky:
            hopes_end_s = self.fleet.hopes_end_s()
            if hopes_end_s > self._now_s:
                deadline_s = min(deadline_s, hopes_end_s)
        for watch in self.fleet.watches.values():
            if not watch.asked and self.servers[watch.fence.server].up:
                deadline_s = min(deadline_s, watch.look_s)
        return min(deadline_s, self._recall_s)

    def knows(self, prompt_id: PromptId) -> bool:
        """Whether *prompt_id* is the current attempt of a job at hand."""
        return prompt_id in self._prompts

    @property
    def active(self) -> int:
        """Jobs at hand that are not just waiting in the queue."""
        return len(self.jobs) - self._queued

    def sent_to(self) -> Counter[ServerName]:
        """Prompts of ours that may be on servers, by name: of those too that are configured no
        more, or at another URL now."""
        rows = (job.row for job in self.jobs.values())
        return Counter(row.server for row in rows if row.state.in_flight and row.server)

    def stale(self, server: ServerName, *, now_s: float) -> int:
        """Prompts on *server* that have been silent for longer than ``stale_after``."""
        return sum(
            is_stale(self.jobs[job_id], self.policy, now_s=now_s)
            for job_id in self.on_server[server]
        )

    def trouble(self, server: ServerName) -> str:
        """Why a server that answers is given nothing more, as a sentence; "" if all is well."""
        return self.fleet.trouble(server, self._now_s)

    # --- jobs ------------------------------------------------------------------------------------

    def _job_fact(self, fact: JobFact, now_s: float, u: float) -> None:
        job_id = job_of(fact)
        job = None if job_id is None else self.jobs.get(job_id)
        if job is None:
            if isinstance(fact, Answer):
                self._drop("stale_answer")
            elif isinstance(fact, Wish):
                self._pending.purposes.append(fact)  # it may sleep in the journal
            else:
                self._drop("unknown_job")
            return
        if isinstance(fact, Accepted | Rejected | NotSent | SubmitUnknown):
            self._breaker(job, fact, now_s, u)
        self._step(job, fact, now_s, u)

    def _step(self, job: Job, fact: JobFact, now_s: float, u: float) -> None:
        judged = isinstance(fact, Rejected | Fetched | Probed)
        elsewhere = judged and self.fleet.elsewhere(job.row, now_s)
        context = Context(now_s=now_s, u=u, policy=self.policy, elsewhere=elsewhere)
        self._apply(job.row, lifecycle.step(job, fact, context), now_s)

    def _apply(self, before: Row, done: Step, now_s: float) -> None:
        """Keep what a step made: the only place where a job in memory changes."""
        rules.check(before, done.job)
        row = done.job.row
        known = self.jobs.get(row.job)
        old = None if known is None else known.row
        self.jobs[row.job] = done.job
        if row != before:
            self._pending.dirty.setdefault(row.job, before.version)
            self._pending.urgent |= done.urgent
        for server, origin, prompt_id in row.abandoned[len(before.abandoned) :]:
            fence = Fence(
                prompt_id=PromptId(prompt_id),
                job=row.job,
                server=ServerName(server),
                origin=origin,
            )
            self._pending.raised.append(fence)
            self.fleet.watch(fence)
        self._pending.orders += done.orders
        self._pending.notes += done.notes
        self._index(old, row)
        if row.state is not before.state:
            self.counts[before.state] -= 1
            self.counts[row.state] += 1
        self._wake(done.job)
        for note in done.notes:
            if note.kind == "blamed":
                self._blame(row.job, note)
            elif note.kind == "ended" and note.data["end"] == "success":
                self._ran(row)

    def _wake(self, job: Job) -> None:
        """See to it that the job is told when its time has come."""
        wanted_s = wake_s(job, self.policy)
        if wanted_s < self._wakes.get(job.row.job, math.inf):
            self._wakes[job.row.job] = wanted_s
            heapq.heappush(self._due, (wanted_s, job.row.job))

    def _first_wake_s(self) -> float:
        """When the first job wants a Due; entries that come too early are put right on the way."""
        while self._due:
            due_s, job_id = self._due[0]
            job = self.jobs.get(job_id)
            if job is not None and wake_s(job, self.policy) == due_s == self._wakes.get(job_id):
                return due_s
            heapq.heappop(self._due)
            if self._wakes.get(job_id) == due_s:
                del self._wakes[job_id]
                if job is not None:
                    self._wake(job)
        return math.inf

    def _index(self, old: Row | None, row: Row) -> None:
        """Keep the look-ups in step with the rows in memory."""
        if old is not None and old.state is State.QUEUED:
            self._queued -= 1
            self._picky.pop(row.job, None)
        if row.state is State.QUEUED:
            self._queued += 1
            if old is None or old.state is not State.QUEUED:
                heapq.heappush(self._queue, (-row.priority, row.seq, row.job))
            if row.verdicts:
                self._picky[row.job] = None
                self._picked = False
            if row.queue_by is not None:
                self._overdue_s = min(self._overdue_s, row.queue_by)
        self.fleet.index(old, row)
        if old is not None and old.prompt_id is not None and old.prompt_id != row.prompt_id:
            self._prompts.pop(old.prompt_id, None)
        if row.prompt_id is not None:
            self._prompts[row.prompt_id] = row.job

    def _forget(self, committed: Iterable[JobId]) -> None:
        """Drop what is retired, and what the look-ahead has no room for; the journal has both."""
        for job_id in committed:
            row = self.jobs[job_id].row
            if row.state is State.QUEUED and row.not_before > self._now_s:
                self._next_delayed_s = min(self._next_delayed_s, row.not_before)
                self._remove(job_id)
            elif row.retired or row.state is State.HELD:
                self._remove(job_id)
        # The heap keeps entries of jobs that were held or cancelled until it is made anew.
        if self._queued > LOOK_AHEAD or len(self._queue) > 2 * LOOK_AHEAD:
            queue = sorted({entry for entry in self._queue if self._is_queued(entry)})
            self._more |= len(queue) > LOOK_AHEAD
            for _, _, job_id in queue[LOOK_AHEAD:]:
                self._remove(job_id)
            self._queue = queue[:LOOK_AHEAD]

    def _is_queued(self, entry: tuple[int, int, JobId]) -> bool:
        """Whether this entry of the heap is a job that may be sent now."""
        job = self.jobs.get(entry[2])
        if job is None or job.row.state is not State.QUEUED:
            return False
        return job.row.not_before <= self._now_s

    def _remove(self, job_id: JobId) -> None:
        row = self.jobs.pop(job_id).row
        self._picky.pop(job_id, None)
        if row.state is State.QUEUED:
            self._queued -= 1
        if row.prompt_id is not None:
            self._prompts.pop(row.prompt_id, None)

    def _current(self, order: Order) -> Order:
        """The order with the row as committed, version and all."""
        if not isinstance(order, JobOrder):
            return order
        job = self.jobs.get(order.row.job)
        return order if job is None else replace(order, row=job.row)

    def _drop(self, reason: str) -> None:
        self._pending.notes.append(Note("dropped", None, None, {"reason": reason}, story=False))

    # --- intake, the journal's sleepers and the queue --------------------------------------------

    def _claimed(self, row: Row, now_s: float, u: float) -> None:
        if row.job in self.jobs:
            self._drop("known_job")
            return
        context = Context(now_s=now_s, u=u, policy=self.policy)
        self.counts[row.state] += 1
        self._apply(row, lifecycle.load(row, context, crashed=False), now_s)
        self._pending.dirty[row.job] = None
        self._pending.urgent = True
        invalid = row.outcome is not None
        reason = row.outcome.reason.value if row.outcome and row.outcome.reason else ""
        told = {"payload": row.payload, "invalid": invalid, "reason": reason}
        self._pending.notes.append(Note("claimed", row.job, None, told))
        if row.retry_of is not None:
            self._pending.notes.append(Note("retried", row.retry_of, None, {"new": row.job}))

    def _candidates(self, fact: Candidates, now_s: float, u: float) -> None:
        self._refilling = False
        self._more = len(fact.rows) >= LOOK_AHEAD
        self._next_delayed_s = math.inf if fact.next_due_s is None else fact.next_due_s
        for row in fact.rows:
            self._awake(row, now_s, u)

    def _awake(self, row: Row, now_s: float, u: float) -> Job:
        """The job in memory; from *row*, as just read from the journal, if it was not."""
        if row.job not in self.jobs:
            context = Context(now_s=now_s, u=u, policy=self.policy)
            self._apply(row, lifecycle.load(_clamp(row, now_s), context, crashed=False), now_s)
        return self.jobs[row.job]

    def _summoned(self, fact: Summoned, now_s: float, u: float) -> None:
        """What was wished about jobs that sleep in the journal: the queued and the held."""
        rows = {row.job: row for row in fact.rows}
        for purpose in fact.purposes:
            row = rows.get(purpose.job)
            if row is None or (row.retired and row.job not in self.jobs):
                self._drop("unknown_job" if row is None else "no_effect")
                continue
            asleep = row.job not in self.jobs
            self._step(self._awake(row, now_s, u), purpose, now_s, u)
            if asleep and row.job not in self._pending.dirty:
                self._remove(row.job)  # it had no effect: the journal is where it belongs
                self._more = True

    def _overdue(self, fact: Overdue, now_s: float, u: float) -> None:
        """Queued rows whose time to start has run out."""
        self._expiring = False
        self._overdue_s = math.inf if fact.next_s is None else fact.next_s
        if len(fact.rows) >= LOOK_AHEAD:
            self._overdue_s = now_s
        for row in fact.rows:
            job = self._awake(row, now_s, u)
            if job.row.state is State.QUEUED:
                self._step(job, Expired(), now_s, u)

    def _place(self, now_s: float, u: float) -> None:
        """Give queued jobs places, and take from servers what others could run."""
        if self.fleet.keep_fit(now_s) or now_s >= self.fleet.hopes_end_s():
            self._picked = False
        if self._picky and not self._picked:
            self._give_up_picky(now_s, u)
        if self.space and self.counts[State.COLLECTING] < COLLECTING_MAX:
            self._assign(now_s, u)
            self._recall(now_s, u)
        if now_s >= self._next_delayed_s:
            self._more, self._next_delayed_s = True, math.inf
        if self._more and self._queued < LOOK_AHEAD // 2 and not self._refilling:
            self._refilling = True
            self._pending.orders.append(Refill(count=LOOK_AHEAD))
        if now_s >= self._overdue_s and not self._expiring:
            self._expiring, self._overdue_s = True, math.inf
            self._pending.orders.append(Expire(count=LOOK_AHEAD))

    def _give_up_picky(self, now_s: float, u: float) -> None:
        """End what servers have refused and no other is left to try."""
        self._picked = True
        for job_id in list(self._picky):
            job = self.jobs[job_id]
            if not self.fleet.elsewhere(job.row, now_s):
                self._step(job, NoServerLeft(), now_s, u)

    def _assign(self, now_s: float, u: float) -> None:
        """Give queued jobs, best first, to the least loaded servers with room."""
        fleet = self.fleet
        open_ = {s.name for s in fleet.servers.values() if fleet.has_room(s, now_s)}
        passed_over = []
        while open_ and self._queue:
            entry = heapq.heappop(self._queue)
            if not self._is_queued(entry):
                continue
            job = self.jobs[entry[2]]
            server = fleet.place(job.row, sorted(open_))
            if server is None:
                passed_over.append(entry)
                if job.row.deaths:  # it is sent alone: let a server become empty for it
                    open_.discard(fleet.reserve(job.row, now_s) or ServerName(""))
                continue
            client_id = server.client_id if server.hearing else None
            self._step(job, Assigned(server.name, server.origin, client_id), now_s, u)
            if not fleet.has_room(server, now_s):
                open_.discard(server.name)
        for entry in passed_over:
            heapq.heappush(self._queue, entry)

    def _recall(self, now_s: float, u: float) -> None:
        """Fetch prompts back that wait on a server while another one could run them."""
        self._recall_s = math.inf
        fleet = self.fleet
        if len(self.servers) < 2 or not any(fleet.on_server.values()):
            return
        for server in list(self.servers.values()):
            in_need = server.leaving or bool(fleet.trouble(server.name, now_s))
            if server.up and fleet.on_server[server.name] and in_need:
                for job in self._waiting_on(server.name):
                    others = (s for s in self.servers.values() if s.name != server.name)
                    if any(self._could_run(other, job.row, now_s) for other in others):
                        self._step(job, Recalled(), now_s, u)
        if self._queued or self._more:
            return
        idle = fleet.idle(now_s)
        under_way = sum(
            is_recalled(self.jobs[j].row) for here in fleet.on_server.values() for j in here
        )
        for server in idle[under_way:]:
            behind = [
                job
                for name, here in fleet.on_server.items()
                if max(len(here), fleet.servers[name].remaining) > 1 and fleet.servers[name].up
                for job in self._waiting_on(name)
                if self._could_run(server, job.row, now_s)
            ]
            late = max(behind, key=lambda job: submission_order(job.row), default=None)
            if late is None:
                continue
            at_s = (late.row.submitted_at or now_s) + self.policy.recall_after_s
            if at_s <= now_s:
                self._step(late, Recalled(), now_s, u)
            else:
                self._recall_s = min(self._recall_s, at_s)

    def _waiting_on(self, name: ServerName) -> list[Job]:
        """Prompts there that have not started, as far as is known."""
        here = [self.jobs[job_id] for job_id in self.on_server[name]]
        return [
            job
            for job in here
            if job.row.state is State.SUBMITTED
            and job.row.started_at is None
            and not job.live.ended
        ]

    def _could_run(self, server: Server, row: Row, now_s: float) -> bool:
        said = verdicts.has_said(row, server.name, server.origin)
        return not said and self.fleet.is_usable(server, now_s)

    # --- servers ---------------------------------------------------------------------------------

    def _set(self, name: ServerName, **changes: object) -> Server:
        server = replace(self.servers[name], **changes)  # type: ignore[arg-type]  # fields by name
        self.fleet.put(server)
        return server

    def _breaker(
        self, job: Job, fact: Accepted | Rejected | NotSent | SubmitUnknown, now_s: float, u: float
    ) -> None:
        """Leave a server that turns submissions away alone for a while; no job is to blame."""
        server = self.fleet.of(job.row)
        if server is None or fact.token.attempt != job.row.attempt:
            return
        if isinstance(fact, Accepted | Rejected):
            self._set(server.name, failures=0, closed_until_s=0.0)
            return
        failures = server.failures + 1
        policy = self.policy
        delay_s = exponential_s(failures, policy.retry_first_s, policy.retry_max_s, u=u)
        if isinstance(fact, NotSent) and fact.retry_after_s is not None:
            delay_s = max(delay_s, min(fact.retry_after_s, policy.abandon_after_s))
        self._set(server.name, failures=failures, closed_until_s=now_s + delay_s)

    def _server_news(
        self,
        fact: Connected | Disconnected | StalledPublisher | QueueSeen | QueueLooked | Health,
        now_s: float,
        u: float,
    ) -> None:
        server = self.servers.get(fact.server)
        if server is None:
            self._drop("unknown_server")
            return
        here = [self.jobs[job_id] for job_id in self.on_server[fact.server]]
        match fact:
            case Connected():
                self._set(
                    fact.server,
                    client_id=fact.client_id,
                    run_average_s=None,
                    failures=0,
                    closed_until_s=0.0,
                )
                self.fleet.look_again(fact.server, now_s)
                for job in here:  # the sweep: nothing is ever replayed to a new connection
                    self._step(job, Doubted(), now_s, u)
            case Disconnected():
                if server.client_id is not None:
                    grace_s = self.policy.listen_grace_s
                    self._set(fact.server, client_id=None, listen_by_s=now_s + grace_s)
                if fact.cause not in {"deaf", "reload"}:  # so a restart looks
                    self.fleet.put(self.servers[fact.server].renewed())
                cause = "deaf" if fact.cause == "deaf" else "disconnected"
                alone = sum(not job.live.ended for job in here) == 1
                for job in here:
                    if job.live.orphan == "":
                        self._step(job, Orphaned(cause, alone), now_s, u)
            case StalledPublisher():
                self._set(fact.server, stalled=fact.stalled)
                for job in here if fact.stalled else []:
                    self._step(job, Orphaned("deaf"), now_s, u)
            case QueueSeen():
                self._set(fact.server, remaining=fact.remaining)
                for job in here if fact.remaining == 0 else []:
                    # The end signal follows this message; look only if it does not.
                    within_s = self.policy.ending_grace_s
                    self._step(job, Doubted(within_s), now_s, u)
            case QueueLooked():
                policy = self.policy
                looked = server.looked_at(fact.running, fact.pending, policy, now_s=now_s)
                self.fleet.put(looked)
            case Health():
                server = self._set(fact.server, up=fact.ok, refusal=fact.refusal)
                if not fact.ok:
                    self.fleet.put(server.at_work())  # whatever comes back is asked anew

    def _ran(self, row: Row) -> None:
        """A prompt succeeded: how long it took, and that its server is well."""
        server = self.fleet.of(row)
        if server is None or row.started_at is None or row.ended_at is None:
            return
        run_s = row.ended_at - row.started_at
        average_s = server.run_average_s
        mixed_s = run_s if average_s is None else 0.8 * average_s + 0.2 * run_s
        self.fleet.put(replace(server, run_average_s=mixed_s, strikes=()))

    def _blame(self, job: JobId, note: Note) -> None:
        """A failure that may be a server's fault, or that has turned out to be the job's."""
        if note.data["blame"] == "job":
            for server in list(self.servers.values()):
                self.fleet.put(server.cleared_of(job))
        elif (blamed := self.servers.get(ServerName(note.server or ""))) is not None:
            self.fleet.put(blamed.struck(job, card=note.data["blame"] == "card"))

    def _space(self, fact: SpaceSeen, now_s: float, u: float) -> None:
        was, self.space = self.space, fact.enough
        if fact.enough and not was:
            for job in list(self.jobs.values()):
                waits = job.live.order is None and job.live.look_s < math.inf
                if waits and job.row.state in {State.COLLECTING, State.PUBLISHING}:
                    self._step(job, Doubted(), now_s, u)

    # --- servers that come and go ----------------------------------------------------------------

    def _reconfigured(self, fact: Reconfigured, now_s: float, u: float) -> None:
        """Servers that are configured no more finish what they have; if one is down, a person
        has just said that it is gone."""
        if fact.policy != self.policy:
            self.policy = self.fleet.policy = fact.policy
            for job in list(self.jobs.values()):
                self._wake(job)
                if job.row.state is State.SUBMITTED:  # its next look was planned by other numbers
                    self._step(job, Doubted(), now_s, u)
        wanted = {server.name: server for server in fact.servers}
        for server in list(self.servers.values()):
            new = wanted.pop(server.name, None)
            if new is not None and new.origin == server.origin:
                self._set(server.name, window=new.window, leaving=False, successor=None)
                continue
            self._set(server.name, leaving=True, successor=new)
            for job in self._work_of(server) if server.up is False else []:
                self._step(job, GivenUp(), now_s, u)
        for new in wanted.values():
            self._enlist(new, now_s, u)
        self._picked = False

    def _enlist(self, server: Server, now_s: float, u: float) -> None:
        """A new server, or one that was configured before and may still have prompts of ours."""
        listen_by_s = now_s + self.policy.listen_grace_s
        rows = [job.row for job in self.jobs.values()]
        for job_id in self.fleet.add(replace(server, listen_by_s=listen_by_s), rows):
            self._step(self.jobs[job_id], Doubted(), now_s, u)
        self._pending.orders.append(Enlist(server=server.name, origin=server.origin))

    def _part(self, now_s: float, u: float) -> None:
        """Let servers go that are configured no more and have nothing of ours left."""
        for server in list(self.servers.values()):
            if not server.leaving or self._work_of(server):
                continue
            self.fleet.remove(server.name)
            self._pending.orders.append(Dismiss(server=server.name, origin=server.origin))
            if server.draining:
                self._remember(DRAINING, self._draining())
            if server.successor is not None:
                self._enlist(server.successor, now_s, u)

    def _work_of(self, server: Server) -> list[Job]:
        """Jobs that still need something of that server: their prompts, or their outputs."""
        return [
            job
            for job in self.jobs.values()
            if (job.row.server, job.row.origin) == (server.name, server.origin)
            and (job.row.state.in_flight or job.row.state is State.COLLECTING)
        ]

    # --- fences ----------------------------------------------------------------------------------

    def _fence(self, now_s: float) -> None:
        """Ask about fences on servers that answer."""
        for watch in self.fleet.due_watches(now_s):
            self.fleet.watches[watch.fence.prompt_id] = replace(watch, asked=True)
            self._pending.orders.append(FenceOrder(fence=watch.fence))

    def _fenced(self, fact: Fenced, now_s: float, u: float) -> None:
        watch = self.fleet.watches.get(fact.prompt_id)
        if watch is None or not watch.asked:
            self._drop("stale_answer")
            return
        fence = watch.fence
        if fact.record is not None and fact.record.end is End.SUCCESS:
            late = LateSuccess(job=fence.job, fence=fence, record=fact.record)
            job = self.jobs.get(fence.job)
            if job is None:
                self._pending.purposes.append(late)
            elif job.row.state is State.SUBMITTING or job.live.order is not None:
                # Its present attempt is being spoken of with a server: a moment later.
                self.fleet.watches[fact.prompt_id] = again_soon(watch, self.policy, now_s=now_s)
                return
            else:
                self._step(job, late, now_s, u)
        left = looked(watch, fact, self.policy, now_s=now_s, u=u)
        if left is not None:
            self.fleet.watches[fact.prompt_id] = left
        else:
            del self.fleet.watches[fact.prompt_id]
            self._pending.lifted.append(fact.prompt_id)

    # --- what persons ask for --------------------------------------------------------------------

    def _asked(
        self, fact: PauseAsked | DrainAsked | ResumeAsked | ForgetAsked, now_s: float, u: float
    ) -> None:
        match fact:
            case PauseAsked():
                self.paused = fact.paused
                self._remember(PAUSED, fact.paused)
            case ForgetAsked():
                for job in list(self.jobs.values()):
                    if job.row.server == fact.server and not job.row.state.final:
                        self._step(job, GivenUp(), now_s, u)
            case _ if fact.server not in self.servers:
                self._drop("unknown_server")
            case DrainAsked():
                self._set(fact.server, draining=True)
                self._remember(DRAINING, self._draining())
            case ResumeAsked():
                server = self._set(fact.server, draining=False, failures=0, closed_until_s=0.0)
                self.fleet.put(server.renewed())
                self._remember(DRAINING, self._draining())

    def _draining(self) -> list[str]:
        return sorted(server.name for server in self.servers.values() if server.draining)

    def _remember(self, name: str, value: Any) -> None:
        self._pending.settings[name] = value
        self._pending.urgent = True

    # --- hints and time --------------------------------------------------------------------------

    def _hint(self, hint: Hint, now_s: float, u: float) -> None:
        job_id = self._prompts.get(hint.prompt_id)
        job = None if job_id is None else self.jobs.get(job_id)
        if job is None or job.row.server != hint.server:
            self._drop("foreign_hint")
            return
        server = self.servers.get(hint.server)
        if server is not None and (server.wedged or server.idle_since_s is not None):
            self.fleet.put(server.at_work())
        first = job.row.started_at is None
        self._step(job, hint, now_s, u)
        if first and hint.sign is Sign.ALIVE:
            self._doubt_earlier(job.row, now_s, u)

    def _doubt_earlier(self, started: Row, now_s: float, u: float) -> None:
        """One worker a server: what was submitted before the prompt that now runs has ended."""
        assert started.server is not None
        for job_id in list(self.on_server.get(started.server, ())):
            job = self.jobs[job_id]
            earlier = job.row.state is State.SUBMITTED and not job.live.ended
            if earlier and submission_order(job.row) < submission_order(started):
                self._step(job, Doubted(), now_s, u)

    def _tick(self, now_s: float, u: float) -> None:
        due = []
        while self._due and self._due[0][0] <= now_s:
            due_s, job_id = heapq.heappop(self._due)
            if self._wakes.get(job_id) == due_s:
                del self._wakes[job_id]
                due.append(job_id)
        for job_id in due:
            job = self.jobs.get(job_id)
            if job is None:
                continue
            if wake_s(job, self.policy) <= now_s:
                self._step(job, Due(), now_s, u)
            self._wake(self.jobs[job_id])


def submission_order(row: Row) -> tuple[float, float, int]:
    """The order in which a server runs what we sent it: by its number, or by when we sent it."""
    number = math.inf if row.number is None else row.number
    submitted_s = math.inf if row.submitted_at is None else row.submitted_at
    return number, submitted_s, row.seq


def _bump(row: Row, expected: int) -> Row:
    return msgspec.structs.replace(row, version=expected + 1)


def _clamp(row: Row, now_s: float) -> Row:
    times = ("claimed_at", "submitted_at", "started_at", "ended_at", "published_at")
    late = {
        name: now_s
        for name in times
        if getattr(row, name) is not None and getattr(row, name) > now_s
    }
    return msgspec.structs.replace(row, **late) if late else row
