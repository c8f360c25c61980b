"""Jobs of which a server accepts only a part, whether its answer says so or is lost."""

from __future__ import annotations

from comfyd.core import facts
from comfyd.core.facts import Presence
from comfyd.core.model import End, FileRef, JobId, Reason, Record, State
from tests.core.test_engine import POLICY, A, B, Rig, end

MADE = Record(end=End.SUCCESS, files=(FileRef(node="9", key="images", filename="a.png"),))
NO_MODEL = {"8": {"class_type": "SaveImage", "errors": []}}


def in_part(rig: Rig, name: str) -> None:
    """Its server accepts only a part of *name*, and the rest of it is seen to be gone."""
    rig.tell(facts.Accepted(token=rig.token(name), node_errors=NO_MODEL))
    assert rig.store[JobId(name)].state is State.STOPPING
    rig.tell(facts.Probed(token=rig.token(name), presence=Presence.ABSENT))
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    rig.tell(facts.Probed(token=rig.token(name), presence=Presence.ABSENT))


def test_what_one_server_accepts_in_part_is_tried_on_the_others_at_no_charge():
    rig = Rig(1, 1)
    rig.drop("x")
    in_part(rig, "x")
    row = rig.store[JobId("x")]
    assert (row.state, row.server, row.charged) == (State.SUBMITTING, B, 0)
    assert [(said.server, said.outcome.reason) for said in row.verdicts] == [(A, Reason.PARTIAL)]
    in_part(rig, "x")
    outcome = rig.outcome("x")
    assert (outcome.state, outcome.reason) == (State.FAILED, Reason.PARTIAL)
    assert outcome.message.endswith("correct them. (the same on a)")


def test_a_part_that_succeeds_before_it_is_stopped_is_no_result():
    rig = Rig(1, 1)
    rig.drop("x")
    rig.tell(facts.Accepted(token=rig.token("x"), node_errors=NO_MODEL))
    done = Record(end=End.SUCCESS)
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.FINISHED, record=done))
    row = rig.store[JobId("x")]
    assert (row.state, row.server) == (State.SUBMITTING, B)


SHORT = Record(end=End.SUCCESS, unrun=("8",))


def unheard(rig: Rig, name: str, record: Record) -> None:
    """The answer to its POST is lost, and a look finds it finished."""
    rig.tell(facts.SubmitUnknown(token=rig.token(name), reason="timeout"))
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    found = facts.Probed(token=rig.token(name), presence=Presence.FINISHED, record=record)
    rig.tell(found)


def test_outputs_that_nobody_spoke_of_are_asked_for_once_more():
    """The answer that would have said it was lost: the next one tells."""
    rig = Rig(1)
    rig.drop("x")
    unheard(rig, "x", SHORT)
    row = rig.store[JobId("x")]
    assert (row.state, row.attempt, row.charged) == (State.SUBMITTING, 2, 0)
    rig.tell(facts.Accepted(token=rig.token("x")))  # all of it: that node is no output
    end(rig, [JobId("x")], SHORT)
    assert rig.outcome("x").state is State.DONE


def test_a_job_whose_answers_are_always_lost_does_not_run_for_ever():
    rig = Rig(1)
    rig.drop("x", max_attempts=2)
    unheard(rig, "x", SHORT)
    unheard(rig, "x", SHORT)
    outcome = rig.outcome("x")
    assert (outcome.state, outcome.reason) == (State.FAILED, Reason.PARTIAL)
    assert outcome.message.startswith("Server a did not run nodes 8, and did not say, or was not")


def test_who_accepts_a_part_is_told_what_is_not_known():
    rig = Rig(1)
    rig.drop("x", accept_partial=True)
    unheard(rig, "x", SHORT)
    assert rig.outcome("x").state is State.DONE
    assert any("did not run nodes 8" in text for text in rig.store[JobId("x")].warnings)


def test_a_graph_that_ran_whole_needs_no_answer():
    rig = Rig(1)
    rig.drop("x")
    unheard(rig, "x", MADE)
    assert rig.outcome("x").state is State.DONE


def test_a_cancelled_job_of_which_a_part_succeeds_first_is_cancelled():
    rig = Rig(1)
    rig.drop("x")
    rig.tell(facts.CancelAsked(job=JobId("x")))
    rig.tell(facts.Accepted(token=rig.token("x"), node_errors=NO_MODEL))
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.FINISHED, record=SHORT))
    assert rig.outcome("x").reason is Reason.CANCELLED
