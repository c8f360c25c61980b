"""Which server gets a job: the least loaded that may, and what rules a server out for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from comfyd.core import facts, model, orders
from comfyd.core.facts import Presence, Sign
from comfyd.core.fleet import Fleet
from comfyd.core.model import JobId, Reason, Record, Row, ServerName, State, prompt_id_of
from comfyd.core.policy import Policy, window
from comfyd.core.server import Server
from tests.core.test_engine import A, B, Rig, end, finish, here, names

POLICY = Policy()
NOW_S = 1000.0
C = ServerName("c")


def server(name: ServerName, **changes: Any) -> Server:
    return replace(
        Server(name=name, origin=f"http://{name}", window=4, up=True, client_id="c"), **changes
    )


def sent(name: str, to: ServerName, **changes: Any) -> Row:
    job = JobId(name)
    row = Row(
        job=job, seq=0, state=State.SUBMITTED, attempt=1, server=to, origin=f"http://{to}",
        prompt_id=prompt_id_of(job, 1),
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def fleet(*servers: Server, load: dict[ServerName, int] | None = None) -> Fleet:
    made = Fleet(servers, POLICY)
    for name, count in (load or {}).items():
        for number in range(count):
            made.index(None, sent(f"{name}-{number}", name))
    return made


QUEUED = Row(job=JobId("x"), seq=1)


# --- the least loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "load", "expected"),
    [
        ([server(A), server(B)], {}, A),  # of equals the first by name
        ([server(A), server(B)], {A: 1}, B),
        ([server(A), server(B)], {A: 1, B: 2}, A),
        ([server(A, window=8), server(B, window=2)], {A: 2, B: 1}, A),  # 2 of 8 is less than 1 of 2
        ([server(A, remaining=9), server(B)], {A: 1, B: 2}, B),  # others' prompts are load too
        ([server(A, idle_since_s=NOW_S), server(B)], {B: 3}, B),  # prompts wait there, none runs
        ([server(A, idle_since_s=NOW_S)], {}, A),  # but better than nowhere
    ],
)
def test_the_least_loaded_server_is_chosen(servers, load, expected):
    chosen = fleet(*servers, load=load).place(QUEUED, [A, B][: len(servers)], 0.0)
    assert chosen is not None
    assert chosen.name == expected


def test_a_server_that_said_no_is_not_asked_again_unless_its_url_changed():
    verdict = model.Verdict(
        server=A, origin="http://a", outcome=model.Outcome(state=State.FAILED, message="no")
    )
    row = msgspec.structs.replace(QUEUED, verdicts=(verdict,))
    both = fleet(server(A), server(B))
    assert both.place(row, [A], 0.0) is None
    assert both.place(row, [A, B], 0.0) == both.servers[B]
    assert fleet(server(A, origin="http://new")).place(row, [A], 0.0) is not None


def test_what_must_be_sent_alone_goes_only_where_nothing_of_ours_is():
    suspect = msgspec.structs.replace(QUEUED, deaths=1)
    both = fleet(server(A), server(B), load={A: 1})
    assert both.place(suspect, [A], 0.0) is None
    assert both.place(suspect, [A, B], 0.0) == both.servers[B]
    both.index(None, sent("suspect", B, deaths=1))
    assert not both.has_room(both.servers[B], NOW_S)  # and then nothing goes there beside it
    both.index(sent("suspect", B, deaths=1), QUEUED)
    assert both.has_room(both.servers[B], NOW_S)


@pytest.mark.parametrize(
    ("changes", "usable"),
    [
        ({}, True),
        ({"up": None}, False),  # not looked at yet
        ({"up": False}, False),
        ({"refusal": "too old"}, False),
        ({"draining": True}, False),
        ({"wedged": True}, False),
        ({"closed_until_s": NOW_S + 1}, False),
        ({"closed_until_s": NOW_S}, True),
        ({"client_id": None, "listen_by_s": NOW_S + 1}, False),  # its connection may come back
        ({"client_id": None, "listen_by_s": NOW_S}, True),
        ({"stalled": True}, True),  # it says nothing: it is polled
        ({"strikes": tuple((JobId(str(n)), True) for n in range(5))}, False),
        ({"strikes": tuple((JobId(str(n)), True) for n in range(4))}, True),
    ],
)
def test_what_rules_a_server_out(changes, usable):
    one = fleet(server(A, **changes))
    one.keep_fit(NOW_S)
    assert one.is_usable(one.servers[A], NOW_S) == usable


def test_a_fence_rules_its_server_out_until_it_is_lifted():
    one = fleet(server(A), server(B))
    fence = model.Fence(
        prompt_id=model.PromptId("p"), job=JobId("x"), server=A, origin="http://a"
    )  # fmt: skip
    one.watch(replace_fence(fence, origin="http://old"))
    one.watch(replace_fence(fence, server=C))
    assert not one.watches  # of servers that are not configured, or no longer at that URL
    one.watch(fence)
    assert [one.is_usable(s, NOW_S) for s in one.servers.values()] == [False, True]
    del one.watches[fence.prompt_id]
    assert one.is_usable(one.servers[A], NOW_S)


def replace_fence(fence: model.Fence, **changes: Any) -> model.Fence:
    return msgspec.structs.replace(fence, **changes)


@pytest.mark.parametrize(
    ("setting", "run_s", "places"),
    [
        (None, None, 2),  # nothing is known: one runs, one waits
        (None, 60.0, 2),
        (None, 0.5, 2),
        (None, 0.25, 3),
        (None, 0.1, 6),
        (None, 0.02, 16),
        (None, 0.0, 16),
        (5, 0.0, 5),
        (1, None, 1),
    ],
)
def test_a_window_is_enough_for_half_a_second_unless_it_is_set(setting, run_s, places):
    assert window(setting, run_s) == places
    under_suspicion = server(A, window=setting, run_average_s=run_s, strikes=((JobId("x"), False),))
    assert under_suspicion.room(POLICY) == min(places, 2)


def test_an_average_forgets_slowly_and_ends_with_the_connection():
    rig = Rig(None)
    for run_s in (1.0, 0.1, 0.1):
        name = f"j{run_s}-{len(rig.store)}"
        rig.drop(name)
        rig.accept(name)
        rig.hint(name, Sign.ALIVE)
        rig.now_s += run_s
        finish(rig, name)
    assert rig.engine.servers[A].run_average_s == pytest.approx(0.8 * 0.82 + 0.2 * 0.1)
    rig.tell(facts.Connected(server=A, client_id="fresh"))
    assert rig.engine.servers[A].run_average_s is None


# --- drain, resume, and hope ---------------------------------------------------------------------


def refused_by_a(*windows: int) -> Rig:
    """A has said no to x; B could still be asked, when it is back."""
    rig = Rig(*windows)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    rig.tell(facts.Rejected(token=rig.token("x"), message="no such model"))
    assert rig.store[JobId("x")].state is State.QUEUED
    return rig


def reason(rig: Rig, name: str) -> Reason | None:
    outcome = rig.store[JobId(name)].outcome
    return None if outcome is None else outcome.reason


def test_a_server_that_is_down_is_waited_for_and_not_for_ever():
    rig = refused_by_a(1, 1)
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.abandon_after_s
    rig.tell(facts.Tick(), after_s=POLICY.abandon_after_s - 1)
    assert rig.store[JobId("x")].state is State.QUEUED
    rig.tell(facts.Tick(), after_s=1)
    assert reason(rig, "x") is Reason.REJECTED


def test_a_server_that_comes_back_in_time_is_asked():
    rig = refused_by_a(1, 1)
    rig.tell(facts.Tick(), after_s=POLICY.abandon_after_s - 1)
    given = rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    assert [(o.row.job, o.row.server) for o in given] == [("x", B)]


def test_the_second_of_two_that_are_down_is_waited_for_as_long_as_the_first():
    rig = Rig(1, 1)
    rig.engine.fleet.put(Server(name=C, origin="http://c", window=1, up=True))
    rig.engine.fleet.on_server[C] = {}
    rig.tell(facts.Health(server=B, ok=False))
    rig.tell(facts.Health(server=C, ok=False), after_s=100)
    rig.drop("x")
    rig.tell(facts.Rejected(token=rig.token("x"), message="no such model"))
    rig.tell(facts.Tick(), after_s=POLICY.abandon_after_s - 100)
    assert rig.store[JobId("x")].state is State.QUEUED
    assert rig.engine.next_deadline_s() == rig.now_s + 100
    rig.tell(facts.Tick(), after_s=100)
    assert reason(rig, "x") is Reason.REJECTED


def test_nothing_waits_for_a_server_that_is_drained_while_it_is_down():
    rig = refused_by_a(1, 1)
    rig.tell(facts.DrainAsked(server=B))
    assert reason(rig, "x") is Reason.REJECTED  # nobody is left to ask: at once, not in ten minutes


def test_a_server_that_is_resumed_while_it_is_down_is_waited_for_anew():
    """It was drained for hours, and is restarted now: it is not gone for having been down."""
    rig = Rig(1, 1)
    rig.tell(facts.DrainAsked(server=B))
    rig.tell(facts.Health(server=B, ok=False), after_s=1e4)
    rig.tell(facts.ResumeAsked(server=B), after_s=1e4)
    rig.drop("x")
    rig.tell(facts.Rejected(token=rig.token("x"), message="no such model"))
    assert rig.store[JobId("x")].state is State.QUEUED
    given = rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    assert [(o.row.job, o.row.server) for o in given] == [("x", B)]


def test_a_drained_server_finishes_and_gets_nothing_more_even_after_a_restart():
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    rig.tell(facts.DrainAsked(server=A))
    assert names(rig.drop("y")) == []
    finish(rig, "x")
    assert rig.store[JobId("x")].outcome is not None
    rig.start()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="again"))
    assert rig.engine.servers[A].draining
    assert names(rig.given) == ["x"]
    assert names(rig.tell(facts.ResumeAsked(server=A))) == ["y"]


def test_what_waits_on_a_server_is_not_fetched_back_for_a_drained_one():
    rig = Rig(2, 2)
    rig.tell(facts.DrainAsked(server=B))
    rig.drop("x", "y")
    rig.accept("x", "y")
    rig.tell(facts.Tick(), after_s=10 * POLICY.recall_after_s)
    assert names(rig.given, orders.Stop) == []


# --- servers that are gone -----------------------------------------------------------------------


def test_a_forgotten_server_gives_its_jobs_back_and_is_fenced_when_it_returns():
    rig = Rig(2, 2)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x", "y")
    rig.accept("x", "y")
    rig.tell(facts.Disconnected(server=A, cause="ping_timeout"), facts.Health(server=A, ok=False))
    rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    given = rig.tell(facts.ForgetAsked(server=A))
    assert [(o.row.job, o.row.server) for o in given] == [("x", B), ("y", B)]
    assert {f.server for f in rig.fences.values()} == {A}
    assert {row.charged for row in rig.store.values()} == {0}
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="a"))
    assert sorted(o.fence.job for o in rig.fenced) == ["x", "y"]
    assert {o.row.server for o in rig.drop("z", "more")} <= {B}


def test_no_order_about_a_prompt_that_was_given_up_is_given():
    """Both in one batch: the order would go out with the row of the next attempt."""
    rig = Rig(2, 2)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    rig.accept("x")
    rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    given = rig.tell(
        facts.Disconnected(server=A, cause="closed"),  # look at it
        facts.Health(server=A, ok=False),
        facts.ForgetAsked(server=A),  # no: it is gone
    )
    assert [(type(o), o.row.server, o.row.attempt) for o in given] == [(orders.Submit, B, 2)]


def test_a_row_of_a_server_that_is_configured_no_more_takes_no_place():
    rig = Rig(1)
    row = sent("old", C)
    rig.store[row.job] = row
    rig.start()
    assert [type(o) for o in rig.tell(facts.Health(server=A, ok=True))] == [orders.Probe]
    rig.tell(facts.Connected(server=A, client_id="again"))
    assert names(rig.drop("x")) == ["x"]
    for _ in range(100):
        rig.tell(facts.Probed(token=rig.token("old"), presence=Presence.UNKNOWN))
        if rig.store[row.job].state is not State.SUBMITTED:
            break
        rig.tell(facts.Tick(), after_s=rig.engine.next_deadline_s() - rig.now_s)
    assert rig.store[row.job].state is State.QUEUED
    assert rig.store[row.job].abandoned == ((C, "http://c", row.prompt_id),)


# --- whose fault it was --------------------------------------------------------------------------


def test_a_prompt_that_had_ended_is_not_what_brought_its_server_down():
    rig = Rig(2)
    rig.drop("x", "y")
    rig.accept("x", "y")
    rig.hint("x", Sign.ALIVE)
    rig.hint("x", Sign.ENDED)
    rig.hint("y", Sign.ALIVE)
    rig.tell(facts.Disconnected(server=A, cause="closed"), facts.Health(server=A, ok=False))
    rig.tell(facts.Fetched(token=rig.token("x"), result=facts.FetchResult.ERROR))
    for _ in range(2):
        for name in ("x", "y"):
            rig.tell(facts.Probed(token=rig.token(name), presence=Presence.REFUSED))
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    assert {name: rig.store[JobId(name)].charged for name in "xy"} == {"x": 0, "y": 1}


def test_a_later_prompt_that_has_ended_is_a_reason_to_look_at_the_earlier_one():
    """Both signs of the later one were read at once: only the stronger is kept."""
    rig = Rig(2)
    rig.drop("x", "y")
    rig.accept("x")
    rig.now_s += 1
    rig.accept("y")
    given = rig.hint("y", Sign.ENDED)
    assert (names(given, orders.Probe), names(given, orders.Fetch)) == (["x"], ["y"])


def test_a_restarted_server_has_nothing_held_against_it():
    rig = Rig(1, 1)
    rig.drop(*(f"j{i:02}" for i in range(20)))
    for _ in range(POLICY.sick_after):
        failure = model.NodeFailure(
            node="3", node_type="KSampler", exception_type="RuntimeError", message="shapes differ"
        )
        end(rig, here(rig, A), Record(end=model.End.ERROR, failure=failure))
    assert rig.engine.trouble(A)
    rig.tell(facts.Disconnected(server=A, cause="deaf"))
    assert rig.engine.trouble(A)  # that was no restart
    rig.tell(facts.Connected(server=A, client_id="again"))
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    assert rig.engine.trouble(A) == ""
