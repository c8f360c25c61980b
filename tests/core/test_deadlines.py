"""Deadlines: when a prompt is stopped for taking too long, how, and what that makes of its job."""

# mypy: disable-error-code="comparison-overlap, unreachable"
# Life.tell changes what mypy believes it has just seen.

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core import facts, fencing, lifecycle, orders
from comfyd.core.facts import Fenced, FetchResult, Presence, Sign, Uncollected
from comfyd.core.fencing import Watch
from comfyd.core.job import Doubted, Due, Orphaned, Recalled, deadline, durations_s, wake_s
from comfyd.core.model import (
    End,
    Fence,
    JobId,
    Outcome,
    PromptId,
    Reason,
    Record,
    Row,
    ServerName,
    State,
    Timeouts,
)
from comfyd.core.policy import has_lasted
from comfyd.core.server import Server
from tests.core.test_engine import A, B, Rig, names
from tests.core.test_lifecycle import ERROR, POLICY, STAGED, SUCCESS, J, Life, at

INTERRUPTED = Record(end=End.INTERRUPTED)
OWN = Timeouts(run_s=100.0, stall_s=7.0)
# Seconds since the epoch, as they are: the last bit of a sum is lost there.
EPOCH_S = st.floats(1.7e9, 1.9e9)
SPAN_S = st.floats(0.001, 10_000)


def past(life: Life) -> Life:
    """Let time pass to the next thing that the job wants to be told of."""
    life.now_s = wake_s(life.job, POLICY)
    assert life.now_s < math.inf
    life.tell(Due())
    return life


def outcome(life: Life) -> Outcome:
    assert life.job.row.outcome is not None
    return life.job.row.outcome


# --- which one, and when -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "signs", "expected"),
    [
        ({}, [], None),  # a queue deadline is only had by those that ask for one
        ({"queue_by": 60.0}, [], (60.0, Reason.QUEUE_TIMEOUT)),
        ({}, [Sign.ALIVE], (POLICY.stall_timeout_s, Reason.STALLED)),
        ({"queue_by": 60.0}, [Sign.ALIVE], (POLICY.stall_timeout_s, Reason.STALLED)),  # it was met
        ({"timeouts": Timeouts(run_s=5.0)}, [Sign.ALIVE], (5.0, Reason.RUN_TIMEOUT)),
        ({"timeouts": Timeouts(stall_s=9e9)}, [Sign.ALIVE], (7200.0, Reason.RUN_TIMEOUT)),
        ({"timeouts": OWN}, [Sign.ALIVE], (7.0, Reason.STALLED)),
        ({"timeouts": OWN}, [Sign.ALIVE, Sign.ENDED], None),  # it has ended: only to be fetched
    ],
)
def test_the_next_deadline_of_a_prompt(
    row: dict[str, Any], signs: list[Sign], expected: tuple[float, Reason] | None
):
    life = Life(**row).accept()
    for sign in signs:
        life.hint(sign)
    assert deadline(life.job, POLICY) == expected


def test_only_what_a_live_connection_would_hear_can_stall():
    life = Life(timeouts=OWN).accept().hint(Sign.ALIVE)
    life.tell(Orphaned("disconnected"))
    assert deadline(life.job, POLICY) == (100.0, Reason.RUN_TIMEOUT)
    loaded = lifecycle.load(
        Life(timeouts=OWN).accept().hint(Sign.ALIVE).job.row, at(3), crashed=True
    )
    assert deadline(loaded.job, POLICY) == (100.0, Reason.RUN_TIMEOUT)


def test_each_sign_of_life_puts_a_stall_off_and_no_other_deadline():
    life = Life(timeouts=OWN).accept().hint(Sign.ALIVE)
    for second in range(5, 100, 5):
        life.now_s = float(second)
        life.hint(Sign.ALIVE)
        stall_s = min(second + 7.0, 100.0)
        assert deadline(life.job, POLICY) is not None
        assert wake_s(life.job, POLICY) == stall_s
    past(life)
    assert life.job.row.why is not None
    assert life.job.row.why.reason is Reason.RUN_TIMEOUT


@pytest.mark.parametrize("crashed", [False, True])
def test_a_run_deadline_is_the_same_after_a_restart(crashed):
    life = Life(timeouts=Timeouts(run_s=50.0)).accept()
    life.now_s = 10.0
    life.hint(Sign.ALIVE)
    for now_s in (30.0, 59.0, 5000.0):  # also if it passed while no daemon ran
        loaded = lifecycle.load(life.job.row, at(now_s), crashed=crashed)
        assert deadline(loaded.job, POLICY) == (60.0, Reason.RUN_TIMEOUT)


def test_a_queue_deadline_is_the_same_after_a_restart():
    row = Life(queue_s=50.0, queue_by=50.0).accept().job.row
    loaded = lifecycle.load(row, at(4000.0), crashed=True)
    assert deadline(loaded.job, POLICY) == (50.0, Reason.QUEUE_TIMEOUT)


def test_no_deadline_grows_when_the_clock_was_set_back():
    rig = Rig(1)
    row = Row(
        job=JobId("x"), seq=0, queue_s=60.0, queue_by=9e9, claimed_at=9e9, state=State.HELD
    )  # fmt: skip
    rig.engine.load([row], crashed=False, now_s=rig.now_s, u=0.0)
    assert rig.engine.jobs[JobId("x")].row.queue_by == rig.now_s + 60.0


# --- a look that is planned for a deadline finds that it has passed ------------------------------


@given(EPOCH_S, SPAN_S)
def test_what_is_planned_for_the_end_of_a_span_finds_it_over(since_s, span_s):
    assert has_lasted(since_s, span_s, now_s=since_s + span_s)
    assert not has_lasted(since_s, span_s, now_s=math.nextafter(since_s + span_s, 0))


def test_what_has_not_begun_has_not_lasted():
    assert not has_lasted(None, 0.0, now_s=math.inf)


@given(EPOCH_S)
def test_absence_is_proven_by_the_look_that_was_planned_to_prove_it(now_s):
    life = Life()
    life.now_s = now_s
    life.accept().tell(Doubted())
    life.probe(Presence.ABSENT).due().probe(Presence.ABSENT)
    assert life.job.row.state is State.QUEUED
    stopped = Life()
    stopped.now_s = now_s
    stopped.accept().tell(facts.CancelAsked(job=J))
    stopped.probe(Presence.ABSENT).due().probe(Presence.ABSENT)
    assert stopped.job.row.state is State.COLLECTING


@given(EPOCH_S)
def test_a_fence_is_lifted_by_the_look_that_was_planned_to_lift_it(now_s):
    fence = Fence(prompt_id=PromptId("p"), job=J, server=ServerName("a"), origin="http://a")
    absent = Fenced(prompt_id=PromptId("p"), presence=Presence.ABSENT)
    watch = fencing.looked(Watch(fence=fence), absent, POLICY, now_s=now_s, u=0.0)
    assert watch is not None
    assert fencing.looked(watch, absent, POLICY, now_s=watch.look_s, u=0.0) is None


@given(EPOCH_S)
def test_hope_ends_when_the_engine_wants_to_be_woken_for_it(now_s):
    rig = Rig(1)
    server = dataclasses.replace(rig.engine.servers[A], unfit_since_s=now_s)
    rig.engine.fleet.put(server)
    ends_s = rig.engine.fleet.hopes_end_s(now_s)
    assert not rig.engine.fleet.is_hopeful(server, ends_s)
    assert rig.engine.fleet.hopes_end_s(ends_s) == math.inf


def test_a_worker_is_dead_after_exactly_as_long_as_it_takes():
    server = Server(name=A, origin="http://a")
    since_s = 1_764_000_000.1
    server = server.looked_at(0, 1, POLICY, now_s=since_s)
    soon_s = math.nextafter(since_s + POLICY.wedge_after_s, 0)
    assert not server.looked_at(0, 1, POLICY, now_s=soon_s).wedged
    assert server.looked_at(0, 1, POLICY, now_s=since_s + POLICY.wedge_after_s).wedged


# --- how each is carried out ---------------------------------------------------------------------


def test_what_runs_for_too_long_is_interrupted_by_id_and_fails_at_once():
    life = past(Life(timeouts=Timeouts(run_s=5.0, stall_s=99.0)).accept().hint(Sign.ALIVE))
    assert [(type(o), o.interrupt) for o in life.orders] == [(orders.Stop, True)]  # type: ignore[union-attr]
    life.probe(Presence.FINISHED, INTERRUPTED)
    assert (outcome(life).reason, life.job.row.charged) == (Reason.RUN_TIMEOUT, 0)
    assert "longer than its run timeout allows (5 s)" in outcome(life).message


def test_a_success_that_came_before_the_interrupt_stands():
    life = past(Life(timeouts=Timeouts(run_s=5.0)).accept().hint(Sign.ALIVE))
    life.probe(Presence.FINISHED, SUCCESS)
    assert outcome(life) == Outcome(state=State.DONE)


def stall(life: Life) -> Life:
    """It runs and says nothing until that is too long, and the look at it agrees."""
    life.accept().hint(Sign.ALIVE)
    past(life)
    assert life.ordered == [orders.Probe]  # what it said may lie unread
    return life.probe(Presence.RUNNING)


@pytest.mark.parametrize(
    "end",
    [
        lambda life: life.probe(Presence.FINISHED, INTERRUPTED),
        lambda life: life.probe(Presence.ABSENT).due().probe(Presence.ABSENT),
        lambda life: life.probe(Presence.REFUSED).due().probe(Presence.REFUSED),
    ],
    ids=["interrupted", "gone", "its server died of it"],
)
def test_what_stalls_is_stopped_charged_once_and_made_again(end):
    life = stall(Life(timeouts=Timeouts(stall_s=7.0), max_attempts=2))
    assert [type(o) for o in life.orders] == [orders.Stop]
    end(life)
    assert (life.job.row.state, life.job.row.charged) == (State.QUEUED, 1)
    assert life.job.row.not_before > life.now_s  # others first
    assert life.job.row.abandoned == ()
    assert [n["charged"] for kind, n in life.notes if kind in {"charged", "lost"}] == [1]
    end(stall(life))
    assert (outcome(life).reason, life.job.row.charged) == (Reason.STALLED, 2)
    assert "without any sign of progress for 7 s" in outcome(life).message


def test_a_stalled_prompt_that_ends_by_itself_is_judged_by_its_record():
    done = stall(Life(timeouts=Timeouts(stall_s=7.0))).probe(Presence.FINISHED, SUCCESS)
    assert (outcome(done).state, done.job.row.charged) == (State.DONE, 0)
    failed = stall(Life(timeouts=Timeouts(stall_s=7.0))).probe(Presence.FINISHED, ERROR)
    assert (outcome(failed).reason, failed.job.row.charged) == (Reason.EXECUTION_ERROR, 0)


@pytest.mark.parametrize("heard", [Presence.RUNNING, Presence.UNKNOWN])
def test_what_cannot_be_stopped_is_given_up_in_writing_and_charged_once(heard):
    life = stall(Life(timeouts=Timeouts(stall_s=7.0)))
    began_s, asked = life.now_s, 0
    while life.job.row.state is State.STOPPING:
        assert life.ordered == [orders.Stop]
        life.probe(heard)
        asked += 1
        if life.job.row.state is State.STOPPING:
            life.due()
    grace_s = POLICY.stop_grace_s if heard is Presence.RUNNING else POLICY.abandon_after_s
    assert grace_s <= life.now_s - began_s < grace_s + POLICY.audit_interval_s
    assert asked > 5
    assert (life.job.row.state, life.job.row.charged) == (State.QUEUED, 1)
    assert len(life.job.row.abandoned) == 1


def test_a_cancel_of_a_stalled_prompt_is_not_charged():
    life = stall(Life(timeouts=Timeouts(stall_s=7.0)))
    life.tell(facts.CancelAsked(job=J))
    life.probe(Presence.FINISHED, INTERRUPTED)
    assert (outcome(life).state, life.job.row.charged) == (State.CANCELLED, 0)


def test_progress_that_was_unread_at_the_deadline_saves_the_prompt():
    life = Life(timeouts=Timeouts(stall_s=7.0)).accept().hint(Sign.ALIVE)
    past(life).hint(Sign.ALIVE).probe(Presence.RUNNING)
    assert life.job.row.state is State.SUBMITTED
    assert wake_s(life.job, POLICY) == 14.0


# --- waiting for the start -----------------------------------------------------------------------


def waited(**row: object) -> Life:
    return past(Life(queue_s=5.0, queue_by=5.0, **row).accept())


def test_what_waits_for_too_long_is_taken_out_of_the_servers_queue():
    life = waited()
    assert [(type(o), o.interrupt) for o in life.orders] == [(orders.Stop, False)]  # type: ignore[union-attr]
    life.probe(Presence.ABSENT).due().probe(Presence.ABSENT)
    assert (outcome(life).reason, life.job.row.charged) == (Reason.QUEUE_TIMEOUT, 0)
    assert "queue timeout (5 s)" in outcome(life).message


@pytest.mark.parametrize("how", ["seen", "heard"])
def test_what_started_unnoticed_is_not_stopped_for_not_having_started(how):
    """Its start can be unheard: a connection was lost, or no daemon ran."""
    life = waited()
    if how == "seen":
        life.probe(Presence.RUNNING)
    else:
        life.hint(Sign.ALIVE)
    assert (life.job.row.state, life.job.row.why) == (State.SUBMITTED, None)
    assert life.job.row.started_at == 5.0
    ends = deadline(life.job, POLICY)
    assert ends is not None
    assert ends[1] is Reason.STALLED


def test_a_restart_past_the_queue_deadline_kills_nothing_that_runs():
    row = Life(queue_s=5.0, queue_by=5.0).accept().job.row
    life = Life()
    life.job, life.now_s = lifecycle.load(row, at(500.0), crashed=False).job, 500.0
    life.tell(Due())
    life.probe(Presence.RUNNING)
    assert (life.job.row.state, life.job.row.why) == (State.SUBMITTED, None)


@pytest.mark.parametrize(
    ("record", "reason"),
    [(SUCCESS, None), (ERROR, Reason.EXECUTION_ERROR), (INTERRUPTED, Reason.INTERRUPTED)],
)
def test_what_ran_and_ended_unnoticed_is_judged_by_its_record(record, reason):
    life = waited().probe(Presence.FINISHED, record)
    assert outcome(life).reason is reason


def test_a_cancel_goes_before_a_queue_timeout():
    life = waited()
    life.tell(facts.CancelAsked(job=J))
    life.probe(Presence.PENDING)
    assert [o.interrupt for o in life.orders] == [True]  # type: ignore[union-attr]
    life.probe(Presence.FINISHED, INTERRUPTED)
    assert outcome(life).state is State.CANCELLED


def test_a_prompt_that_cannot_be_taken_out_of_the_queue_is_given_up_in_writing():
    life = waited()
    while life.job.row.state is State.STOPPING:
        life.probe(Presence.PENDING)
        if life.job.row.state is State.STOPPING:
            life.due()
    assert life.now_s == 5.0 + POLICY.stop_grace_s
    assert outcome(life).reason is Reason.QUEUE_TIMEOUT
    assert len(life.job.row.abandoned) == 1


def test_a_job_that_ran_is_past_its_queue_deadline_when_it_is_made_again():
    """Nobody heard that it ran; its record says so. Its outputs are lost."""
    life = Life(queue_s=5.0, queue_by=5.0).accept()
    life.tell(Doubted())
    life.probe(Presence.FINISHED, SUCCESS)
    life.tell(
        facts.CollectFailed(token=life.token, cause=Uncollected.MISSING, message="gone"),
        after_s=60.0,
    )
    assert (life.job.row.state, life.job.row.queue_by) == (State.QUEUED, None)


def test_a_prompt_that_is_fetched_back_and_runs_is_left_alone():
    life = Life().accept()
    life.tell(Recalled())
    assert [o.interrupt for o in life.orders] == [False]  # type: ignore[union-attr]
    life.probe(Presence.RUNNING)
    assert (life.job.row.state, life.job.row.why) == (State.SUBMITTED, None)


# --- in our own queue ----------------------------------------------------------------------------


def test_a_job_that_no_server_takes_in_time_fails_wherever_it_waits():
    rig = Rig(1)
    rig.tell(facts.Health(server=A, ok=False))
    rig.drop("x", queue_s=60.0, queue_by=rig.now_s + 60.0)
    rig.drop("y")
    assert rig.engine.next_deadline_s() == rig.now_s + 60.0
    rig.tell(facts.Tick(), after_s=59.5)
    assert rig.store[JobId("x")].state is State.QUEUED
    rig.tell(facts.Tick(), after_s=0.5)
    row = rig.store[JobId("x")]
    assert row.outcome is not None
    assert row.outcome.reason is Reason.QUEUE_TIMEOUT
    assert rig.store[JobId("y")].state is State.QUEUED


def test_a_queue_deadline_that_passed_while_no_daemon_ran_is_found_at_start():
    rig = Rig(1)
    rig.tell(facts.Health(server=A, ok=False))
    rig.drop("x", queue_s=60.0, queue_by=rig.now_s + 60.0)
    rig.now_s += 1000.0
    rig.start()
    rig.tell()
    row = rig.store[JobId("x")]
    assert row.outcome is not None
    assert row.outcome.reason is Reason.QUEUE_TIMEOUT


def test_a_held_job_has_no_deadline_and_a_released_one_all_its_time_again():
    rig = Rig(1)
    rig.tell(facts.Health(server=A, ok=False))
    rig.drop("x", queue_s=60.0, queue_by=rig.now_s + 60.0)
    rig.tell(facts.HoldAsked(job=JobId("x"), reason="asked"))
    rig.tell(facts.Tick(), after_s=1000.0)
    assert rig.store[JobId("x")].state is State.HELD
    rig.tell(facts.ReleaseAsked(job=JobId("x")))
    assert rig.engine.next_deadline_s() == rig.now_s + 60.0


def test_a_full_disk_leaves_nothing_due_that_cannot_be_done():
    """A prompt would be fetched back for an idle server in a while; then nothing may be sent."""
    rig = Rig(2, 1)
    rig.tell(facts.DrainAsked(server=B))
    rig.drop("x", "y")
    rig.accept("x", "y")
    rig.hint("x", Sign.ALIVE)
    rig.tell(facts.ResumeAsked(server=B))
    assert rig.engine.next_deadline_s() == rig.now_s + POLICY.recall_after_s
    rig.tell(facts.SpaceSeen(enough=False))
    rig.tell(facts.Tick(), after_s=POLICY.recall_after_s)
    assert rig.engine.next_deadline_s() > rig.now_s  # or the auditor would never sleep
    rig.tell(facts.SpaceSeen(enough=True))
    assert names(rig.given, orders.Stop) == ["y"]


def test_the_end_of_a_prompt_is_fetched_and_no_deadline_comes_between():
    life = Life(timeouts=Timeouts(run_s=5.0)).accept().hint(Sign.ALIVE).hint(Sign.ENDED)
    life.fetch(None, FetchResult.EMPTY)
    while life.now_s < 100.0:
        past(life)
        if life.ordered == [orders.Fetch]:
            life.fetch(None, FetchResult.ERROR)
        else:
            life.probe(Presence.RUNNING)
    assert life.job.row.state is State.SUBMITTED
    life.tell(Doubted())
    life.probe(Presence.FINISHED, SUCCESS)
    life.tell(facts.Collected(token=life.token, staged=STAGED))
    assert outcome(life).state is State.DONE


def test_the_time_on_a_server_ends_when_the_prompt_is_seen_to_be_over():
    """Not when its error was written: that is no time of collecting."""
    life = Life(queue_s=5.0, queue_by=5.0).accept()
    past(life).probe(Presence.ABSENT)
    life.due().probe(Presence.ABSENT)
    assert outcome(life).reason is Reason.QUEUE_TIMEOUT
    ended_s = life.now_s
    life.now_s += 3
    spans = durations_s(life.finish().job.row)
    assert spans["queue"] + spans["run"] == ended_s
    assert spans["collect"] == 3
