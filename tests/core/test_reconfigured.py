"""Servers come and go, and numbers change, under way: what becomes of the work."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from comfyd.core import facts, orders
from comfyd.core.engine import DRAINING
from comfyd.core.facts import Presence, Reconfigured, Sign
from comfyd.core.model import JobId, Record, ServerName, Staged, State, prompt_id_of
from comfyd.core.orders import Dismiss, Enlist
from comfyd.core.policy import Policy
from comfyd.core.server import Server
from comfyd.core.snapshot import ServerState, state_of
from tests.core.test_engine import POLICY, A, B, Rig, names

C = ServerName("c")


def server(name: ServerName, origin: str = "", **more: int) -> Server:
    return Server(name=name, origin=origin or f"http://{name}", window=2, **more)  # type: ignore[arg-type]


def reload(rig: Rig, *servers: Server, policy: Policy = POLICY) -> list[orders.JobOrder]:
    return rig.tell(Reconfigured(servers=servers, policy=policy))


def loaded(rig: Rig) -> None:
    """Two prompts on each of two servers, the first of each running."""
    rig.drop("a1", "b1", "a2", "b2")
    on = {name: [*rig.engine.on_server[name]] for name in (A, B)}
    assert on == {A: ["a1", "a2"], B: ["b1", "b2"]}
    rig.accept("a1", "b1", "a2", "b2")
    rig.hint("a1", Sign.ALIVE, A)
    rig.hint("b1", Sign.ALIVE, B)
    rig.given.clear()


def probed(rig: Rig, job: str, presence: Presence, *, after_s: float = 0.0, **more: object) -> None:
    answer = facts.Probed(token=rig.token(job), presence=presence, **more)  # type: ignore[arg-type]
    rig.tell(answer, after_s=after_s)


def gone(rig: Rig, job: str) -> None:
    """Not in the queue nor in the history, twice."""
    probed(rig, job, Presence.ABSENT)
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    probed(rig, job, Presence.ABSENT)


def ended(rig: Rig, job: str, name: ServerName) -> None:
    """It ran to its end, and waits to be collected."""
    attempt = rig.engine.jobs[JobId(job)].row.attempt
    rig.tell(facts.Hint(server=name, prompt_id=prompt_id_of(JobId(job), attempt), sign=Sign.ENDED))
    record = msgspec.convert({"end": "success"}, Record)
    found = facts.FetchResult.FOUND
    rig.tell(facts.Fetched(token=rig.token(job), result=found, record=record))
    assert rig.store[JobId(job)].state is State.COLLECTING


def collected(rig: Rig, job: str) -> None:
    rig.tell(facts.Collected(token=rig.token(job), staged=Staged(manifest_sha256="x")))


def test_a_removed_server_finishes_what_it_runs_and_gives_back_what_waits():
    rig = Rig(2, 2)
    loaded(rig)
    rig.engine.fleet.put(replace(rig.engine.servers[B], window=3))
    reload(rig, replace(server(B), window=3))
    assert names(rig.given, orders.Stop) == ["a2"]  # fetched back, for b has room
    assert rig.links == []
    gone(rig, "a2")
    assert rig.store[JobId("a2")].server == B
    assert rig.store[JobId("a2")].charged == 0
    rig.drop("next")
    assert rig.store[JobId("next")].state is State.QUEUED  # nothing new goes to a
    ended(rig, "a1", A)
    assert rig.links == []  # its outputs are still there
    collected(rig, "a1")
    assert rig.links == [Dismiss(server=A, origin="http://a")]
    assert list(rig.engine.servers) == [B]


def test_what_waits_on_a_removed_server_is_run_there_if_nobody_else_can():
    rig = Rig(2, 2)
    loaded(rig)
    rig.tell(facts.Health(server=B, ok=False))
    reload(rig, server(B))
    assert names(rig.given, orders.Stop) == []
    assert rig.links == []


def test_removed_while_it_is_down_it_is_given_up_at_once():
    """Nobody waits for audit.abandon_after: a person has just said that it is gone."""
    rig = Rig(2, 2)
    loaded(rig)
    rig.tell(facts.Health(server=A, ok=False))
    reload(rig, server(B))
    assert rig.links == [Dismiss(server=A, origin="http://a")]
    assert {fence.job for fence in rig.fences.values()} == {"a1", "a2"}
    assert {rig.store[JobId(job)].state for job in ("a1", "a2")} == {State.QUEUED}


def test_what_was_given_up_with_a_server_is_fenced_when_it_is_configured_again():
    rig = Rig(2, 2)
    loaded(rig)
    rig.tell(facts.Health(server=A, ok=False))
    reload(rig, server(B))
    rig.given.clear()
    reload(rig, server(A), server(B))
    assert rig.links[1:] == [Enlist(server=A, origin="http://a")]
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="new"))
    assert {order.fence.job for order in rig.fenced} == {"a1", "a2"}
    assert names(rig.given) == []  # nothing new before that is settled
    for order in rig.fenced[:]:
        absent = facts.Fenced(prompt_id=order.fence.prompt_id, presence=Presence.ABSENT)
        rig.tell(absent)
    rig.fenced.clear()
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    for order in rig.fenced[:]:
        rig.tell(facts.Fenced(prompt_id=order.fence.prompt_id, presence=Presence.ABSENT))
    assert rig.fences == {}
    assert sorted(names(rig.given)) == ["a1", "a2"]


def test_a_submission_on_its_way_is_waited_for():
    rig = Rig(1, 1)
    rig.drop("x")
    reload(rig, server(B))
    rig.tell(facts.Health(server=A, ok=False))
    assert rig.links == []
    rig.accept("x")
    assert rig.links == []
    ended(rig, "x", A)
    collected(rig, "x")
    assert rig.links == [Dismiss(server=A, origin="http://a")]


def test_another_url_is_another_server_which_takes_over_when_the_old_one_is_done():
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    rig.hint("x", Sign.ALIVE)
    reload(rig, server(A, "http://new"))
    rig.drop("y")
    assert names(rig.given) == ["x"]
    assert rig.engine.servers[A].origin == "http://a"
    state, why = state_of(rig.engine.servers[A], trouble="", down="", in_flight=1)
    assert state is ServerState.DRAINING
    assert why == "has another URL in the configuration; 1 prompt to finish"
    ended(rig, "x", A)
    collected(rig, "x")
    there = [Dismiss(server=A, origin="http://a"), Enlist(server=A, origin="http://new")]
    assert rig.links == there
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="n"))
    assert names(rig.given)[-1] == "y"
    assert rig.store[JobId("y")].origin == "http://new"


def test_one_that_is_back_before_it_has_gone_stays():
    rig = Rig(2, 2)
    loaded(rig)
    before = rig.engine.servers[A]
    reload(rig, server(B))
    assert rig.engine.servers[A].leaving
    reload(rig, server(A), server(B))
    assert rig.links == []
    rig.drop("next")
    assert replace(rig.engine.servers[A], unfit_since_s=None) == before


def test_a_name_taken_away_before_it_took_over_never_does():
    rig = Rig(2, 2)
    loaded(rig)
    reload(rig, server(A, "http://new"), server(B))
    reload(rig, server(B))
    rig.tell(facts.Health(server=A, ok=False), facts.ForgetAsked(server=A))
    assert rig.links == [Dismiss(server=A, origin="http://a")]


def test_only_what_changed_is_touched():
    rig = Rig(2, 2)
    loaded(rig)
    before = dict(rig.engine.servers)
    assert reload(rig, replace(server(A), window=5), server(B)) == []
    assert rig.links == []
    assert rig.engine.servers == {A: replace(before[A], window=5), B: before[B]}


def test_a_new_server_is_used_once_it_is_known_to_be_well():
    rig = Rig(1)
    rig.drop("x", "y")
    assert names(rig.given) == ["x"]
    reload(rig, replace(server(A), window=1), server(C))
    assert rig.links == [Enlist(server=C, origin="http://c")]
    assert names(rig.given) == ["x"]
    rig.tell(facts.Health(server=C, ok=True), facts.Connected(server=C, client_id="c"))
    assert names(rig.given) == ["x", "y"]


@pytest.mark.parametrize(("run_s", "stops"), [(60.0, ["x"]), (9000.0, [])])
def test_timeouts_hold_for_what_runs_already(run_s, stops):
    rig = Rig(2)
    rig.drop("x")
    rig.accept("x")
    rig.hint("x", Sign.ALIVE)
    policy = replace(POLICY, run_timeout_s=run_s, stall_timeout_s=9000.0)
    looks = reload(rig, server(A), policy=policy)
    assert names(looks, orders.Probe) == ["x"]  # the next look was planned by the old numbers
    probed(rig, "x", Presence.RUNNING)
    assert rig.engine.next_deadline_s() <= rig.now_s + max(run_s, POLICY.stale_after_s)
    given = rig.tell(facts.Tick(), after_s=7201.0 if run_s > 7200 else 61.0)
    assert names(given, orders.Stop) == stops


def test_that_a_server_was_drained_is_forgotten_with_it():
    rig = Rig(2, 2)
    rig.tell(facts.DrainAsked(server=A))
    reload(rig, server(B))
    assert rig.links == [Dismiss(server=A, origin="http://a")]
    assert dict(rig.batch.settings) == {DRAINING: []}


def test_a_server_that_comes_back_after_a_start_without_it_is_not_drained():
    rig = Rig(2, 2)
    rig.settings = {DRAINING: ["b", "gone"]}
    rig.start()
    rig.tell(facts.Tick())
    assert rig.settings == {DRAINING: ["b"]}


def test_what_came_from_a_server_that_has_gone_is_dropped():
    rig = Rig(2, 2)
    reload(rig, server(B))
    rig.tell(facts.Health(server=A, ok=True), facts.Disconnected(server=A, cause="closed"))
    assert [note.data for note in rig.batch.notes] == [{"reason": "unknown_server"}] * 2
