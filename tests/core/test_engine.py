"""The engine: who runs next and where, what it remembers, and when it wants to be woken."""

from __future__ import annotations

import math
from collections import Counter

import msgspec
import pytest

from comfyd.core import facts, model, orders
from comfyd.core.engine import LOOK_AHEAD, Batch, Engine
from comfyd.core.facts import Hint, Presence, Sign, Token
from comfyd.core.job import Ask
from comfyd.core.lookahead import OTHERS_AHEAD
from comfyd.core.model import (
    JobId,
    LetDown,
    Outcome,
    PromptId,
    Record,
    Row,
    ServerName,
    Shelf,
    Staged,
    State,
    prompt_id_of,
)
from comfyd.core.notes import Note
from comfyd.core.policy import Policy
from comfyd.core.server import Server

POLICY = Policy()
A, B, C = ServerName("a"), ServerName("b"), ServerName("c")


class Rig:
    """An engine with a store that is a dict, and the clock in our hands."""

    def __init__(self, *windows: int | None, connected: bool = True) -> None:
        names = [A, B, C][: len(windows) or 1]
        windows = windows or (2,)
        self.windows = dict(zip(names, windows, strict=True))
        self.now_s = 1000.0
        self.store: dict[JobId, Row] = {}
        self.batch = Batch()
        self.notes: list[Note] = []
        self.given: list[orders.JobOrder] = []
        self.fenced: list[orders.Fence] = []
        self.links: list[orders.Enlist | orders.Dismiss] = []
        self.fences: dict[str, model.Fence] = {}
        self.settings: dict[str, object] = {}
        self.start()
        for name in names:
            self.tell(facts.Health(server=name, ok=True))
            if connected:
                self.tell(facts.Connected(server=name, client_id=f"c-{name}"))

    def start(self) -> None:
        """A new daemon, which knows what the journal does; no server has been looked at."""
        servers = [
            Server(name=name, origin=f"http://{name}", window=window)
            for name, window in self.windows.items()
        ]
        rows = self.store.values()
        self.engine = Engine(servers, POLICY, Counter(row.state for row in rows))
        idle = {State.QUEUED, State.HELD}
        self.engine.load(
            [row for row in rows if row.state not in idle and not row.retired],
            crashed=False,
            now_s=self.now_s,
            u=0.0,
            fences=tuple(self.fences.values()),
            settings=self.settings,
        )

    def tell(self, *told: facts.Fact, after_s: float = 0.0) -> list[orders.JobOrder]:
        self.now_s += after_s
        for fact in told:
            self.engine.handle(fact, now_s=self.now_s, u=0.0)
        given: list[orders.JobOrder] = []
        while True:
            self.batch = self.engine.take(now_s=self.now_s, u=0.0)
            self.notes += self.batch.notes
            for change in self.batch.changes:
                old = self.store.get(change.row.job)
                assert (None if old is None else old.version) == change.expected
                self.store[change.row.job] = change.row
            self.fences |= {fence.prompt_id: fence for fence in self.batch.raised}
            for prompt_id in self.batch.lifted:
                del self.fences[prompt_id]
            self.settings |= dict(self.batch.settings)
            reads = [o for o in self.batch.orders if isinstance(o, orders.Read)]
            given += [o for o in self.batch.orders if isinstance(o, orders.JobOrder)]
            links = [o for o in self.batch.orders if isinstance(o, orders.Enlist | orders.Dismiss)]
            self.links += links
            self.fenced += [o for o in self.batch.orders if isinstance(o, orders.Fence)]
            if not reads:
                break
            for order in reads:
                self.engine.handle(self.read(order), now_s=self.now_s, u=0.0)
        self.given += given
        return given

    def read(self, order: orders.Read) -> facts.Fact:
        queued = [r for r in self.store.values() if r.state is State.QUEUED]
        match order:
            case orders.Summon():
                rows = {p.job: self.store[p.job] for p in order.purposes if p.job in self.store}
                return facts.Summoned(rows=tuple(rows.values()), purposes=order.purposes)
            case orders.Expire():
                by = {r.job: r.queue_by for r in queued if r.queue_by is not None}
                late = tuple(r for r in queued if by.get(r.job, math.inf) <= self.now_s)
                after = min((at for at in by.values() if at > self.now_s), default=None)
                return facts.Overdue(rows=late, next_s=after)
            case orders.Refill(count=count, shelf=shelf):
                due = [r for r in queued if r.not_before <= self.now_s and r.shelf is shelf]
                by_due = shelf is Shelf.LET_DOWN
                due.sort(key=lambda r: (r.not_before if by_due else -r.priority, r.seq))
                later = [r.not_before for r in queued if r.not_before > self.now_s]
                return facts.Candidates(
                    rows=tuple(due[:count]),
                    shelf=shelf,
                    next_due_s=min(later, default=None),
                )

    def drop(self, *names: str, **row: object) -> list[orders.JobOrder]:
        first = len(self.store)
        return self.tell(
            *(
                facts.Claimed(row=Row(job=JobId(n), seq=first + i, claimed_at=self.now_s, **row))  # type: ignore[arg-type]
                for i, n in enumerate(names)
            )
        )

    def outcome(self, job: str) -> Outcome:
        """What has become of *job*."""
        outcome = self.store[JobId(job)].outcome
        assert outcome is not None
        return outcome

    def let_down(self, job: str) -> LetDown:
        """How often servers have let *job* down."""
        sign = self.store[JobId(job)].let_down
        assert sign is not None
        return sign

    def token(self, job: str) -> Token:
        held = self.engine.jobs[JobId(job)]
        return Token(held.row.job, held.row.attempt, held.live.seq)

    def accept(self, *names: str, uploaded: bool = False) -> None:
        for name in names:
            token = self.token(name)
            self.tell(facts.Accepted(token=token, number=self.now_s, uploaded=uploaded))

    def told(self, kind: str) -> list[Note]:
        """The notes of one kind, so far."""
        return [note for note in self.notes if note.kind == kind]

    def hint(self, job: str, sign: Sign, server: ServerName = A) -> list[orders.JobOrder]:
        return self.tell(Hint(server=server, prompt_id=prompt_id_of(JobId(job), 1), sign=sign))


def names(given: list[orders.JobOrder], kind: type = orders.Submit) -> list[str]:
    return [order.row.job for order in given if isinstance(order, kind)]


def test_highest_priority_first_then_arrival():
    rig = Rig(1)
    rig.drop("first")
    rig.drop("low", priority=-1)
    rig.drop("b", "c")
    rig.drop("high", priority=5)
    order = ["first"]
    while len(order) < 5:
        rig.accept(order[-1])
        rig.hint(order[-1], Sign.ENDED)
        given = rig.tell(
            facts.Fetched(
                token=rig.token(order[-1]),
                result=facts.FetchResult.FOUND,
                record=msgspec.convert({"end": "success"}, Record),
            )
        )
        order += names(given)
    assert order == ["first", "high", "b", "c", "low"]


def test_a_window_is_never_exceeded_and_the_less_loaded_server_is_chosen():
    rig = Rig(2, 2)
    given = rig.drop("a1", "a2", "a3", "a4", "a5")
    assert names(given) == ["a1", "a2", "a3", "a4"]
    placed = Counter(order.row.server for order in given)
    assert placed == {A: 2, B: 2}
    assert rig.store[JobId("a5")].state is State.QUEUED


def test_others_prompts_count_but_never_keep_us_out_for_good():
    rig = Rig(4)
    rig.tell(facts.QueueSeen(server=A, remaining=50))
    assert names(rig.drop("x", "y")) == ["x"]


def test_nothing_is_sent_to_a_server_that_is_down_refused_or_not_yet_asked():
    for news in (
        facts.Health(server=A, ok=False),
        facts.Health(server=A, ok=True, refusal="too old"),
    ):
        rig = Rig()
        rig.tell(news)
        assert names(rig.drop("x")) == []
        assert names(rig.tell(facts.Health(server=A, ok=True))) == ["x"]


def test_a_missing_connection_is_given_time_then_prompts_are_sent_and_polled():
    rig = Rig(2, connected=False)
    assert names(rig.drop("x")) == []
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.listen_grace_s
    given = rig.tell(facts.Tick(), after_s=POLICY.listen_grace_s)
    assert names(given) == ["x"]
    assert given[0].row.client_id == given[0].row.prompt_id
    rig.accept("x")
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.orphan_interval_s


def test_every_prompt_carries_the_live_connections_client_id():
    rig = Rig(2)
    assert rig.drop("x")[0].row.client_id == "c-a"
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    rig.tell(facts.Connected(server=A, client_id="fresh"))
    assert rig.drop("y")[0].row.client_id == "fresh"


def test_a_server_that_turns_submissions_away_is_left_alone_longer_each_time():
    rig = Rig(2)
    rig.drop("x")
    waits = []
    for _ in range(3):
        assert rig.tell(facts.NotSent(token=rig.token("x"), reason="refused")) == []
        waits.append(rig.engine.next_deadline_s() - rig.now_s)
        assert names(rig.tell(facts.Tick(), after_s=waits[-1])) == ["x"]
    assert waits == pytest.approx([0.5, 1.0, 2.0])
    rig.accept("x")
    assert rig.engine.servers[A].failures == 0
    assert rig.store[JobId("x")].charged == 0


def test_retry_after_is_honoured_within_reason():
    rig = Rig(2)
    rig.drop("x")
    rig.tell(facts.NotSent(token=rig.token("x"), reason="status", retry_after_s=1e9))
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.abandon_after_s


def test_a_lost_connection_makes_orphans_and_a_new_one_sweeps():
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    assert names(rig.tell(facts.Disconnected(server=A, cause="closed")), orders.Probe) == ["x"]
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.RUNNING))
    given = rig.tell(facts.Connected(server=A, client_id="fresh"))
    assert names(given, orders.Probe) == ["x"]


def test_a_stalled_publisher_is_worked_by_polling():
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    given = rig.tell(facts.StalledPublisher(server=A, stalled=True))
    assert names(given, orders.Probe) == ["x"]
    assert rig.drop("y")[0].row.client_id == rig.store[JobId("y")].prompt_id


def test_a_later_prompt_that_runs_is_a_reason_to_look_at_the_earlier_one():
    rig = Rig(2)
    rig.drop("x", "y")
    rig.accept("x")
    rig.now_s += 1
    rig.accept("y")
    assert names(rig.hint("y", Sign.ALIVE), orders.Probe) == ["x"]
    assert names(rig.hint("y", Sign.ALIVE), orders.Probe) == []


def test_an_empty_queue_is_a_reason_to_look_a_little_later():
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    assert rig.tell(facts.QueueSeen(server=A, remaining=0)) == []
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.ending_grace_s


def test_foreign_and_unknown_facts_are_dropped_and_counted():
    rig = Rig(2)
    rig.drop("x")
    for fact in (
        Hint(server=A, prompt_id=PromptId("nobody's"), sign=Sign.ENDED),
        Hint(server=B, prompt_id=prompt_id_of(JobId("x"), 1), sign=Sign.ENDED),
        facts.Retired(token=Token(JobId("gone"), 1, 1)),
        facts.CancelAsked(job=JobId("gone")),
        facts.Health(server=ServerName("nowhere"), ok=True),
    ):
        rig.tell(fact)
        assert [note.kind for note in rig.batch.notes] == ["dropped"]


def kill(rig: Rig, *victims: str) -> None:
    """The server dies and stays away until everybody knows that its memory is gone."""
    rig.tell(facts.Disconnected(server=A, cause="closed"), facts.Health(server=A, ok=False))
    for _ in range(2):
        for name in victims:
            rig.tell(facts.Probed(token=rig.token(name), presence=Presence.REFUSED))
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="again"))


def test_a_server_that_dies_with_several_prompts_charges_none_and_gets_them_one_by_one():
    rig = Rig(3)
    rig.drop("x", "y", "z")
    for name in ("x", "y", "z"):
        rig.now_s += 1
        rig.accept(name)
    rig.given.clear()
    kill(rig, "x", "y", "z")
    assert {rig.store[JobId(name)].charged for name in ("x", "y", "z")} == {0}
    assert names(rig.given) == ["x"]  # alone, though there is room for three
    rig.accept("x")
    kill(rig, "x")
    assert rig.store[JobId("x")].charged == 2  # now it was proven, both times


def test_a_job_that_is_sent_alone_gets_a_server_of_its_own_in_time():
    rig = Rig(2)
    rig.drop("x", "y")
    rig.accept("x", "y")
    rig.given.clear()
    kill(rig, "x", "y")
    rig.drop(*(f"more-{number}" for number in range(4)))
    assert names(rig.given) == ["x"]
    finish(rig, "x")
    assert names(rig.given) == ["x", "y"]
    finish(rig, "y")
    assert names(rig.given) == ["x", "y", "more-0", "more-1"]


def finish(rig: Rig, name: str) -> list[orders.JobOrder]:
    """Its server takes it and runs it, and a look into the history says so."""
    row = rig.engine.jobs[JobId(name)].row
    if row.state is State.SUBMITTING:
        rig.accept(name)
    assert row.server is not None
    assert row.prompt_id is not None
    rig.tell(Hint(server=row.server, prompt_id=row.prompt_id, sign=Sign.ENDED))
    record = msgspec.convert({"end": "success"}, Record)
    return rig.tell(
        facts.Fetched(token=rig.token(name), result=facts.FetchResult.FOUND, record=record)
    )


def test_the_queue_in_memory_is_bounded_and_refilled_in_order():
    rig = Rig(1)
    total = 2 * LOOK_AHEAD + 100
    for at in range(0, total, 200):
        rig.drop(*(f"j{i:05}" for i in range(at, min(at + 200, total))))
    assert len(rig.engine.jobs) <= LOOK_AHEAD + 201
    assert rig.engine.counts[State.QUEUED] + rig.engine.counts[State.SUBMITTING] == total
    sent = ["j00000"]
    for _ in range(total - 1):
        given = rig.tell(facts.Rejected(token=rig.token(sent[-1]), message="no"))
        sent += names(given)
    assert sent == [f"j{i:05}" for i in range(total)]


def test_it_is_known_which_jobs_no_server_that_works_would_take():
    rig = Rig(1, 1)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    fleet = rig.engine.fleet
    rig.tell(facts.Rejected(token=rig.token("x"), message="no"))
    row = rig.store[JobId("x")]
    assert row.state is State.QUEUED
    assert not fleet.is_wanted(row, rig.now_s)
    assert fleet.is_wanted(msgspec.structs.replace(row, verdicts=()), rig.now_s)
    rig.tell(facts.Health(server=B, ok=True))
    assert fleet.is_wanted(row, rig.now_s)
    rig.tell(facts.DrainAsked(server=B))
    assert not fleet.is_wanted(row, rig.now_s)


def test_a_prompt_that_waits_is_not_silent_while_one_before_it_is_heard():
    rig = Rig(2)
    rig.drop("runs", "waits")
    rig.accept("runs", "waits")
    for _ in range(3):
        rig.hint("runs", Sign.ALIVE)
        rig.now_s += POLICY.stale_after_s / 2
    assert rig.engine.stale(A, now_s=rig.now_s) == 0
    rig.now_s += POLICY.stale_after_s / 2
    assert rig.engine.stale(A, now_s=rig.now_s) == 2


def test_jobs_that_wait_for_the_only_server_left_hide_no_others():
    rig = Rig(1, 1)
    total = LOOK_AHEAD + 2 * OTHERS_AHEAD
    rig.drop("easy", "long")  # on A and B
    rig.accept("easy", "long")
    for at in range(0, total, 200):
        rig.drop(*(f"hard-{i:04}" for i in range(at, min(at + 200, total))))
    rig.drop(*(f"easy-{i}" for i in range(5)))
    given = names(finish(rig, "easy"))
    for i in range(total):  # A lacks what these need
        assert given == [f"hard-{i:04}"]
        given = names(rig.tell(facts.Rejected(token=rig.token(given[0]), message="no")))
    for i in range(5):
        assert given == [f"easy-{i}"]
        given = names(finish(rig, given[0]))
    assert given == []
    assert len(rig.engine.jobs) <= OTHERS_AHEAD + 10
    given = names(finish(rig, "long"))
    for i in range(total):  # and B, at last, takes one after the other, but for every second
        assert given == [f"hard-{i:04}"]
        if i % 2:
            given = names(rig.tell(facts.Rejected(token=rig.token(given[0]), message="no")))
            assert rig.store[JobId(f"hard-{i:04}")].state is State.COLLECTING
        else:
            given = names(finish(rig, given[0]))
    assert given == []
    assert rig.engine.counts[State.QUEUED] == 0


def test_a_delayed_row_comes_back_when_it_is_due():
    rig = Rig(1)
    rig.drop("x")
    rig.accept("x")
    rig.hint("x", Sign.ALIVE)
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.ABSENT))
    rig.tell(facts.Connected(server=A, client_id="fresh"), after_s=POLICY.lost_grace_s)
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.ABSENT))
    row = rig.store[JobId("x")]
    assert (row.state, row.charged) == (State.QUEUED, 1)
    assert JobId("x") not in rig.engine.jobs
    assert rig.engine.next_deadline_s() == row.not_before
    assert names(rig.tell(facts.Tick(), after_s=row.not_before - rig.now_s)) == ["x"]


def test_a_delayed_row_that_is_due_waits_quietly_behind_a_full_look_ahead():
    rig = Rig(1)
    rig.drop("x", *(f"j{i:03}" for i in range(LOOK_AHEAD)))
    rig.accept("x")
    rig.hint("x", Sign.ALIVE)
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.REFUSED))
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.REFUSED))
    due_s = rig.store[JobId("x")].not_before
    rig.tell(facts.Tick(), after_s=due_s + 1 - rig.now_s)
    assert rig.engine.next_deadline_s() > rig.now_s  # or the auditor would never sleep


def test_what_is_retired_is_forgotten():
    rig = Rig(1)
    rig.drop("x")
    rig.tell(facts.Rejected(token=rig.token("x"), message="no"))
    staged = msgspec.convert({"manifest_sha256": "ab"}, Staged)
    rig.tell(facts.Collected(token=rig.token("x"), staged=staged))
    rig.tell(facts.Published(token=rig.token("x")))
    rig.tell(facts.Retired(token=rig.token("x")))
    assert not rig.engine.jobs
    assert not rig.engine.knows(prompt_id_of(JobId("x"), 1))
    assert rig.engine.next_deadline_s() == math.inf
    assert rig.engine.counts[State.FAILED] == 1


def test_times_from_the_future_become_now_at_load():
    row = Row(
        job=JobId("x"), seq=0, state=State.SUBMITTED, attempt=1, server=A, origin="http://a",
        prompt_id=prompt_id_of(JobId("x"), 1), claimed_at=9e9, submitted_at=9e9,
    )  # fmt: skip
    rig = Rig(1)
    rig.engine.load([row], crashed=False, now_s=rig.now_s, u=0.0)
    assert rig.engine.jobs[JobId("x")].row.submitted_at == rig.now_s


def test_auto_windows_follow_the_recent_pace():
    rig = Rig(None)
    assert len(names(rig.drop(*"abcdefgh"))) == 2
    rig.accept("a")
    rig.hint("a", Sign.ALIVE)
    rig.now_s += 0.1
    rig.hint("a", Sign.ENDED)
    record = msgspec.convert({"end": "success"}, Record)
    given = rig.tell(
        facts.Fetched(token=rig.token("a"), result=facts.FetchResult.FOUND, record=record)
    )
    assert len(names(given)) == 5  # six may be there now: one runs, five wait 500 ms together


# --- sick cards and bad batches ------------------------------------------------------------------

CUDA = "CUDA error: an illegal memory access was encountered"


def raised(message: str) -> Record:
    failure = model.NodeFailure(
        node="3", node_type="KSampler", exception_type="RuntimeError", message=message
    )
    return Record(end=model.End.ERROR, failure=failure)


def end(rig: Rig, names: list[JobId], record: Record) -> None:
    """The prompts of *names* end, wherever they run, all at the same moment."""
    for name in names:
        row = rig.engine.jobs[name].row
        if row.state is State.SUBMITTING:
            rig.accept(name)
        assert row.server is not None
        rig.tell(
            Hint(
                server=row.server,
                prompt_id=prompt_id_of(row.job, row.attempt),
                sign=Sign.ENDED,
            )
        )
    told: list[facts.Fact] = []
    for name in names:
        token = rig.token(name)
        if rig.engine.jobs[name].live.order is Ask.STOP:
            told.append(facts.Probed(token=token, presence=Presence.FINISHED, record=record))
        else:
            result = facts.FetchResult.FOUND
            told.append(facts.Fetched(token=token, result=result, record=record))
    rig.tell(*told)


def here(rig: Rig, *servers: ServerName) -> list[JobId]:
    return [job for server in servers for job in rig.engine.on_server[server]]


@pytest.mark.parametrize("message", [CUDA, "shapes differ"])
def test_a_sick_card_is_given_five_jobs_and_none_fails_for_it(message):
    rig = Rig(1, 1)
    rig.drop(*(f"j{i:02}" for i in range(20)))
    seen = 0
    while on_a := here(rig, A):
        end(rig, on_a, raised(message))
        seen += len(on_a)
    assert seen == POLICY.sick_after
    assert "comfyd resume a" in rig.engine.trouble(A)
    while on_b := here(rig, B):
        end(rig, on_b, Record(end=model.End.SUCCESS))
    assert {row.outcome.state for row in rig.store.values() if row.outcome} == {State.DONE}
    assert {row.charged for row in rig.store.values()} == {0}
    assert all("Server a did not" in row.warnings[-1] for row in rig.store.values() if row.verdicts)
    rig.tell(facts.ResumeAsked(server=A))
    assert rig.engine.trouble(A) == ""


def test_a_batch_of_bad_jobs_stops_no_server_for_good():
    """All fail at once on both servers, before anyone could have a second opinion."""
    rig = Rig(6, 6)
    rig.drop(*(f"j{i:02}" for i in range(12)))
    assert len(here(rig, A)) == len(here(rig, B)) == 6
    for _ in range(30):
        if not here(rig, A, B):
            break
        end(rig, here(rig, A, B), raised("shapes differ"))
    outcomes = [row.outcome.reason for row in rig.store.values() if row.outcome]
    assert outcomes == [model.Reason.EXECUTION_ERROR] * 12
    assert all(not server.strikes for server in rig.engine.servers.values())


def test_on_the_only_server_a_sick_card_stops_the_queue_and_bad_jobs_do_not():
    for message, stops in ((CUDA, True), ("shapes differ", False)):
        rig = Rig(1)
        rig.drop(*(f"j{i:02}" for i in range(8)))
        for _ in range(8):
            end(rig, here(rig, A), raised(message))
        failed = sum(row.outcome is not None for row in rig.store.values())
        assert failed == (POLICY.sick_after if stops else 8)
        assert bool(rig.engine.trouble(A)) == stops


def test_what_is_next_is_told_in_the_order_in_which_it_will_be_sent():
    rig = Rig(1)
    rig.drop("sent", "a", "b")
    rig.drop("high", priority=5)
    rig.tell(facts.HoldAsked(job=JobId("a"), reason="x"))
    assert [row.job for row in rig.engine.next_up(9)] == ["high", "b"]
    assert [row.job for row in rig.engine.next_up(1)] == ["high"]


def test_a_start_is_told_once():
    rig = Rig()
    rig.drop("x")
    rig.accept("x")
    assert rig.told("started") == []
    for _ in range(3):
        rig.hint("x", Sign.ALIVE)
    [note] = rig.told("started")
    assert (note.job, note.server, note.prompt) == ("x", A, prompt_id_of(JobId("x"), 1))


def test_a_fence_is_told_when_it_is_raised_and_when_it_is_lifted():
    rig = Rig()
    rig.drop("x")
    rig.accept("x")
    prompt_id = prompt_id_of(JobId("x"), 1)
    rig.tell(facts.Disconnected(server=A, cause="closed"), facts.Health(server=A, ok=False))
    rig.tell(facts.ForgetAsked(server=A))
    [note] = rig.told("fenced")
    assert (note.job, note.server, note.prompt) == ("x", A, prompt_id)
    rig.tell(facts.Health(server=A, ok=True))
    for _ in range(2):
        assert rig.told("unfenced") == []
        rig.tell(facts.Fenced(prompt_id=prompt_id, presence=Presence.ABSENT))
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    [note] = rig.told("unfenced")
    assert (note.job, note.server, note.prompt) == ("x", A, prompt_id)
    assert len(rig.told("fenced")) == 1


def test_a_prompt_that_was_to_be_fetched_back_and_goes_on_is_not_told_as_sent_anew():
    rig = Rig(2, 2)
    rig.drop("x", "y", "z")
    rig.accept("x", "y", "z")
    here = [job for job in ("x", "y", "z") if rig.engine.jobs[JobId(job)].row.server == A]
    rig.hint(here[0], Sign.ALIVE)
    (other,) = {"x", "y", "z"} - {*here}
    rig.hint(other, Sign.ENDED, B)
    record = msgspec.convert({"end": "success"}, Record)
    found = facts.FetchResult.FOUND
    rig.tell(facts.Fetched(token=rig.token(other), result=found, record=record))
    rig.tell(facts.QueueSeen(server=B, remaining=0), facts.Tick(), after_s=POLICY.recall_after_s)
    late = rig.engine.jobs[JobId(here[1])]
    assert late.row.state is State.STOPPING
    rig.tell(facts.Probed(token=rig.token(here[1]), presence=Presence.RUNNING))
    moves = [note.data for note in rig.told("moved") if note.job == here[1]]
    assert moves[-2:] == [
        {"state": "stopping"},
        {"state": "submitted", "reason": "it runs by now"},
    ]
