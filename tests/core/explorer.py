"""Every order of events, exhaustively: jobs, servers, a store, and a crash possible at every point.

The world is small but whole: the real engine, a store with compare-and-set, servers with queue,
history and events, files that are staged, renamed and taken away. Whatever is reachable with a few
faults is visited. In each state the rules must hold, and from each a state in which every job is
delivered must be reachable.
"""

# ruff: noqa: B023 -- a move is made before the next one is thought of
# mypy: disable-error-code="func-returns-value, exhaustive-match"

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from comfyd.core import engine as engines
from comfyd.core import facts, orders
from comfyd.core.facts import FetchResult, Presence, Sign
from comfyd.core.model import (
    End,
    Fence,
    JobId,
    PromptId,
    Record,
    Row,
    ServerName,
    Staged,
    State,
    Timeouts,
    prompt_id_of,
)
from comfyd.core.policy import Policy
from comfyd.core.server import Server

POLICY = Policy(
    completion_attempts=2, completion_backoff_s=1, audit_interval_s=3, stale_after_s=3,
    orphan_interval_s=1, lost_grace_s=2, abandon_after_s=4, ending_grace_s=1, listen_grace_s=1,
    stop_retry_s=1, stop_grace_s=3, retry_first_s=1, retry_max_s=2, wedge_after_s=2,
    turned_away_max_s=2, recall_after_s=2, sick_after=1, run_timeout_s=math.inf,
    stall_timeout_s=math.inf,
)  # fmt: skip
# What happens in our own folders touches nothing else: no need to interleave it with more than a
# crash and a consumer.
GHOST_S = 2.0  # a server takes up the POST of a client that is gone within this, or never
LOCAL = (orders.Collect, orders.Publish, orders.Retire)
Act = Callable[["World"], object]
Item = tuple[str, Any, Any]  # an order under way: its phase, itself, what /queue said


@dataclass(frozen=True)
class Sim:
    """A ComfyUI: all in memory, one worker, events only to the client id of the prompt."""

    pending: tuple[tuple[str, str], ...] = ()  # (prompt id, client id)
    running: tuple[str, str] | None = None
    history: tuple[tuple[str, End], ...] = ()
    client: str | None = None
    deaf: bool = False
    hung: bool = False  # it answers nothing and runs nothing, and remembers all of it
    off: bool = False  # no process is there: its address refuses, its memory is gone
    dead: bool = False  # its worker is: it takes prompts and runs none
    mean: bool = False  # it hands out no outputs

    def presence(self, pid: str) -> Presence:
        if self.running is not None and self.running[0] == pid:
            return Presence.RUNNING
        return Presence.PENDING if pid in dict(self.pending) else Presence.ABSENT


@dataclass(frozen=True)
class Scene:
    """How a world begins.

    Attributes:
      window: Prompts of ours that each server may hold.
      down: Servers that come up later.
      busy: Servers where somebody else's prompt runs; for ever, if it is *endless*.
      queue_s, run_s, stall_s: The jobs' deadlines, if they have any.
      restart_every_s: How often a wedged server may be restarted; where prompts wait, a dead one
        then never revives by itself.

    """

    window: int = 1
    down: str = ""
    busy: str = ""
    endless: bool = False
    queue_s: float | None = None
    run_s: float | None = None
    stall_s: float | None = None
    restart_every_s: float | None = None


PLAIN = Scene()


class World:
    def __init__(
        self, jobs: str, servers: str, budget: dict[str, int], faults: int, scene: Scene
    ) -> None:
        self.names, self.budget, self.faults, self.now_s = tuple(jobs), budget, faults, 100.0
        self.scene = scene
        foreign = dict.fromkeys(scene.busy, ("foreign", "x"))
        self.sims = {n: Sim(hung=n in scene.down, running=foreign.get(n)) for n in servers}
        self.engine: engines.Engine | None = None
        self.configured = tuple(servers)  # in the file: a crash changes nothing about it
        self.store: dict[str, Row] = {}
        self.fences: dict[str, Fence] = {}
        self.settings: dict[str, Any] = {}
        self.work: tuple[Item, ...] = ()
        self.wire: tuple[facts.Hint, ...] = ()
        self.echo: tuple[facts.Answer, ...] = ()  # may come a second time
        self.ghosts: tuple[tuple[Row, float], ...] = ()  # POSTs of a dead daemon, until when
        self.claimed, self.stage, self.there = frozenset(jobs), frozenset[str](), frozenset[str]()
        self.delivered, self.runs = Counter[str](), Counter[str]()
        self.restarted: dict[str, float] = {}
        self.forgotten = frozenset[str]()  # by retention: over, and taken away
        self.short = frozenset[str]()  # prompts of which a server accepted only a part

    def fork(self) -> World:
        new = copy.copy(self)
        for name in ("sims", "budget", "store", "fences", "settings", "delivered", "runs"):
            setattr(new, name, copy.copy(getattr(self, name)))
        new.restarted = dict(self.restarted)
        new.engine = self.engine and self.engine.fork()
        return new

    # --- the daemon ------------------------------------------------------------------------------

    def start(self) -> None:
        self.engine = self.loaded(crashed=True)
        for name in self.configured:
            self.meet(name)
        self.tell(facts.Tick())

    def loaded(self, *, crashed: bool) -> engines.Engine:
        """An engine that knows what the journal does."""
        counts = Counter(r.state for r in self.store.values())
        engine = engines.Engine(self.fleet(), POLICY, counts)
        idle = {State.QUEUED, State.HELD}
        rows = [r for r in self.store.values() if r.state not in idle and not r.retired]
        fences = tuple(self.fences.values())
        engine.load(
            rows, crashed=crashed, now_s=self.now_s, u=0, fences=fences, settings=self.settings
        )
        return engine

    def fleet(self) -> tuple[Server, ...]:
        window, every_s = self.scene.window, self.scene.restart_every_s
        return tuple(
            Server(name=ServerName(n), origin=n, window=window, restart_every_s=every_s)
            for n in self.configured
        )

    def reload(self, *servers: str) -> None:
        self.configured = servers
        self.tell(facts.Reconfigured(servers=self.fleet(), policy=POLICY))

    def knows(self, name: str) -> bool:
        return self.engine is not None and ServerName(name) in self.engine.servers

    def meet(self, name: str) -> None:
        assert self.engine is not None
        hung = self.sims[name].hung
        health = facts.Health(server=ServerName(name), ok=not hung)
        self.engine.handle(health, now_s=self.now_s, u=0)
        if not hung:
            self.connect(name)

    def leave(self, name: str) -> None:
        """The link is closed: nothing is heard any more, and no answer comes from its prober."""
        self.put(name, client=None)
        self.wire = tuple(hint for hint in self.wire if hint.server != name)
        asked = (orders.Probe, orders.Stop, orders.Fence)
        self.work = tuple(
            item for item in self.work if not (isinstance(item[1], asked) and of(item[1]) == name)
        )

    def connect(self, name: str) -> None:
        client = f"{name}{self.faults}"
        self.sims[name] = replace(self.sims[name], client=client, deaf=False)
        self.tell(facts.Connected(server=ServerName(name), client_id=client))
        self.count(name)

    def count(self, name: str) -> None:
        sim = self.sims[name]
        remaining = len(sim.pending) + (sim.running is not None)
        if remaining > 1:  # what an empty queue suggests is found by other ways too
            self.tell(facts.QueueSeen(server=ServerName(name), remaining=remaining))

    def tell(self, fact: facts.Fact) -> None:
        """What the dispatcher does: handle, commit, then release."""
        assert self.engine is not None
        self.engine.handle(fact, now_s=self.now_s, u=0)
        self.settle()

    def settle(self) -> None:
        assert self.engine is not None
        batch = self.engine.take(now_s=self.now_s, u=0)
        for change in batch.changes:
            old = self.store.get(change.row.job)
            assert (old.version if old else None) == change.expected, "compare-and-set"
            self.store[change.row.job] = change.row
        states = Counter(row.state for row in self.store.values())
        assert +self.engine.counts == states, "counted wrong"
        self.fences |= {fence.prompt_id: fence for fence in batch.raised}
        for prompt_id in batch.lifted:
            del self.fences[prompt_id]
        self.settings |= dict(batch.settings)
        beside = (orders.Read, orders.Enlist, orders.Dismiss)
        given = [order for order in batch.orders if not isinstance(order, beside)]
        fenced = {fence.server for fence in self.fences.values()}
        sent = {order.row.server for order in given if isinstance(order, orders.Submit)}
        assert not sent & fenced, "POST to a server with an attempt that may still run"
        for order in batch.orders:
            if isinstance(order, orders.Dismiss):
                self.leave(order.server)
        self.work += tuple(("do", order, None) for order in given)
        reads = [order for order in batch.orders if isinstance(order, orders.Read)]
        for order in reads:
            self.engine.handle(self.read(order), now_s=self.now_s, u=0)
        if reads:
            self.settle()
        for order in batch.orders:
            if isinstance(order, orders.Enlist):
                self.meet(order.server)

    def read(self, order: orders.Read) -> facts.Fact:
        queued = [r for r in self.store.values() if r.state is State.QUEUED]
        match order:
            case orders.Refill(shelf=shelf):
                later = [r.not_before for r in queued if r.not_before > self.now_s]
                due = [r for r in queued if r.not_before <= self.now_s and r.shelf is shelf]
                rows = tuple(sorted(due, key=lambda r: r.seq))
                next_due_s = min(later, default=None)
                return facts.Candidates(rows=rows, shelf=shelf, next_due_s=next_due_s)
            case orders.Expire():
                by = {r.job: r.queue_by for r in queued if r.queue_by is not None}
                late = tuple(r for r in queued if by.get(r.job, math.inf) <= self.now_s)
                after = [at for at in by.values() if at > self.now_s]
                return facts.Overdue(rows=late, next_s=min(after, default=None))
            case orders.Summon():
                wanted = {purpose.job for purpose in order.purposes}
                rows = tuple(self.store[job] for job in wanted if job in self.store)
                return facts.Summoned(rows=rows, purposes=order.purposes)

    def answer(self, fact: facts.Answer | facts.Fenced) -> None:
        self.tell(fact)
        repeats = self.budget.get("echo") and self.faults
        self.echo = (fact,) if repeats and not isinstance(fact, facts.Fenced) else ()

    def crash(self) -> None:
        posts = [o.row for at, o, _ in self.work if at == "do" and isinstance(o, orders.Submit)]
        self.ghosts += tuple((row, self.now_s + GHOST_S) for row in posts)
        self.engine, self.work, self.wire, self.echo = None, (), (), ()
        self.sims = {n: replace(s, client=None, deaf=False) for n, s in self.sims.items()}

    def tick(self, deadline_s: float) -> None:
        self.now_s = max(self.now_s, deadline_s)
        self.ghosts = tuple(ghost for ghost in self.ghosts if ghost[1] > self.now_s)
        self.tell(facts.Tick())

    # --- the servers and the folders -------------------------------------------------------------

    def put(self, name: str, **changes: Any) -> None:
        self.sims[name] = replace(self.sims[name], **changes)

    def enqueue(self, row: Row) -> None:
        post = (str(row.prompt_id), str(row.client_id))
        self.put(str(row.server), pending=(*self.sims[str(row.server)].pending, post))

    def emit(self, name: str, prompt: tuple[Any, str], sign: Sign) -> None:
        if self.sims[name].client == prompt[1] and not self.sims[name].deaf:
            self.wire += (facts.Hint(server=ServerName(name), prompt_id=prompt[0], sign=sign),)

    def begin(self, name: str) -> None:
        first, *rest = self.sims[name].pending
        self.runs[first[0]] += 1
        self.emit(name, first, Sign.ALIVE)
        self.put(name, running=first, pending=tuple(rest))

    def end(self, name: str, end: End) -> None:
        prompt = self.sims[name].running
        assert prompt is not None
        self.emit(name, prompt, Sign.ENDED)
        self.put(name, running=None, history=(*self.sims[name].history, (prompt[0], end)))

    def hang(self, name: str) -> None:
        self.put(name, hung=True, client=None)
        self.wire = tuple(hint for hint in self.wire if hint.server != name)
        if not self.knows(name):
            return
        self.tell(facts.Disconnected(server=ServerName(name), cause="ping_timeout"))
        self.tell(facts.Health(server=ServerName(name), ok=False))

    def switch_off(self, name: str) -> None:
        self.hang(name)
        self.sims[name] = Sim(hung=True, off=True)
        self.ghosts = tuple(ghost for ghost in self.ghosts if ghost[0].server != name)

    def wake(self, name: str) -> None:
        self.put(name, hung=False, off=False)
        until_s = self.now_s + GHOST_S
        self.ghosts = tuple((r, until_s if r.server == name else s) for r, s in self.ghosts)
        if self.knows(name):
            self.tell(facts.Health(server=ServerName(name), ok=True))
            self.connect(name)

    def restart(self, name: str) -> None:
        self.sims[name] = Sim()
        self.wire = tuple(hint for hint in self.wire if hint.server != name)
        if self.knows(name):
            self.tell(facts.Disconnected(server=ServerName(name), cause="closed"))
            self.connect(name)

    def obey(self, name: str) -> None:
        """The unit is restarted, as ordered."""
        self.restarted[name] = self.now_s
        self.restart(name)

    def post(self, row: Row) -> None:
        now = self.store[row.job]
        intended = now.state is State.SUBMITTING and now.prompt_id == row.prompt_id
        assert intended, "POST without a committed intent"
        for older in (prompt_id_of(row.job, n) for n in range(1, row.attempt)):
            gone = all(s.presence(older) is Presence.ABSENT for s in self.sims.values())
            assert gone or any(older in up for up in now.abandoned), "an older attempt is alive"
        self.enqueue(row)

    def seen(self, row: Row | Fence, *, stop: bool = False, interrupt: bool = True) -> Presence:
        name, pid = str(row.server), str(row.prompt_id)
        if stop:
            self.put(name, pending=tuple(p for p in self.sims[name].pending if p[0] != pid))
            if self.sims[name].presence(pid) is Presence.RUNNING and interrupt:
                self.end(name, End.INTERRUPTED)
        return self.sims[name].presence(pid)

    def forget(self, name: str) -> None:
        """Retention: the row of a job that is over, and whose result is gone, goes."""
        row = self.store.pop(name)
        self.forgotten |= {name}
        self.tell(facts.Forgotten(states=(row.state,)))

    def rename(self, job: str) -> None:
        assert self.store[job].state is State.PUBLISHING, "rename without its commit"
        if job in self.stage:  # else it was published before, and a consumer may have it
            self.stage, self.there = self.stage - {job}, self.there | {job}
            self.delivered[job] += 1

    def unlink(self, job: str) -> None:
        assert self.store[job].state.final, "retired before the end"
        self.claimed -= {job}

    # --- what may happen next: a name, what it does, the fault it costs --------------------------
    # fmt: off

    def moves(self) -> Iterator[tuple[str, Act, str | None]]:
        for name in sorted(self.shown()):
            yield f"take {name}", lambda w: setattr(w, "there", w.there - {name}), None
        if self.engine is None:
            yield "start", lambda w: w.start(), None
        else:
            yield "crash", lambda w: w.crash(), "crash"
            local = [item for item in self.work if isinstance(item[1], LOCAL)][:1]
            for item in local or self.work:
                rest = tuple(other for other in self.work if other is not item)
                if isinstance(item[1], orders.Restart):
                    name = item[1].server
                    at_s = self.restarted.get(name, -math.inf)
                    again_s = at_s + (self.scene.restart_every_s or math.inf)
                    assert self.now_s >= again_s or at_s == -math.inf, "restarted too often"
                    done = lambda w: (setattr(w, "work", rest), w.obey(name))  # noqa: E731
                    yield f"restart {name}", done, None
                    continue
                about = item[1].fence if isinstance(item[1], orders.Fence) else item[1].row
                sim = Sim() if about.server is None else self.sims[about.server]
                silent = sim.hung or (about.server is not None and not self.knows(about.server))
                goes = refused if sim.off else into_the_void if silent else carry_out
                keeps = sim.mean and isinstance(item[1], orders.Collect)
                goes = into_the_void if keeps else goes
                for label, act, cost in goes(*item):
                    label = f"{label} {about.job}"
                    yield label, lambda w: (setattr(w, "work", rest), act(w)), cost
            if local:
                return
            for seq, name in enumerate(self.names):
                scene, late_s = self.scene, self.scene.queue_s
                row = Row(
                    job=JobId(name), seq=seq, max_attempts=2, claimed_at=1.0, queue_s=late_s,
                    queue_by=None if late_s is None else self.now_s + late_s,
                    timeouts=Timeouts(run_s=scene.run_s, stall_s=scene.stall_s),
                )
                known = len(self.store) + len(self.forgotten)
                if name in self.forgotten:
                    asked = facts.CancelAsked(job=row.job)
                    yield f"cancel {name}", lambda w: w.tell(asked), "cancel"
                elif name not in self.store and known == seq:  # in their order
                    yield f"claim {name}", lambda w: w.tell(facts.Claimed(row=row)), None
                elif name in self.store:
                    asked = facts.CancelAsked(job=row.job)
                    yield f"cancel {name}", lambda w: w.tell(asked), "cancel"
                    hold = facts.HoldAsked(job=row.job, reason="asked")
                    yield f"hold {name}", lambda w: w.tell(hold), "hold"
                    if self.store[name].retired and name not in self.fenced():
                        yield f"forget {name}", lambda w: w.forget(name), "retention"
                    if self.store[name].state is State.HELD:
                        release = facts.ReleaseAsked(job=row.job)
                        yield f"release {name}", lambda w: w.tell(release), None
            for hint in self.wire:
                unheard = tuple(other for other in self.wire if other is not hint)
                yield "hear", lambda w: (setattr(w, "wire", unheard), w.tell(hint)), None
            for fact in self.echo:
                yield "echo", lambda w: (setattr(w, "echo", ()), w.tell(fact)), "echo"
            deadline_s = self.engine.next_deadline_s()
            # A restart ends before its server may be restarted again (services/unit.py).
            restarting = any(isinstance(item[1], orders.Restart) for item in self.work)
            if deadline_s < float("inf") and not restarting:
                yield "tick", lambda w: w.tick(deadline_s), None
            if self.engine.space:
                yield "full", lambda w: w.tell(facts.SpaceSeen(enough=False)), "full"
            else:
                yield "space", lambda w: w.tell(facts.SpaceSeen(enough=True)), None
            for name in self.sims:
                others = tuple(other for other in self.configured if other != name)
                if name not in self.configured:
                    yield f"add {name}", lambda w: w.reload(*w.configured, name), None
                elif others:
                    yield f"remove {name}", lambda w: w.reload(*others), "remove"
            for name, sim in self.sims.items():
                if not self.knows(name):
                    continue
                if sim.dead and sim.pending:
                    looked = facts.QueueLooked(
                        server=ServerName(name), running=0, pending=len(sim.pending)
                    )
                    yield f"look at {name}", lambda w: w.tell(looked), None
                forget = facts.ForgetAsked(server=ServerName(name))
                if sim.hung:
                    yield f"forget {name}", lambda w: w.tell(forget), "forget"
                else:
                    yield f"{name} hangs", lambda w: w.hang(name), "hang"
                    yield f"{name} goes off", lambda w: w.switch_off(name), "off"
                    drain = facts.DrainAsked(server=ServerName(name))
                    yield f"drain {name}", lambda w: w.tell(drain), "drain"
                if self.engine.servers[ServerName(name)].draining:
                    resume = facts.ResumeAsked(server=ServerName(name))
                    yield f"resume {name}", lambda w: w.tell(resume), None
        for name, sim in self.sims.items():
            if sim.hung:
                yield f"{name} wakes", lambda w: w.wake(name), None
                continue
            restarted = self.scene.restart_every_s is not None and self.engine is not None
            if sim.dead and sim.pending and sim.running is None and restarted:
                continue  # that is for us to find out and to mend
            if sim.dead:
                yield f"{name} revives", lambda w: w.restart(name), None
                continue
            yield f"{name} dies", lambda w: w.put(name, dead=True), "zombie"
            if sim.running is None and sim.pending:
                yield f"{name} begins", lambda w: w.begin(name), None
            if sim.running is not None and not (self.scene.endless and sim.running[1] == "x"):
                yield f"{name} ends", lambda w: w.end(name, End.SUCCESS), None
                yield f"{name} fails", lambda w: w.end(name, End.ERROR), "error"
            yield f"{name} restarts", lambda w: w.restart(name), "restart"
            if sim.mean:
                yield f"{name} gives", lambda w: w.put(name, mean=False), None
            else:
                yield f"{name} keeps", lambda w: w.put(name, mean=True), "mean"
            if sim.client is not None:
                yield f"{name} deaf", lambda w: w.put(name, deaf=True), "deaf"
            if sim.pending:
                yield f"{name} drops", lambda w: w.put(name, pending=sim.pending[1:]), "drop"
            if sim.history:
                yield f"{name} evicts", lambda w: w.put(name, history=()), "evict"
        for i, (row, _) in enumerate(self.ghosts):
            if self.sims[str(row.server)].hung:
                continue
            left = self.ghosts[:i] + self.ghosts[i + 1:]
            yield "ghost", lambda w: (setattr(w, "ghosts", left), w.enqueue(row)), None

    # --- judging it ------------------------------------------------------------------------------

    def shown(self) -> frozenset[str]:
        """What a consumer may take while it still matters: until the publication is committed."""
        rows = {name: self.store[name] for name in self.there if name in self.store}
        return frozenset(name for name in rows if rows[name].state is State.PUBLISHING)

    def fenced(self) -> set[str]:
        return {fence.job for fence in self.fences.values()}

    def finished(self) -> bool:
        return not self.claimed and all(map(self.over, self.names))

    def over(self, name: str) -> bool:
        return name in self.forgotten or (name in self.store and self.store[name].state.final)

    def check(self) -> None:
        for name in self.names:
            final = self.over(name)
            assert name not in self.forgotten or name not in self.store, f"{name} came back"
            assert self.delivered[name] <= 1, f"{name} was delivered twice"
            assert final or name in self.claimed, f"the claimed file of {name} is gone"
            assert self.delivered[name] or not final, f"{name} is final but not delivered"
            row = self.store.get(name)
            short = row is not None and row.state is State.DONE and row.prompt_id in self.short
            assert not short, f"{name} is done without some of its outputs"
        assert all(count <= 1 for count in self.runs.values()), "a prompt ran twice"

    def key(self) -> tuple[object, ...]:
        """The state as the rules see it: times by how far off they are, and no further back."""
        def off(at_s: float | None, far_s: float = 0.0) -> float | None:
            return None if at_s is None else max(at_s - self.now_s, -far_s)

        def row(r: Row) -> tuple[object, ...]:
            began = r.started_at is None if self.scene.run_s is None else off(r.started_at, 5)
            return (r.state, r.attempt, r.charged, r.dropped, r.deaths, r.crashes, r.server,
                    r.client_id, r.prompt_id, off(r.submitted_at, 3), off(r.not_before), began,
                    r.retired, len(r.abandoned), r.why and (r.why.state, r.why.reason),
                    r.outcome and r.outcome.reason, r.record and r.record.end, off(r.queue_by),
                    tuple((v.server, v.outcome.reason) for v in r.verdicts),
                    min(r.unconfirmed, 2), bool(r.record and r.record.unrun),
                    r.prompt_id in self.short,
                    r.let_down and (r.let_down.server, min(r.let_down.times, 2), others(r)))

        def others(r: Row) -> tuple[str, ...]:
            """Servers that took another job since this one was let down."""
            servers = self.engine.servers.values() if self.engine else ()
            since_s = r.let_down.since_s if r.let_down else math.inf
            return tuple(s.name for s in servers if s.accepted_s > since_s)

        def token(o: Any) -> tuple[object, ...]:
            if isinstance(o, orders.Fence):
                return (o.fence.prompt_id,)
            if isinstance(o, orders.Restart):
                return (o.server,)
            t: facts.Token = o.token
            job = self.engine and self.engine.jobs.get(t.job)
            return (t.job, t.attempt, job and min(job.live.seq - t.seq, 2))

        memory = [
            (name, row(job.row), v.order, v.want, v.look, off(v.look_s), v.ended, v.refused,
             off(v.absent_s, 2), off(v.unsure_s, 4), v.orphan, v.recovered, min(v.tries, 3),
             off(v.since_s, 3) if job.row.state is State.STOPPING else None, v.alone, v.stalling,
             v.unheard is None, v.its_fault, off(v.away_s, 4),
             None if self.scene.stall_s is None else off(v.heard_s, 5))
            for name, job in sorted(self.engine.jobs.items() if self.engine else ())
            for v in [job.live]]
        servers = [
            (s.client_id, s.failures, off(s.closed_until_s), off(s.listen_by_s), s.up, s.draining,
             s.wedged, off(s.idle_since_s, 2), off(s.unfit_since_s, 4), s.strikes, s.leaving,
             off(s.restart_s) if s.restart_every_s is not None else None)
            for s in (self.engine.servers.values() if self.engine else ())]
        queued = [r for r in self.store.values() if r.state is State.QUEUED]
        in_turn = sorted((max(r.claimed_at, r.not_before), r.seq) for r in queued)
        turns = tuple(seq for _, seq in in_turn) if any(s[1] for s in servers) else ()
        watches = [
            (w.fence.prompt_id, w.asked, off(w.look_s), off(w.absent_s, 2), off(w.alive_s, 1),
             min(w.tries, 2))
            for w in (self.engine.fleet.watches.values() if self.engine else ())]
        work = sorted((at, type(o).__name__, token(o), str(q)) for at, o, q in self.work)
        return (tuple(memory), tuple(servers), turns, tuple(watches), tuple(work), self.faults,
                tuple(self.sims.values()), self.engine and self.engine.space, tuple(self.fences),
                str({name: value for name, value in self.settings.items() if name != "restarted"}),
                tuple((name, off(at_s, self.scene.restart_every_s or 0.0)) for times in
                      (self.settings.get("restarted", {}), self.restarted)
                      for name, at_s in sorted(times.items())),
                self.configured, tuple(self.engine.fleet.dormant) if self.engine else (),
                tuple((name, row(r)) for name, r in sorted(self.store.items())),
                tuple((g.prompt_id, off(until_s)) for g, until_s in self.ghosts),
                frozenset((h.prompt_id, h.sign) for h in self.wire), self.claimed, self.stage,
                self.forgotten, self.short,
                tuple((type(a), token(a)) for a in self.echo), self.shown(),
                tuple(sorted(self.delivered.items())))


def of(order: orders.JobOrder | orders.Fence) -> str:
    """The server that an order is about, or ""."""
    about = order.fence if isinstance(order, orders.Fence) else order.row
    return about.server or ""


def into_the_void(at: str, order: Any, queue: Any) -> Iterator[tuple[str, Act, str | None]]:
    """What comes of an order for a server that does not answer."""
    match order:
        case orders.Fence():
            fenced = facts.Fenced(prompt_id=order.fence.prompt_id, presence=Presence.UNKNOWN)
            yield "no answer", lambda w: w.answer(fenced), None
        case orders.Submit():
            sent = order.row if at == "do" else None

            def unheard(w: World) -> None:
                if sent is not None:  # it may be taken up when the server goes on
                    w.ghosts += ((sent, math.inf),)
                w.answer(facts.SubmitUnknown(token=order.token, reason="timeout"))

            yield "unheard", unheard, None
        case orders.Probe() | orders.Stop():
            probed = facts.Probed(token=order.token, presence=Presence.UNKNOWN)
            yield "no answer", lambda w: w.answer(probed), None
        case orders.Fetch():
            error = facts.Fetched(token=order.token, result=FetchResult.ERROR)
            yield "no answer", lambda w: w.answer(error), None
        case orders.Collect() if at == "do" and order.row.record is not None:
            failed = facts.CollectFailed(
                token=order.token, cause=facts.Uncollected.SERVER, message=""
            )
            yield "no answer", lambda w: w.answer(failed), None
        case _:
            yield from carry_out(at, order, queue)


def refused(at: str, order: Any, queue: Any) -> Iterator[tuple[str, Act, str | None]]:
    """What comes of an order for a server whose address refuses connections."""
    match order:
        case orders.Submit() if at == "do":
            not_sent = facts.NotSent(token=order.token, reason="refused")
            yield "refused", lambda w: w.answer(not_sent), None
        case orders.Submit():
            unknown = facts.SubmitUnknown(token=order.token, reason="closed")
            yield "unheard", lambda w: w.answer(unknown), None
        case orders.Probe() | orders.Stop():
            probed = facts.Probed(token=order.token, presence=Presence.REFUSED)
            yield "refused", lambda w: w.answer(probed), None
        case orders.Fence():
            fenced = facts.Fenced(prompt_id=order.fence.prompt_id, presence=Presence.REFUSED)
            yield "refused", lambda w: w.answer(fenced), None
        case _:
            yield from into_the_void(at, order, queue)


def carry_out(at: str, order: Any, queue: Any) -> Iterator[tuple[str, Act, str | None]]:
    """How an order goes on: what it does to the world, its answer, or its answer lost."""
    fence = order.fence if isinstance(order, orders.Fence) else None
    row: Any = order.row if fence is None else fence
    t: Any = order.token if fence is None else None

    def then(act: Act) -> Act:
        return lambda w: setattr(w, "work", (*w.work, ("answer", order, act(w))))

    def says(fact: facts.Answer) -> Act:
        return lambda w: w.answer(fact)

    def looks(w: World) -> None:
        end = dict(w.sims[row.server].history).get(row.prompt_id)
        short = end is End.SUCCESS and row.prompt_id in w.short
        record = Record(end=end, unrun=("9",) if short else ()) if end else None
        if fence is not None:
            presence = Presence.FINISHED if end else queue
            fenced = facts.Fenced(
                prompt_id=PromptId(row.prompt_id), presence=presence, record=record
            )
            w.answer(fenced)
        elif isinstance(order, orders.Fetch):
            result = FetchResult.FOUND if end else FetchResult.EMPTY
            w.answer(facts.Fetched(token=t, result=result, record=record))
        else:
            w.answer(
                facts.Probed(token=t, presence=Presence.FINISHED if end else queue, record=record)
            )

    match order, at:
        case orders.Submit(), "do":
            yield "post", then(lambda w: w.post(row)), None
            yield "refused", says(facts.NotSent(token=t, reason="refused")), "loss"
            yield "rejected", says(facts.Rejected(token=t, message="no such node")), "reject"
            away = facts.NotSent(token=t, reason="status", reached=True, status=500)
            yield "turned away", says(away), "away"
            nonsense = facts.SubmitUnknown(token=t, reason="status", status=500)
            yield "turned away perhaps", says(nonsense), "away"
        case orders.Submit(), _:
            accepted = facts.Accepted(token=t)
            yield "accepted", lambda w: (w.count(row.server), w.answer(accepted)), None
            part, lost = (
                facts.Accepted(token=t, node_errors={"9": {}}),
                facts.SubmitUnknown(token=t, reason="timeout"),
            )

            def shortly(w: World, fact: facts.Answer) -> None:
                w.short |= {row.prompt_id}
                w.answer(fact)

            yield "partial", lambda w: shortly(w, part), "partial"
            yield "partial unheard", lambda w: shortly(w, lost), "partial"
            yield "unheard", says(facts.SubmitUnknown(token=t, reason="timeout")), "loss"
        case orders.Fence(), "do":
            yield "fence", then(lambda w: w.seen(row, stop=True)), None
            yield "stubborn", then(lambda w: w.seen(row)), "stubborn"
        case orders.Stop(), "do":
            yield "stop", then(lambda w: w.seen(row, stop=True, interrupt=order.interrupt)), None
            yield "stubborn", then(lambda w: w.seen(row)), "stubborn"
            yield "unknown", says(facts.Probed(token=t, presence=Presence.UNKNOWN)), "loss"
        case orders.Probe(), "do":
            yield "queue", then(lambda w: w.seen(row)), None
            yield "unknown", says(facts.Probed(token=t, presence=Presence.UNKNOWN)), "loss"
        case ((orders.Probe() | orders.Stop() | orders.Fence()), _):
            yield "history", looks, None
        case orders.Fetch(), _:
            yield "fetch", looks, None
            yield "no fetch", says(facts.Fetched(token=t, result=FetchResult.ERROR)), "loss"
        case orders.Collect(), "do":
            yield "stage", then(lambda w: setattr(w, "stage", w.stage | {row.job})), None
            yield (
                "missing",
                says(facts.CollectFailed(token=t, cause=facts.Uncollected.MISSING, message="")),
                "missing",
            )
            full = facts.CollectFailed(token=t, cause=facts.Uncollected.DISK, message="")
            yield "no space", says(full), "disk"
        case orders.Collect(), _:
            yield "staged", says(facts.Collected(token=t, staged=Staged(manifest_sha256="x"))), None
        case orders.Publish(), "do":
            yield "rename", then(lambda w: w.rename(row.job)), None
            yield "no room", says(facts.PublishDelayed(token=t, message="")), "disk"
            in_the_way = facts.PublishConflict(token=t, message="")
            # Only what is not published yet can be in conflict: its stage is still there.
            again = facts.Published(token=t)
            yield (
                "conflict",
                lambda w: w.answer(in_the_way if row.job in w.stage else again),
                "conflict",
            )
        case orders.Publish(), _:
            yield "published", says(facts.Published(token=t)), None
        case orders.Retire(), "do":
            yield "unlink", then(lambda w: w.unlink(row.job)), None
        case orders.Retire(), _:
            yield "retired", says(facts.Retired(token=t)), None
    # fmt: on


def explore(
    jobs: str, servers: str, faults: dict[str, int], most: int, scene: Scene = PLAIN
) -> int:
    """Visit all that is reachable; fail with the trace to the first state that breaks a rule.

    Args:
      jobs, servers: One letter each.
      faults: How often each may happen; *most* of them in all.
      scene: How it begins.

    Returns:
      How many different states were visited.

    """
    first = World(jobs, servers, faults, most, scene)
    known, came, before = {first.key(): 0}, [(-1, "")], [[-1]]
    goals, todo = [], [(0, first)]

    def trace(at: int) -> str:
        return "" if at <= 0 else f"{trace(came[at][0])} > {came[at][1]}"

    while todo:
        at, world = todo.pop()
        if world.finished():
            goals.append(at)
        for label, act, cost in world.moves():
            if cost is not None and not (world.faults and world.budget.get(cost)):
                continue
            new = world.fork()
            if cost is not None:
                new.faults, new.budget[cost] = new.faults - 1, new.budget[cost] - 1
            try:
                act(new)
                new.check()
            except Exception as error:
                raise AssertionError(f"{error!r} after {trace(at)} > {label}") from error
            number = known.setdefault(new.key(), len(came))
            if number == len(came):
                came.append((at, label))
                before.append([])
                todo.append((number, new))
            before[number].append(at)
    ending, rest = set(goals), list(goals)
    while rest:
        fresh = {at for at in before[rest.pop()] if at >= 0} - ending
        ending |= fresh
        rest += fresh
    stuck = [at for at in range(len(came)) if at not in ending]
    assert not stuck, f"{len(stuck)} states never finish, the first after {trace(stuck[0])}"
    return len(came)
