"""All jobs and servers at hand: routes facts to jobs, finds places for the queue, keeps deadlines.

The engine is told facts (`handle`), and once per batch asked what came of them (`take`): rows to
commit, orders to release after the commit, notes to tell. It holds the active jobs and a bounded
look-ahead of the queue; the rest of the queue lives only in the journal.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from comfyd.core import lifecycle, rules
from comfyd.core.batch import Batch, Change, Pending
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
    Forgotten,
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
    Context,
    Doubted,
    Due,
    Expired,
    GivenUp,
    Job,
    JobFact,
    NoServerLeft,
    Recalled,
    Step,
    is_stale,
    job_of,
)
from comfyd.core.lookahead import LOOK_AHEAD, LookAhead
from comfyd.core.model import End, Fence, JobId, PromptId, Row, ServerName, State
from comfyd.core.moves import noted, token_of
from comfyd.core.news import ServerNews, heed
from comfyd.core.notes import Note
from comfyd.core.orders import Dismiss, Enlist, JobOrder, Order, Restart, Summon
from comfyd.core.orders import Fence as FenceOrder
from comfyd.core.placing import assignments, recalls, submission_order
from comfyd.core.policy import Policy
from comfyd.core.server import Server
from comfyd.core.wakes import Wakes

__all__ = ["LOOK_AHEAD", "Batch", "Change", "Engine"]

# Results that wait for a server or a disk: more would only wait with them.
COLLECTING_MAX: Final = 2048

# Names under which the journal remembers what persons asked for.
PAUSED: Final = "paused"
DRAINING: Final = "draining"
RESTARTED: Final = "restarted"  # servers that we restarted, and when (UTC)


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
        self._ahead = LookAhead(self.jobs)
        self._wakes = Wakes(policy)
        self._heard_s: dict[ServerName, float] = {}  # when a prompt of ours there was heard last
        self._recall_s = math.inf  # when to think of fetching a prompt back
        self._now_s = 0.0
        self._pending = Pending()

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
        new._prompts, new._heard_s = dict(self._prompts), dict(self._heard_s)
        new._ahead, new._wakes = self._ahead.fork(new.jobs), self._wakes.fork()
        new._pending = Pending()
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
        drained, restarted = settings.get(DRAINING), settings.get(RESTARTED)
        for name in self.servers:
            draining = isinstance(drained, list) and name in drained
            self._set(name, listen_by_s=now_s + self.policy.listen_grace_s, draining=draining)
            at_s = restarted.get(name) if isinstance(restarted, dict) else None
            if isinstance(at_s, float | int):
                self._set(name, restarted_s=min(at_s, now_s))
        if isinstance(drained, list) and set(drained) - self.servers.keys():
            self._remember(DRAINING, self._draining())  # one that comes back is another
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
            case Forgotten():
                self.counts.subtract(fact.states)
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
        self._restart(now_s)
        pending, self._pending = self._pending, Pending()
        changes = []
        for job_id, expected in pending.dirty.items():
            job = self.jobs[job_id]
            row = job.row if expected is None else _bump(job.row, expected)
            self.jobs[job_id] = Job(row, job.live)
            changes.append(Change(row, expected))
        self._forget(pending.dirty)
        orders = [current for order in pending.orders if (current := self._current(order))]
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
        deadline_s = min(self._wakes.first_s(self.jobs), self._ahead.next_s)
        if self._ahead.queued:  # somebody waits for a server to be tried again
            for server in self.servers.values():
                opens_s = server.opens_s
                if self._now_s < opens_s < deadline_s:
                    deadline_s = opens_s
        if self._ahead.picky:
            deadline_s = min(deadline_s, self.fleet.hopes_end_s(self._now_s))
        for watch in self.fleet.watches.values():
            if not watch.asked and self.servers[watch.fence.server].up:
                deadline_s = min(deadline_s, watch.look_s)
        return min(deadline_s, self._recall_s, self.fleet.restart_s(self._now_s))

    def knows(self, prompt_id: PromptId) -> bool:
        """Whether *prompt_id* is the current attempt of a job at hand."""
        return prompt_id in self._prompts

    @property
    def active(self) -> int:
        """Jobs at hand that are not just waiting in the queue."""
        return len(self.jobs) - self._ahead.queued

    def sent_to(self) -> Counter[ServerName]:
        """Prompts of ours that may be on servers, by name: of those too that are configured no
        more, or at another URL now."""
        rows = (job.row for job in self.jobs.values())
        return Counter(row.server for row in rows if row.state.in_flight and row.server)

    def forgettable(self, name: ServerName) -> list[Job]:
        """Jobs at *name* that nobody answers for: it does not, or is another server by now."""
        server = self.servers.get(name)
        silent = server is None or server.up is False
        return [
            job
            for job in self.jobs.values()
            if job.row.server == name
            and not job.row.state.final
            and (silent or self.fleet.of(job.row) is None)
        ]

    def next_up(self, count: int) -> list[Row]:
        """The first *count* jobs of the queue, as far as they are in memory, best first."""
        return self._ahead.first(count, self._now_s)

    def stale(self, server: ServerName, *, now_s: float) -> int:
        """Prompts on *server* that have been silent for longer than ``stale_after``."""
        return sum(
            self.is_stale(self.jobs[job_id], now_s=now_s) for job_id in self.on_server[server]
        )

    def is_stale(self, job: Job, *, now_s: float) -> bool:
        """Whether *job* has a prompt that has been silent for longer than ``stale_after``."""
        heard_s = self._heard_s.get(job.row.server or ServerName(""), -math.inf)
        return is_stale(job, self.policy, now_s=now_s, server_heard_s=heard_s)

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
            self.fleet.answered(job.row, fact, now_s=now_s, u=u)
        self._step(job, fact, now_s, u)

    def _step(self, job: Job, fact: JobFact, now_s: float, u: float) -> None:
        judged = isinstance(fact, Accepted | Rejected | NotSent | SubmitUnknown | Fetched | Probed)
        upload = isinstance(fact, NotSent) and fact.operation == "upload"
        server = self.fleet.of(job.row)
        context = Context(
            now_s=now_s,
            u=u,
            policy=self.policy,
            elsewhere=judged and self.fleet.elsewhere(job.row, now_s),
            takes_others=judged and self.fleet.takes_others(job.row, upload=upload),
            answers=server is not None and bool(server.up),
        )
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
        raised = []
        for server, origin, prompt_id in row.abandoned[len(before.abandoned) :]:
            fence = Fence(
                prompt_id=PromptId(prompt_id),
                job=row.job,
                server=ServerName(server),
                origin=origin,
            )
            self._pending.raised.append(fence)
            self.fleet.watch(fence)
            raised.append(_about(fence, "fenced"))
        self._pending.orders += done.orders
        self._pending.notes += done.notes
        self._pending.notes += raised
        if row.started_at is not None and before.started_at is None:
            self._pending.notes.append(noted(done.job, "started"))
        self._index(old, row)
        if row.state is not before.state:
            self.counts[before.state] -= 1
            self.counts[row.state] += 1
            if before.state is State.SUBMITTING and row.state is State.SUBMITTED:
                self.fleet.took(row, now_s)
        self._wakes.keep(done.job)
        for note in done.notes:
            if note.kind == "blamed":
                self.fleet.blame(row.job, note)
            elif note.kind == "ended" and note.data["end"] == "success":
                self.fleet.succeeded(row)

    def _index(self, old: Row | None, row: Row) -> None:
        """Keep the look-ups in step with the rows in memory."""
        self._ahead.index(old, row)
        self.fleet.index(old, row)
        if old is not None and old.prompt_id is not None and old.prompt_id != row.prompt_id:
            self._prompts.pop(old.prompt_id, None)
        if row.prompt_id is not None:
            self._prompts[row.prompt_id] = row.job

    def _forget(self, committed: Iterable[JobId]) -> None:
        """Drop what is retired, and what the look-ahead has no room for; the journal has both."""
        for job_id in committed:
            row = self.jobs[job_id].row
            if self._ahead.sleeps(row, self._now_s) or row.retired or row.state is State.HELD:
                self._remove(job_id)
        for job_id in self._ahead.overflow(self._now_s):
            self._remove(job_id)

    def _remove(self, job_id: JobId) -> None:
        row = self.jobs.pop(job_id).row
        self._ahead.leave(row)
        if row.prompt_id is not None:
            self._prompts.pop(row.prompt_id, None)

    def _current(self, order: Order) -> Order | None:
        """The order with the row as committed, version and all; None if it is overtaken: by now
        that row may speak of another prompt."""
        if not isinstance(order, JobOrder):
            return order
        job = self.jobs.get(order.row.job)
        return replace(order, row=job.row) if job and token_of(job) == order.token else None

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
        self._ahead.refilled(fact)
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
                self._ahead.missed(row)

    def _overdue(self, fact: Overdue, now_s: float, u: float) -> None:
        """Queued rows whose time to start has run out."""
        self._ahead.expired(fact, now_s)
        for row in fact.rows:
            job = self._awake(row, now_s, u)
            if job.row.state is State.QUEUED:
                self._step(job, Expired(), now_s, u)

    def _place(self, now_s: float, u: float) -> None:
        """Give queued jobs places, and take from servers what others could run."""
        self.fleet.keep_fit(now_s)
        for job in self._ahead.hopeless(self.fleet, now_s):
            self._step(job, NoServerLeft(), now_s, u)
        self._recall_s = math.inf
        if self.space and self.counts[State.COLLECTING] < COLLECTING_MAX:
            for job, place in assignments(self._ahead, self.fleet, now_s):
                self._step(job, place, now_s, u)
            nobody_queued = self._ahead.exhausted
            back, self._recall_s = recalls(
                self.jobs, self.fleet, now_s, nobody_queued=nobody_queued
            )
            for job in back:
                self._step(job, Recalled(), now_s, u)
        self._pending.orders += self._ahead.reads(now_s)

    # --- servers ---------------------------------------------------------------------------------

    def _set(self, name: ServerName, **changes: object) -> Server:
        server = replace(self.servers[name], **changes)  # type: ignore[arg-type]  # fields by name
        self.fleet.put(server)
        return server

    def _server_news(self, fact: ServerNews, now_s: float, u: float) -> None:
        if fact.server not in self.servers:
            self._drop("unknown_server")
            return
        for job, told in heed(self.fleet, self.jobs, fact, now_s=now_s):
            self._step(job, told, now_s, u)

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
            self.policy = self.fleet.policy = self._wakes.policy = fact.policy
            for job in list(self.jobs.values()):
                self._wakes.keep(job)
                if job.row.state is State.SUBMITTED:  # its next look was planned by other numbers
                    self._step(job, Doubted(), now_s, u)
        wanted = {server.name: server for server in fact.servers}
        for server in list(self.servers.values()):
            new = wanted.pop(server.name, None)
            if new is not None and new.origin == server.origin:
                self._set(
                    server.name,
                    window=new.window,
                    restart_every_s=new.restart_every_s,
                    leaving=False,
                    successor=None,
                )
                continue
            self._set(server.name, leaving=True, successor=new)
            for job in self._work_of(server) if server.up is False else []:
                self._step(job, GivenUp(), now_s, u)
        for new in wanted.values():
            self._enlist(new, now_s, u)

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
            self._heard_s.pop(server.name, None)
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
            self._pending.notes.append(_about(fence, "unfenced"))

    def _restart(self, now_s: float) -> None:
        """Restart what is wedged and may be restarted; written down first, so that no crash makes
        it more often."""
        due = self.fleet.to_restart(now_s)
        for server, why in due:
            self._set(server.name, restarted_s=now_s)
            self._pending.orders.append(Restart(server=server.name, why=why))
        if due:
            at_s = {s.name: s.restarted_s for s in self.servers.values()}
            known = {name: when for name, when in at_s.items() if when > -math.inf}
            self._remember(RESTARTED, known)

    # --- what persons ask for --------------------------------------------------------------------

    def _asked(
        self, fact: PauseAsked | DrainAsked | ResumeAsked | ForgetAsked, now_s: float, u: float
    ) -> None:
        match fact:
            case PauseAsked():
                self.paused = fact.paused
                self._remember(PAUSED, fact.paused)
            case ForgetAsked():
                for job in self.forgettable(fact.server):
                    self._step(job, GivenUp(), now_s, u)
            case _ if fact.server not in self.servers:
                self._drop("unknown_server")
            case DrainAsked():
                self._set(fact.server, draining=True)
                self._remember(DRAINING, self._draining())
            case ResumeAsked():
                server = self._set(fact.server, draining=False, unfit_since_s=None)
                self.fleet.put(server.opened().renewed())
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
        self._heard_s[hint.server] = now_s
        first = job.row.started_at is None
        self._step(job, hint, now_s, u)
        if first:  # a sign of its start may have been overtaken by that of its end
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
        for job_id in self._wakes.take(now_s):
            job = self.jobs.get(job_id)
            if job is None:
                continue
            if self._wakes.is_due(job, now_s):
                self._step(job, Due(), now_s, u)
            self._wakes.keep(self.jobs[job_id])


def _about(fence: Fence, kind: Literal["fenced", "unfenced"]) -> Note:
    return Note(kind, fence.job, fence.server, prompt=fence.prompt_id)


def _bump(row: Row, expected: int) -> Row:
    return msgspec.structs.replace(row, version=expected + 1)


def _clamp(row: Row, now_s: float) -> Row:
    times = ("claimed_at", "submitted_at", "started_at", "ended_at", "published_at")
    late = {
        name: now_s
        for name in times
        if getattr(row, name) is not None and getattr(row, name) > now_s
    }
    if row.queue_by is not None and row.queue_s is not None:
        late["queue_by"] = min(row.queue_by, now_s + row.queue_s)
    return msgspec.structs.replace(row, **late) if late else row
