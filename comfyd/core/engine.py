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

import msgspec

from comfyd.core import lifecycle, rules
from comfyd.core.facts import (
    Accepted,
    Answer,
    Candidates,
    Claimed,
    Connected,
    Disconnected,
    DrainAsked,
    Fact,
    ForgetAsked,
    Health,
    Hint,
    NotSent,
    PauseAsked,
    Probed,
    QueueSeen,
    Rejected,
    ResumeAsked,
    Sign,
    StalledPublisher,
    SubmitUnknown,
    Summoned,
    Tick,
    Wish,
)
from comfyd.core.job import (
    Assigned,
    Context,
    Doubted,
    Due,
    Job,
    JobFact,
    Orphaned,
    Step,
    is_stale,
    job_of,
)
from comfyd.core.model import JobId, PromptId, Row, ServerName, State
from comfyd.core.moves import noted, requeue
from comfyd.core.notes import Note
from comfyd.core.orders import Order, Refill, Summon
from comfyd.core.policy import Policy, exponential_s, window
from comfyd.core.server import Server
from comfyd.core.submitted import given_up

# Enough to keep 16 servers with full windows busy for two rounds between reads of the journal.
LOOK_AHEAD = 512


@dataclass(frozen=True, slots=True)
class Change:
    """One row to commit. *expected* is the version it replaces, or None for a new row."""

    row: Row
    expected: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What came of a batch of facts. Commit *changes* and the story of *notes*, then the rest.

    *urgent* is False when nothing waits for the commit: the changes may ride with a later one.
    """

    changes: tuple[Change, ...] = ()
    orders: tuple[Order, ...] = ()
    notes: tuple[Note, ...] = ()
    urgent: bool = False


@dataclass
class _Pending:
    """What `handle` gathered since the last `take`."""

    dirty: dict[JobId, int | None] = field(default_factory=dict)  # job -> committed version
    orders: list[Order] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    urgent: bool = False


class Engine:
    """See the module. Not thread-safe; owned by the dispatcher.

    Args:
      servers: Every configured server.
      policy: The numbers to decide by.
      counts: Jobs by state in the journal at start.

    """

    def __init__(
        self, servers: Iterable[Server], policy: Policy, counts: Mapping[State, int]
    ) -> None:
        self.policy = policy
        self.servers = {server.name: server for server in servers}
        self.jobs: dict[JobId, Job] = {}
        self.counts: Counter[State] = Counter(counts)
        self.on_server: dict[ServerName, dict[JobId, None]] = {n: {} for n in self.servers}
        self._prompts: dict[PromptId, JobId] = {}
        self._queue: list[tuple[int, int, JobId]] = []  # a heap; entries may be outdated
        self._queued = 0  # queued jobs in memory
        self._due: list[tuple[float, JobId]] = []  # a heap; entries may be outdated
        self._more = True  # the journal may hold due rows that are not in memory
        self._next_delayed_s = math.inf  # when the first delayed row in the journal comes due
        self._now_s = 0.0
        self._refilling = False
        self._pending = _Pending()
        self.paused = False

    def fork(self) -> Engine:
        """An independent copy, for exploring what else could happen; nothing may be pending."""
        new = copy.copy(self)
        new.servers, new.jobs, new.counts = dict(self.servers), dict(self.jobs), self.counts.copy()
        new.on_server = {name: dict(jobs) for name, jobs in self.on_server.items()}
        new._prompts, new._queue, new._due = dict(self._prompts), self._queue[:], self._due[:]
        new._pending = _Pending()
        return new

    # --- what the dispatcher calls ---------------------------------------------------------------

    def load(self, rows: Iterable[Row], *, crashed: bool, now_s: float, u: float) -> None:
        """Take up what the journal holds as active, with its at-load orders. Times in the future
        (the wall clock was set back) become now, so that no deadline is longer than configured."""
        for name in self.servers:
            self._set(name, listen_by_s=now_s + self.policy.listen_grace_s)
        for row in rows:
            clamped = _clamp(row, now_s)
            context = Context(now_s=now_s, u=u, policy=self.policy)
            self._apply(row, lifecycle.load(clamped, context, crashed=crashed), now_s)

    def handle(self, fact: Fact, *, now_s: float, u: float) -> None:
        """Apply one fact. Raises ProtocolViolation for one that cannot be."""
        match fact:
            case Hint():
                self._hint(fact, now_s, u)
            case Claimed():
                self._claimed(fact.row, now_s, u)
            case Candidates():
                self._candidates(fact, now_s, u)
            case Tick():
                self._tick(now_s, u)
            case PauseAsked():
                self.paused = fact.paused
                self._pending.urgent = True
            case DrainAsked() | ResumeAsked() | ForgetAsked():
                self._server_wish(fact, now_s, u)
            case Summoned():
                self._summoned(fact, now_s, u)
            case Connected() | Disconnected() | StalledPublisher() | QueueSeen() | Health():
                self._server_news(fact, now_s, u)
            case _:
                self._job_fact(fact, now_s, u)

    def take(self, *, now_s: float, u: float) -> Batch:
        """Find places for the queue, then hand over everything since the last call."""
        self._now_s = now_s
        self._assign(now_s, u)
        pending, self._pending = self._pending, _Pending()
        changes = []
        for job_id, expected in pending.dirty.items():
            job = self.jobs[job_id]
            row = job.row if expected is None else _bump(job.row, expected)
            self.jobs[job_id] = Job(row, job.live)
            changes.append(Change(row, expected))
        self._forget(pending.dirty)
        orders = [self._current(order) for order in pending.orders]
        return Batch(tuple(changes), tuple(orders), tuple(pending.notes), pending.urgent)

    def next_deadline_s(self) -> float:
        """When the next Tick is due; inf if never."""
        while self._due:
            due_s, job_id = self._due[0]
            job = self.jobs.get(job_id)
            if job is not None and job.live.look_s == due_s:
                break
            heapq.heappop(self._due)
        deadline_s = self._due[0][0] if self._due else math.inf
        if self._queued:  # somebody waits for a server to be tried again
            for server in self.servers.values():
                opens_s = server.opens_s
                if self._now_s < opens_s < deadline_s:
                    deadline_s = opens_s
        return min(deadline_s, self._next_delayed_s)

    def knows(self, prompt_id: PromptId) -> bool:
        """Whether *prompt_id* is the current attempt of a job at hand."""
        return prompt_id in self._prompts

    @property
    def active(self) -> int:
        """Jobs at hand that are not just waiting in the queue."""
        return len(self.jobs) - self._queued

    def stale(self, server: ServerName, *, now_s: float) -> int:
        """Prompts on *server* that have been silent for longer than ``stale_after``."""
        return sum(
            is_stale(self.jobs[job_id], self.policy, now_s=now_s)
            for job_id in self.on_server[server]
        )

    # --- jobs ------------------------------------------------------------------------------------

    def _job_fact(self, fact: JobFact, now_s: float, u: float) -> None:
        job_id = job_of(fact)
        job = None if job_id is None else self.jobs.get(job_id)
        if job is None:
            if isinstance(fact, Answer):
                self._drop("stale_answer")
            elif isinstance(fact, Wish):
                self._pending.orders.append(Summon(wishes=(fact,)))
            else:
                self._drop("unknown_job")
            return
        if isinstance(fact, Accepted | Rejected | NotSent | SubmitUnknown):
            self._breaker(job, fact, now_s, u)
        culprit = isinstance(fact, Probed) and self._is_culprit(job)
        self._step(job, fact, now_s, u, culprit=culprit)

    def _step(
        self, job: Job, fact: JobFact, now_s: float, u: float, *, culprit: bool = False
    ) -> None:
        context = Context(now_s=now_s, u=u, policy=self.policy, culprit=culprit)
        self._apply(job.row, lifecycle.step(job, fact, context), now_s)

    def _apply(self, before: Row, done: Step, now_s: float) -> None:
        """Keep what a step made: the only place where a job in memory changes."""
        rules.check(before, done.job)
        row, live = done.job.row, done.job.live
        known = self.jobs.get(row.job)
        old = None if known is None else known.row
        self.jobs[row.job] = done.job
        if row != before:
            self._pending.dirty.setdefault(row.job, before.version)
            self._pending.urgent |= done.urgent
        self._pending.orders += done.orders
        self._pending.notes += done.notes
        self._index(old, row)
        if row.state is not before.state:
            self.counts[before.state] -= 1
            self.counts[row.state] += 1
        if live.look_s < math.inf:
            heapq.heappush(self._due, (live.look_s, row.job))
        for note in done.notes:
            if note.kind == "lost":
                self._lost(note)
            elif note.kind == "ended" and row.server is not None:
                self._ran(row.server, row)

    def _index(self, old: Row | None, row: Row) -> None:
        """Keep the look-ups in step with the rows in memory."""
        if old is not None and old.state is State.QUEUED:
            self._queued -= 1
        if row.state is State.QUEUED:
            self._queued += 1
            if old is None or old.state is not State.QUEUED:
                heapq.heappush(self._queue, (-row.priority, row.seq, row.job))
        if old is not None and old.server is not None and old.state.in_flight:
            self.on_server.get(old.server, {}).pop(row.job, None)
        if row.server is not None and row.state.in_flight:
            self.on_server.setdefault(row.server, {})[row.job] = None
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
        if row.state is State.QUEUED:
            self._queued -= 1
        if row.prompt_id is not None:
            self._prompts.pop(row.prompt_id, None)

    def _current(self, order: Order) -> Order:
        """The order with the row as committed, version and all."""
        if isinstance(order, Refill | Summon):
            return order
        job = self.jobs.get(order.row.job)
        return order if job is None else replace(order, row=job.row)

    def _drop(self, reason: str) -> None:
        self._pending.notes.append(Note("dropped", None, None, {"reason": reason}, story=False))

    # --- intake and the queue --------------------------------------------------------------------

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
        self._pending.notes.append(
            Note("claimed", row.job, None, {"payload": row.payload, "invalid": invalid})
        )
        if row.retry_of is not None:
            self._pending.notes.append(Note("retried", row.retry_of, None, {"new": row.job}))

    def _candidates(self, fact: Candidates, now_s: float, u: float) -> None:
        self._refilling = False
        self._more = len(fact.rows) >= LOOK_AHEAD
        self._next_delayed_s = math.inf if fact.next_due_s is None else fact.next_due_s
        for row in fact.rows:
            if row.job not in self.jobs:
                context = Context(now_s=now_s, u=u, policy=self.policy)
                self._apply(row, lifecycle.load(_clamp(row, now_s), context, crashed=False), now_s)

    def _assign(self, now_s: float, u: float) -> None:
        """Give queued jobs, best first, to the least loaded servers with room."""
        while self._queued and (server := self._free_server(now_s)) is not None:
            if not self._queue:
                break
            entry = heapq.heappop(self._queue)
            if self._is_queued(entry):
                assigned = Assigned(
                    server.name, server.origin, server.client_id if server.hearing else None
                )
                self._step(self.jobs[entry[2]], assigned, now_s, u)
        if now_s >= self._next_delayed_s:
            self._more, self._next_delayed_s = True, math.inf
        if self._more and self._queued < LOOK_AHEAD // 2 and not self._refilling:
            self._refilling = True
            self._pending.orders.append(Refill(count=LOOK_AHEAD))

    def _free_server(self, now_s: float) -> Server | None:
        best: tuple[float, Server] | None = None
        for server in self.servers.values():
            ours = len(self.on_server[server.name])
            # Others' prompts count, but never keep us out for good: one of ours may always wait.
            theirs = server.remaining if server.hearing and ours else 0
            room = window(server.window, server.run_average_s)
            load = max(ours, theirs)
            usable = server.up and not server.refusal and now_s >= server.opens_s
            usable = usable and not server.draining and not server.wedged
            if usable and load < room:
                share = max(ours, server.remaining) / room
                if best is None or share < best[0]:
                    best = share, server
        return None if best is None else best[1]

    def _summoned(self, fact: Summoned, now_s: float, u: float) -> None:
        for row in fact.rows:
            if row.job not in self.jobs and not row.state.final:
                context = Context(now_s=now_s, u=u, policy=self.policy)
                self._apply(row, lifecycle.load(_clamp(row, now_s), context, crashed=False), now_s)
        for wish in fact.wishes:
            job = self.jobs.get(wish.job)
            if job is None:
                self._drop("unknown_job")
                continue
            self._step(job, wish, now_s, u)
            if wish.job not in self._pending.dirty and job.row.state is State.HELD:
                self._remove(wish.job)

    # --- servers ---------------------------------------------------------------------------------

    def trouble(self, name: ServerName) -> str:
        """Why this server gets nothing more by itself, as a sentence; "" if it does."""
        return self.servers[name].wedged

    def _server_wish(
        self, fact: DrainAsked | ResumeAsked | ForgetAsked, now_s: float, u: float
    ) -> None:
        if isinstance(fact, ForgetAsked):
            for job_id in list(self.on_server.get(fact.server, {})):
                job = self.jobs[job_id]
                context = Context(now_s=now_s, u=u, policy=self.policy)
                lost = noted(job, "lost", cause="abandoned", charged=False)
                done = requeue(job, context, lost, abandoned=given_up(job.row))
                self._apply(job.row, done, now_s)
        elif fact.server in self.servers:
            draining = isinstance(fact, DrainAsked)
            self._set(fact.server, draining=draining, wedged="")

    def _set(self, name: ServerName, **changes: object) -> Server:
        server = replace(self.servers[name], **changes)  # type: ignore[arg-type]  # fields by name
        self.servers[name] = server
        return server

    def _breaker(
        self, job: Job, fact: Accepted | Rejected | NotSent | SubmitUnknown, now_s: float, u: float
    ) -> None:
        """Leave a server that turns submissions away alone for a while; no job is to blame."""
        row = job.row
        if row.server not in self.servers or fact.token.attempt != row.attempt:
            return
        if isinstance(fact, Accepted | Rejected):
            self._set(row.server, failures=0, closed_until_s=0.0)
            if isinstance(fact, Accepted):
                self._set(row.server, death_charged=False)
            return
        failures = self.servers[row.server].failures + 1
        policy = self.policy
        delay_s = exponential_s(failures, policy.retry_first_s, policy.retry_max_s, u=u)
        if isinstance(fact, NotSent) and fact.retry_after_s is not None:
            delay_s = max(delay_s, min(fact.retry_after_s, policy.abandon_after_s))
        self._set(row.server, failures=failures, closed_until_s=now_s + delay_s)

    def _server_news(
        self,
        fact: Connected | Disconnected | StalledPublisher | QueueSeen | Health,
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
                for job in here:  # the sweep: nothing is ever replayed to a new connection
                    self._step(job, Doubted(), now_s, u)
            case Disconnected():
                if server.client_id is not None:
                    grace_s = self.policy.listen_grace_s
                    self._set(fact.server, client_id=None, listen_by_s=now_s + grace_s)
                cause = "deaf" if fact.cause == "deaf" else "disconnected"
                for job in here:
                    if job.live.orphan == "":
                        self._step(job, Orphaned(cause), now_s, u)
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
            case Health():
                self._set(fact.server, up=fact.ok, refusal=fact.refusal)

    def _ran(self, name: ServerName, row: Row) -> None:
        if row.started_at is None or row.ended_at is None or name not in self.servers:
            return
        run_s = row.ended_at - row.started_at
        average_s = self.servers[name].run_average_s
        mixed_s = run_s if average_s is None else 0.8 * average_s + 0.2 * run_s
        self._set(name, run_average_s=mixed_s)

    def _is_culprit(self, job: Job) -> bool:
        """Whether *job* is to blame if its server lost its memory and nobody was seen running."""
        name = job.row.server
        if name not in self.servers or self.servers[name].death_charged:
            return False
        here = [self.jobs[job_id].row for job_id in self.on_server[name]]
        if any(row.started_at is not None for row in here):
            return False
        oldest = min(here, key=_submission_order, default=None)
        return oldest is not None and oldest.job == job.row.job

    def _lost(self, note: Note) -> None:
        name = ServerName(note.server or "")
        if name in self.servers and note.data["cause"] == "restart" and note.data["charged"]:
            self._set(name, death_charged=True)

    # --- hints and time --------------------------------------------------------------------------

    def _hint(self, hint: Hint, now_s: float, u: float) -> None:
        job_id = self._prompts.get(hint.prompt_id)
        job = None if job_id is None else self.jobs.get(job_id)
        if job is None or job.row.server != hint.server:
            self._drop("foreign_hint")
            return
        first = job.row.started_at is None
        self._step(job, hint, now_s, u)
        if first and hint.sign is Sign.ALIVE:
            self._doubt_earlier(job.row, now_s, u)

    def _doubt_earlier(self, started: Row, now_s: float, u: float) -> None:
        """One worker a server: what was submitted before the prompt that now runs has ended."""
        assert started.server is not None
        for job_id in list(self.on_server[started.server]):
            job = self.jobs[job_id]
            earlier = job.row.state is State.SUBMITTED and not job.live.ended
            if earlier and _submission_order(job.row) < _submission_order(started):
                self._step(job, Doubted(), now_s, u)

    def _tick(self, now_s: float, u: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            due_s, job_id = heapq.heappop(self._due)
            job = self.jobs.get(job_id)
            if job is not None and job.live.look_s == due_s:
                self._step(job, Due(), now_s, u)


def _submission_order(row: Row) -> tuple[float, float, int]:
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
