"""Fences: how long a server gets nothing new for an attempt that was given up on it."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core import facts, orders
from comfyd.core.facts import Fenced, Presence, Sign
from comfyd.core.fencing import Watch, again_soon, looked
from comfyd.core.model import (
    End,
    Fence,
    JobId,
    Outcome,
    PromptId,
    Record,
    ServerName,
    State,
    prompt_id_of,
)
from comfyd.core.policy import Policy
from tests.core.test_engine import A, B, Rig, names

POLICY = Policy()
NOW_S = 1000.0
FENCE = Fence(prompt_id=PromptId("p"), job=JobId("x"), server=ServerName("a"), origin="http://a")
SUCCESS = Record(end=End.SUCCESS)
FIRST_SUCCEEDED = Fenced(
    prompt_id=prompt_id_of(JobId("x"), 1), presence=Presence.FINISHED, record=SUCCESS
)
OVER = (Presence.ABSENT, Presence.REFUSED, Presence.UNREADABLE)
ALIVE = (Presence.PENDING, Presence.RUNNING)


def said(presence: Presence, record: Record | None = None) -> Fenced:
    return Fenced(prompt_id=FENCE.prompt_id, presence=presence, record=record)


def after(watch: Watch | None, presence: Presence, *, now_s: float) -> Watch | None:
    assert watch is not None
    return looked(watch, said(presence), POLICY, now_s=now_s, u=0.0)


# --- one fence -----------------------------------------------------------------------------------


def test_a_record_ends_a_fence_at_once():
    watch = Watch(fence=FENCE, asked=True, alive_s=1.0)
    finished = said(Presence.FINISHED, SUCCESS)
    assert looked(watch, finished, POLICY, now_s=NOW_S, u=0.0) is None


@pytest.mark.parametrize("presence", OVER)
def test_what_is_not_there_is_over_when_it_stays_away(presence):
    watch = after(Watch(fence=FENCE), presence, now_s=NOW_S)
    assert watch is not None
    assert watch.look_s == NOW_S + POLICY.lost_grace_s
    early = after(watch, presence, now_s=watch.look_s - 1)
    assert early is not None
    assert early.look_s == watch.look_s  # the same proof goes on
    assert after(early, presence, now_s=watch.look_s) is None


@pytest.mark.parametrize("presence", ALIVE)
def test_what_is_still_there_is_told_to_stop_again_and_again_and_makes_its_server_stuck(presence):
    watch: Watch | None = Watch(fence=FENCE)
    now_s, waits = NOW_S, []
    for _ in range(8):
        watch = after(watch, presence, now_s=now_s)
        assert watch is not None
        waits.append(watch.look_s - now_s)
        assert watch.is_stubborn(POLICY, now_s=now_s) == (now_s > NOW_S)
        now_s = watch.look_s
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_one_that_comes_back_begins_the_proof_anew():
    watch = after(Watch(fence=FENCE), Presence.ABSENT, now_s=NOW_S)
    watch = after(watch, Presence.RUNNING, now_s=NOW_S + 10)
    watch = after(watch, Presence.ABSENT, now_s=NOW_S + 20)
    assert watch is not None
    assert not watch.is_stubborn(POLICY, now_s=NOW_S + 20)
    watch = after(watch, Presence.ABSENT, now_s=NOW_S + 34)
    assert watch is not None
    assert after(watch, Presence.ABSENT, now_s=NOW_S + 35) is None


def test_no_answer_proves_nothing_and_takes_nothing_back():
    watch = after(Watch(fence=FENCE), Presence.ABSENT, now_s=NOW_S)
    watch = after(watch, Presence.UNKNOWN, now_s=NOW_S + 1000)
    assert watch is not None
    assert watch.absent_s == NOW_S


def test_again_soon_asks_once_more_and_knows_what_it_knew():
    watch = Watch(fence=FENCE, asked=True, alive_s=5.0, tries=3)
    again = again_soon(watch, POLICY, now_s=NOW_S)
    assert (again.asked, again.look_s) == (False, NOW_S + POLICY.stop_retry_s)
    assert (again.alive_s, again.tries) == (5.0, 3)


@given(st.lists(st.tuples(st.sampled_from(list(Presence)), st.floats(0.0, 40.0)), max_size=40))
def test_a_fence_is_lifted_by_a_record_or_by_a_whole_grace_of_absence_and_nothing_else(answers):
    watch: Watch | None = Watch(fence=FENCE, asked=True)
    now_s, absent_s = NOW_S, None
    for presence, passed_s in answers:
        now_s += passed_s
        if presence in ALIVE:
            absent_s = None
        elif presence in OVER and absent_s is None:
            absent_s = now_s
        long = absent_s is not None and now_s >= absent_s + POLICY.lost_grace_s
        watch = after(watch, presence, now_s=now_s)
        assert (watch is None) == (presence is Presence.FINISHED or (presence in OVER and long))
        if watch is None:
            return
        assert not watch.asked
        assert now_s < watch.look_s <= now_s + POLICY.retry_max_s


# --- in the engine -------------------------------------------------------------------------------


def given_up() -> Rig:
    """x was on A, which is forgotten and comes back; B is down."""
    rig = Rig(2, 2)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    rig.accept("x")
    rig.tell(facts.Disconnected(server=A, cause="ping_timeout"), facts.Health(server=A, ok=False))
    rig.tell(facts.ForgetAsked(server=A))
    rig.given.clear()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="again"))
    return rig


def tell_fenced(rig: Rig, presence: Presence, record: Record | None = None) -> None:
    (fence,) = rig.fences.values()
    rig.tell(Fenced(prompt_id=fence.prompt_id, presence=presence, record=record))


def test_nothing_is_sent_before_the_old_attempt_is_proven_over():
    rig = given_up()
    assert (len(rig.fenced), rig.given) == (1, [])
    tell_fenced(rig, Presence.ABSENT)
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.lost_grace_s
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    assert (len(rig.fenced), rig.given) == (2, [])
    tell_fenced(rig, Presence.ABSENT)
    assert (rig.fences, names(rig.given)) == ({}, ["x"])


def test_a_fence_outlives_a_restart():
    rig = given_up()
    rig.start()
    rig.fenced.clear()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="again"))
    assert ([order.fence for order in rig.fenced], rig.given) == (list(rig.fences.values()), [])


def test_a_server_that_is_down_is_not_asked_and_nobody_is_woken_for_it():
    rig = given_up()
    tell_fenced(rig, Presence.UNKNOWN)
    rig.tell(facts.Health(server=A, ok=False))
    assert rig.engine.next_deadline_s() == math.inf
    rig.tell(facts.Tick(), after_s=1000.0)
    assert len(rig.fenced) == 1


def test_the_first_success_wins_although_it_was_given_up():
    rig = given_up()
    tell_fenced(rig, Presence.FINISHED, SUCCESS)
    row = rig.store[JobId("x")]
    assert (row.outcome, row.server) == (Outcome(state=State.DONE), A)
    assert (row.prompt_id, rig.fences) == (prompt_id_of(JobId("x"), 1), {})


def test_a_success_ends_the_attempt_that_was_made_in_its_place():
    rig = given_up()
    rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    rig.accept("x")
    assert rig.engine.jobs[JobId("x")].row.server == B
    rig.tell(FIRST_SUCCEEDED)
    row = rig.store[JobId("x")]
    assert (row.outcome, row.server) == (Outcome(state=State.DONE), A)
    assert [(f.server, f.prompt_id) for f in rig.fences.values()] == [(B, prompt_id_of(row.job, 2))]


def test_a_success_waits_while_the_present_attempt_is_spoken_of():
    rig = given_up()
    rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    rig.tell(FIRST_SUCCEEDED)  # the POST to B is on its way
    assert rig.store[JobId("x")].state is State.SUBMITTING
    rig.accept("x")
    rig.tell(facts.Tick(), after_s=POLICY.stop_retry_s)
    rig.tell(FIRST_SUCCEEDED)
    assert rig.store[JobId("x")].outcome == Outcome(state=State.DONE)


@pytest.mark.parametrize(
    "record",
    [
        Record(end=End.INTERRUPTED),
        Record(end=End.ERROR),
        Record(end=End.SUCCESS, ours=("other", 1)),
    ],
)
def test_any_other_end_of_it_changes_nothing(record):
    rig = given_up()
    tell_fenced(rig, Presence.FINISHED, record)
    assert names(rig.given) == ["x"]
    assert rig.store[JobId("x")].charged == 0


def test_a_success_of_a_job_that_has_ended_is_not_delivered_again():
    rig = given_up()
    rig.tell(facts.CancelAsked(job=JobId("x")))
    tell_fenced(rig, Presence.FINISHED, SUCCESS)
    assert rig.fences  # a moment later: its cancellation is being written
    outcome = rig.store[JobId("x")].outcome
    assert outcome is not None
    assert outcome.state is State.CANCELLED


def test_an_answer_that_nobody_asked_for_is_dropped():
    rig = given_up()
    for _ in range(2):
        rig.tell(Fenced(prompt_id=PromptId("nobody's"), presence=Presence.FINISHED, record=SUCCESS))
        assert [note.kind for note in rig.batch.notes] == ["dropped"]
    assert len(rig.fences) == 1


def test_a_prompt_that_goes_on_for_ever_keeps_its_server_out_and_says_so():
    rig = given_up()
    for _ in range(4):
        tell_fenced(rig, Presence.RUNNING)
        rig.tell(facts.Tick(), after_s=rig.engine.next_deadline_s() - rig.now_s)
    assert "goes on" in rig.engine.trouble(A)
    assert rig.given == []
    assert all(isinstance(order, orders.Fence) for order in rig.fenced)
    rig.tell(facts.Health(server=B, ok=True), facts.Connected(server=B, client_id="b"))
    assert [order.row.server for order in rig.given] == [B]
    assert rig.hint("x", Sign.ENDED) == []  # of the attempt that was given up


def test_a_name_that_has_another_url_since_a_restart_may_be_forgotten_as_what_it_was():
    rig = Rig(2)
    rig.drop("old")
    rig.accept("old")
    old = rig.store[JobId("old")]
    rig.store[old.job] = msgspec.structs.replace(old, origin="http://elsewhere")
    rig.start()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="new"))
    rig.drop("new")
    rig.accept("new")
    assert [job.row.job for job in rig.engine.forgettable(A)] == ["old"]
    rig.tell(facts.ForgetAsked(server=A))
    assert rig.store[JobId("old")].abandoned[0][:2] == ("a", "http://elsewhere")
    assert rig.store[JobId("old")].origin == "http://a"  # sent anew, to what has the name now
    assert rig.store[JobId("new")].abandoned == ()
