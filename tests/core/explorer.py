"""Every order of events, exhaustively: jobs, servers, a store, and a crash possible at every point.

The world is small (two jobs, two servers, a few faults) but whole: real engine, a store with
compare-and-set, servers with queue, history and events, files that are staged, renamed, taken away.
A step of the world is one thing happening anywhere. Whatever is reachable is visited; in each state
the rules must hold, and from each one a state in which every job is delivered must be reachable.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from comfyd.core import engine as engines
from comfyd.core import facts, orders
from comfyd.core.facts import Presence, Sign
from comfyd.core.model import End, JobId, Record, Row, ServerName, Staged, State, prompt_id_of
from comfyd.core.policy import Policy

POLICY = Policy(
    completion_attempts=2, completion_backoff_s=1, audit_interval_s=3, stale_after_s=3,
    orphan_interval_s=1, lost_grace_s=2, abandon_after_s=4, ending_grace_s=1, listen_grace_s=1,
    stop_retry_s=1, stop_grace_s=3, retry_first_s=1, retry_max_s=2,
)  # fmt: skip
LOCAL = (orders.Collect, orders.Publish, orders.Retire)
RECORDS = {end: Record(end=end) for end in End}
FINISHED = frozenset({State.DONE, State.FAILED, State.CANCELLED})


@dataclass
class Sim:
    """A ComfyUI: everything in memory, one worker, events only to the client id of the prompt."""

    pending: tuple[str, ...] = ()
    running: str | None = None
    history: tuple[tuple[str, End], ...] = ()
    client: str | None = None  # the connected client id
    deaf: bool = False
    clients: tuple[tuple[str, str], ...] = ()  # prompt -> the client id it was sent with

    def presence(self, pid: str) -> Presence:
        if pid == self.running:
            return Presence.RUNNING
        return Presence.PENDING if pid in self.pending else Presence.ABSENT


@dataclass
class World:
    names: tuple[str, ...]
    sims: dict[str, Sim]
    budget: dict[str, int]
    faults: int
    store: dict[str, Row] = field(default_factory=dict)
    engine: engines.Engine | None = None
    work: list[tuple[str, orders.JobOrder, object]] = field(default_factory=list)  # phase, order, data
    wire: list[facts.Hint] = field(default_factory=list)
    echo: list[facts.Answer] = field(default_factory=list)  # answers that may come a second time
    ghosts: list[tuple[str, str, str]] = field(default_factory=list)  # POSTs on their way: server, pid, client
    claimed: frozenset[str] = frozenset()
    stage: frozenset[str] = frozenset()
    there: frozenset[str] = frozenset()  # in done/ or failed/ now
    delivered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    runs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    now_s: float = 100.0

    def fork(self) -> World:
        new = copy.copy(self)
        new.sims = {n: copy.copy(s) for n, s in self.sims.items()}
        new.budget, new.store = dict(self.budget), dict(self.store)
        new.work, new.wire = list(self.work), list(self.wire)
        new.echo, new.ghosts = list(self.echo), list(self.ghosts)
        new.delivered, new.runs = copy.copy(self.delivered), copy.copy(self.runs)
        if self.engine is not None:
            e = new.engine = copy.copy(self.engine)
            e.jobs, e.servers, e.counts = dict(e.jobs), dict(e.servers), copy.copy(e.counts)
            e.on_server = {n: dict(j) for n, j in e.on_server.items()}
            e._prompts, e._queue, e._due = dict(e._prompts), list(e._queue), list(e._due)
            e._pending = engines._Pending()
        return new

    # --- the daemon ------------------------------------------------------------------------------

    def start(self) -> None:
        """A daemon starts: what it knows is what the store holds."""
        servers = [engines.Server(name=ServerName(n), origin=n, window=1) for n in self.sims]
        counts = defaultdict(int)
        for row in self.store.values():
            counts[row.state] += 1
        self.engine = engines.Engine(servers, POLICY, counts)
        active = [r for r in self.store.values() if r.state not in (State.QUEUED, State.HELD)]
        self.engine.load([r for r in active if not r.retired], crashed=True, now_s=self.now_s, u=0)
        for name in self.sims:
            self.tell(facts.Health(server=ServerName(name), ok=True), commit=False)
            self.connect(name, commit=False)
        self.commit()

    def connect(self, name: str, *, commit: bool = True) -> None:
        self.sims[name].client = f"{name}{self.faults}"
        self.tell(facts.Connected(server=ServerName(name), client_id=f"{name}{self.faults}"), commit=commit)

    def tell(self, fact: facts.Fact, *, commit: bool = True) -> None:
        assert self.engine is not None
        self.engine.handle(fact, now_s=self.now_s, u=0)
        if commit:
            self.commit()

    def commit(self) -> None:
        """What the dispatcher does: commit, then release."""
        assert self.engine is not None
        while True:
            batch = self.engine.take(now_s=self.now_s, u=0)
            for change in batch.changes:
                old = self.store.get(change.row.job)
                assert (old.version if old else None) == change.expected, "compare-and-set"
                self.store[change.row.job] = change.row
            self.work += [("do", o, None) for o in batch.orders if not isinstance(o, orders.Refill)]
            if not any(isinstance(o, orders.Refill) for o in batch.orders):
                return
            queued = [r for r in self.store.values() if r.state is State.QUEUED]
            due = tuple(sorted((r for r in queued if r.not_before <= self.now_s), key=lambda r: r.seq))
            later = min((r.not_before for r in queued if r.not_before > self.now_s), default=None)
            self.engine.handle(facts.Candidates(rows=due, next_due_s=later), now_s=self.now_s, u=0)

    def crash(self) -> None:
        for phase, order, _ in self.work:
            if phase == "do" and isinstance(order, orders.Submit):
                self.ghosts.append((str(order.row.server), str(order.row.prompt_id), str(order.row.client_id)))
        self.engine, self.work, self.wire, self.echo = None, [], [], []
        for sim in self.sims.values():
            sim.client, sim.deaf = None, False

    # --- the servers -----------------------------------------------------------------------------

    def emit(self, name: str, pid: str, sign: Sign) -> None:
        sim = self.sims[name]
        if sim.client is not None and not sim.deaf and dict(sim.clients).get(pid) == sim.client:
            self.wire.append(facts.Hint(server=ServerName(name), prompt_id=pid, sign=sign))

    def enqueue(self, name: str, pid: str, client: str) -> None:
        sim = self.sims[name]
        sim.pending, sim.clients = (*sim.pending, pid), (*sim.clients, (pid, client))

    # --- one thing happens -----------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[str, World]]:
        def go(label: str, act, cost: str | None = None) -> Iterator[tuple[str, World]]:
            if cost is not None and (self.faults == 0 or not self.budget.get(cost)):
                return
            new = self.fork()
            if cost is not None:
                new.faults, new.budget[cost] = new.faults - 1, new.budget[cost] - 1
            act(new)
            yield label, new

        if self.engine is None:
            yield from go("start", World.start)
        else:
            for name in self.names:
                if name in self.claimed and name not in self.store:
                    row = Row(job=JobId(name), seq=self.names.index(name), max_attempts=2, claimed_at=1.0)
                    yield from go(f"claim {name}", lambda w, r=row: w.tell(facts.Claimed(row=r)))
            # What happens in our own folders touches nothing else: no need to interleave it with more
            # than a crash and a consumer.
            local = [i for i, (_, o, _) in enumerate(self.work) if isinstance(o, LOCAL)][:1]
            for i, (phase, order, data) in enumerate(self.work):
                if local and i not in local:
                    continue
                for label, act, cost in _work(phase, order, data):
                    yield from go(f"{label} {order.row.job}", lambda w, i=i, a=act: a(w, w.work.pop(i)), cost)
            for name in sorted(self.there):
                yield from go(f"take {name}", lambda w, n=name: setattr(w, "there", w.there - {n}))
            yield from go("crash", World.crash, "crash")
            if local:
                return
            for i, hint in enumerate(self.wire):
                yield from go(f"hear {hint.sign.value}", lambda w, i=i: w.tell(w.wire.pop(i)))
            for i in range(len(self.echo)):
                yield from go("echo", lambda w, i=i: w.tell(w.echo.pop(i)), "echo")
            deadline_s = self.engine.next_deadline_s()
            if deadline_s < float("inf"):
                yield from go("tick", lambda w: w.tick(deadline_s))
            for name in self.names:
                if name in self.store:
                    yield from go(f"cancel {name}", lambda w, n=name: w.tell(facts.CancelAsked(job=JobId(n))), "cancel")
        for name, sim in self.sims.items():
            if sim.running is None and sim.pending:
                yield from go(f"{name} starts", lambda w, n=name: _starts(w, n))
            for end in (End.SUCCESS, End.ERROR) if sim.running else ():
                cost = None if end is End.SUCCESS else "error"
                yield from go(f"{name} ends {end.value}", lambda w, n=name, e=end: _ends(w, n, e), cost)
            yield from go(f"{name} restarts", lambda w, n=name: _restarts(w, n), "restart")
            if sim.client is not None:
                yield from go(f"{name} deaf", lambda w, n=name: setattr(w.sims[n], "deaf", True), "deaf")
            if sim.pending:
                yield from go(f"{name} drops", lambda w, n=name: setattr(w.sims[n], "pending", w.sims[n].pending[1:]), "drop")
            if sim.history:
                yield from go(f"{name} evicts", lambda w, n=name: setattr(w.sims[n], "history", ()), "evict")
        for i in range(len(self.ghosts)):
            yield from go("ghost", lambda w, i=i: w.enqueue(*w.ghosts.pop(i)))

    def tick(self, deadline_s: float) -> None:
        if deadline_s - self.now_s >= POLICY.lost_grace_s:
            self.ghosts = []  # a request is on its way for less than the grace, or never arrives
        self.now_s = max(self.now_s, deadline_s)
        self.tell(facts.Tick())

    # --- judged ----------------------------------------------------------------------------------

    def finished(self) -> bool:
        return all(
            n in self.store and self.store[n].state in FINISHED and n not in self.claimed for n in self.names
        )

    def check(self) -> None:
        for name, count in self.delivered.items():
            assert count <= 1, f"{name} delivered {count} times"
        for pid, count in self.runs.items():
            assert count <= 1, f"{pid} ran {count} times"
        for name in self.names:
            row = self.store.get(name)
            if name not in self.claimed:
                assert row is not None and row.state in FINISHED, f"claimed file of {name} is gone"
            if row is not None and row.state in FINISHED:
                assert self.delivered[name] == 1, f"{name} is final, delivered {self.delivered[name]}"

    def key(self) -> tuple[object, ...]:
        def ago(t: float | None, far_s: float = 0.0) -> float | None:
            """A time as the rules see it: how far off, and no further back than they look."""
            return None if t is None else max(t - self.now_s, -far_s)

        def row(r: Row) -> tuple[object, ...]:
            return (
                r.state, r.attempt, r.charged, r.dropped, r.crashes, r.server, r.client_id, ago(r.submitted_at, 3),
                ago(r.not_before), r.started_at is None, r.why and r.why.reason, r.outcome and r.outcome.reason,
                r.retired, len(r.abandoned), r.record and r.record.end, r.completion,
            )  # fmt: skip

        memory: tuple[object, ...] = ()
        e = self.engine
        if e is not None:
            memory = tuple(
                (n, row(j.row), j.live.order, j.live.want, j.live.look, ago(j.live.look_s), ago(j.live.since_s, 3) if j.row.state is State.STOPPING else None,
                 j.live.ended, min(j.live.tries, 3), ago(j.live.absent_s, 2), ago(j.live.unsure_s, 4), j.live.refused,
                 j.live.orphan, j.live.recovered)
                for n, j in sorted(e.jobs.items())
            ) + tuple((s.client_id, s.failures, ago(s.closed_until_s), ago(s.listen_by_s), s.death_charged)
                      for s in e.servers.values()) + (ago(e._next_delayed_s), e._more)  # fmt: skip

        def token(t: facts.Token) -> tuple[object, ...]:
            job = e.jobs.get(t.job) if e else None
            return (t.job, t.attempt, job and min(job.live.seq - t.seq, 2))

        return (
            memory, tuple((n, row(r)) for n, r in sorted(self.store.items())),
            tuple(sorted((p, type(o).__name__, token(o.token), str(d)) for p, o, d in self.work)),
            tuple(sorted((h.prompt_id, h.sign.value) for h in self.wire)),
            tuple(sorted((type(a).__name__, token(a.token)) for a in self.echo)), tuple(sorted(self.ghosts)),
            tuple((s.pending, s.running, s.history, s.client, s.deaf) for s in self.sims.values()),
            self.claimed, self.stage, self.there, tuple(sorted(self.delivered.items())), self.faults,
        )  # fmt: skip


def _starts(w: World, name: str) -> None:
    sim = w.sims[name]
    sim.running, sim.pending = sim.pending[0], sim.pending[1:]
    w.runs[sim.running] += 1
    w.emit(name, sim.running, Sign.ALIVE)


def _ends(w: World, name: str, end: End) -> None:
    sim = w.sims[name]
    pid, sim.running = sim.running, None
    sim.history = (*sim.history, (pid, end))
    w.emit(name, pid, Sign.ENDED)


def _restarts(w: World, name: str) -> None:
    w.sims[name] = Sim()
    w.wire = [h for h in w.wire if h.server != name]
    if w.engine is not None:
        w.tell(facts.Disconnected(server=ServerName(name), cause="closed"))
        w.connect(name)


def _work(phase: str, order: orders.JobOrder, data: object):
    """How an order goes on from here: (label, act(world, work item), cost)."""

    def then(next_phase: str):
        def act(w: World, item) -> None:
            result = EFFECT[type(order)](w, order, phase, data)
            w.work.append((next_phase, order, result))

        return act

    def answer(fact: facts.Answer):
        def act(w: World, item) -> None:
            w.tell(fact)
            if w.budget.get("echo") and w.faults:
                w.echo = [fact]

        return act

    t = order.token
    match order, phase:
        case orders.Submit(), "do":
            yield "post", then("answer"), None
            yield "refused", answer(facts.NotSent(token=t, reason="refused")), "loss"
        case orders.Submit(), "answer":
            yield "accepted", answer(facts.Accepted(token=t)), None
            yield "partial", answer(facts.Accepted(token=t, node_errors={"9": {}})), "partial"
            yield "post lost", answer(facts.SubmitUnknown(token=t, reason="timeout")), "loss"
        case (orders.Probe() | orders.Stop()), "do":
            yield "queue", then("history"), None
            yield "unknown", answer(facts.Probed(token=t, presence=Presence.UNKNOWN)), "loss"
        case (orders.Probe() | orders.Stop()), "history":
            def act(w: World, item) -> None:
                ends = dict(w.sims[str(order.row.server)].history)
                end = ends.get(order.row.prompt_id)
                found = Presence.FINISHED if end else data
                w.tell(facts.Probed(token=t, presence=found, record=RECORDS[end] if end else None))
            yield "probed", act, None
        case orders.Fetch(), "do":
            def act(w: World, item) -> None:
                end = dict(w.sims[str(order.row.server)].history).get(order.row.prompt_id)
                result = facts.FetchResult.FOUND if end else facts.FetchResult.EMPTY
                answer(facts.Fetched(token=t, result=result, record=RECORDS[end] if end else None))(w, item)
            yield "fetched", act, None
            yield "fetch lost", answer(facts.Fetched(token=t, result=facts.FetchResult.ERROR)), "loss"
        case orders.Collect(), "do":
            yield "stage", then("answer"), None
            yield "missing", answer(facts.CollectFailed(token=t, cause=facts.Uncollected.MISSING, message="")), "missing"
        case orders.Collect(), "answer":
            yield "collected", answer(facts.Collected(token=t, staged=Staged(manifest_sha256="x"))), None
        case orders.Publish(), "do":
            yield "rename", then("answer"), None
        case orders.Publish(), "answer":
            yield "published", answer(facts.Published(token=t)), None
        case orders.Retire(), "do":
            yield "unlink", then("answer"), None
        case orders.Retire(), "answer":
            yield "retired", answer(facts.Retired(token=t)), None


def _post(w: World, order: orders.JobOrder, phase: str, data: object) -> None:
    row, held = w.store[order.row.job], order.row
    assert (row.state, row.prompt_id) == (State.SUBMITTING, held.prompt_id), "POST without a committed intent"
    given_up = {pid for _, _, pid in row.abandoned}
    for n in range(1, row.attempt):
        older = prompt_id_of(row.job, n)
        live = any(s.presence(older) is not Presence.ABSENT for s in w.sims.values())
        assert not live or older in given_up, f"attempt {row.attempt} while {n} is on a server"
    w.enqueue(str(held.server), str(held.prompt_id), str(held.client_id))


def _queue(w: World, order: orders.JobOrder, phase: str, data: object) -> Presence:
    sim, pid = w.sims[str(order.row.server)], str(order.row.prompt_id)
    if isinstance(order, orders.Stop):
        sim.pending = tuple(p for p in sim.pending if p != pid)
        if sim.running == pid:
            _ends(w, str(order.row.server), End.INTERRUPTED)
    return sim.presence(pid)


def _stage(w: World, order: orders.JobOrder, phase: str, data: object) -> None:
    assert order.row.job in w.claimed, "collecting without its claimed file"
    w.stage |= {order.row.job}


def _rename(w: World, order: orders.JobOrder, phase: str, data: object) -> None:
    name = order.row.job
    assert w.store[name].state is State.PUBLISHING, "rename without its commit"
    if name in w.stage:  # else a consumer took it already: done before
        w.stage, w.there = w.stage - {name}, w.there | {name}
        w.delivered[name] += 1


def _unlink(w: World, order: orders.JobOrder, phase: str, data: object) -> None:
    assert w.store[order.row.job].state in FINISHED, "retired before the end"
    w.claimed -= {order.row.job}


EFFECT = {orders.Submit: _post, orders.Probe: _queue, orders.Stop: _queue, orders.Collect: _stage,
          orders.Publish: _rename, orders.Retire: _unlink}  # fmt: skip


def explore(names: tuple[str, ...], servers: tuple[str, ...], budget: dict[str, int], faults: int) -> int:
    """Visit everything reachable; raise with the trace of the first state that breaks a rule.

    Returns:
      How many states were visited.

    """
    first = World(names, {s: Sim() for s in servers}, budget, faults, claimed=frozenset(names))
    seen: dict[tuple[object, ...], int] = {first.key(): 0}
    came: list[tuple[int, str]] = [(-1, "")]
    back: list[list[int]] = [[]]
    goals, todo = [], [(0, first)]

    def trace(i: int) -> str:
        labels = []
        while i > 0:
            labels.append(came[i][1])
            i = came[i][0]
        return " > ".join(reversed(labels))

    while todo:
        at, world = todo.pop()
        if world.finished():
            goals.append(at)
        moves = world.moves()
        while True:
            try:
                label, new = next(moves)
                new.check()
            except StopIteration:
                break
            except Exception as error:
                raise AssertionError(f"{error!r} after: {trace(at)} > ?") from error
            key = new.key()
            if key not in seen:
                seen[key] = len(came)
                came.append((at, label))
                back.append([])
                todo.append((seen[key], new))
            back[seen[key]].append(at)
    alive, rest = set(goals), list(goals)
    while rest:
        for before in back[rest.pop()]:
            if before not in alive:
                alive.add(before)
                rest.append(before)
    stuck = next((i for i in range(len(came)) if i not in alive), None)
    assert stuck is None, f"{len(came) - len(alive)} states never finish, e.g. after: {trace(stuck)}"
    return len(came)
