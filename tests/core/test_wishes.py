"""Replies to wishes: read off what is so, never told from what was asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import msgspec
import pytest

from comfyd.core import keys, wishes
from comfyd.core.model import JobId, Outcome, Reason, Row, ServerName, State
from comfyd.core.present import SHOWN_STATES, shown_state
from comfyd.core.server import Server
from comfyd.core.snapshot import ServerState, state_of

JOB = JobId("fox.01K0000000000000000000000A")
OTHER = JobId("fox.01K0000000000000000000000B")
CANCELLED = Outcome(state=State.CANCELLED, reason=Reason.CANCELLED)
DONE = Outcome(state=State.DONE)
FAILED = Outcome(state=State.FAILED, reason=Reason.EXECUTION_ERROR)
LATE = Outcome(state=State.FAILED, reason=Reason.RUN_TIMEOUT)
A = Server(name=ServerName("a"), origin="http://a", up=True)


def row(state: State, **changes: Any) -> Row:
    return Row(job=JOB, seq=1, state=state, **changes)


QUEUED, HELD = row(State.QUEUED), row(State.HELD)
RUNNING = row(State.SUBMITTED, started_at=1.0)


@pytest.mark.parametrize(
    ("before", "after", "ok", "outcome", "what"),
    [
        (QUEUED, row(State.CANCELLED, outcome=CANCELLED), True, "cancelled", "cancelled"),
        (RUNNING, row(State.CANCELLED, why=CANCELLED), True, "cancelled", "cancelled"),
        (RUNNING, row(State.DONE, outcome=DONE, why=CANCELLED), False, "too_late", "delivered"),
        (RUNNING, row(State.FAILED, outcome=FAILED), False, "too_late", "(execution_error)"),
        (RUNNING, row(State.COLLECTING, outcome=DONE), False, "too_late", "being delivered"),
        (
            RUNNING,
            row(State.COLLECTING, outcome=DONE, why=CANCELLED),
            False,
            "too_late",
            "being delivered",
        ),
        (RUNNING, row(State.PUBLISHING, outcome=CANCELLED), False, "stopping", "as soon as"),
        (RUNNING, row(State.STOPPING, why=CANCELLED), False, "stopping", "still stopping"),
        (RUNNING, row(State.SUBMITTING, why=CANCELLED), False, "stopping", "still stopping"),
        (RUNNING, row(State.STOPPING, why=LATE), False, "stopping", "(run_timeout)"),
        (QUEUED, QUEUED, False, "waiting", "still queued"),
        (RUNNING, RUNNING, False, "waiting", "still running"),
        (row(State.DONE), row(State.DONE), False, "already", "already done"),
        (row(State.FAILED), row(State.FAILED), False, "already", "already failed"),
        (row(State.CANCELLED), row(State.CANCELLED), True, "already", "already cancelled"),
    ],
)
def test_what_became_of_a_cancel(before: Row, after: Row, ok: bool, outcome: str, what: str):
    reply = wishes.cancelled(before, after)
    assert (reply.ok, reply.outcome, reply.state) == (ok, outcome, shown_state(after))
    assert what in reply.what


@pytest.mark.parametrize(
    ("verb", "before", "after", "ok", "what"),
    [
        ("hold", QUEUED, HELD, True, "held"),
        ("hold", HELD, HELD, True, "already held"),
        ("hold", QUEUED, QUEUED, False, "not held yet"),
        ("hold", QUEUED, RUNNING, False, "too late: it is running"),
        ("hold", RUNNING, RUNNING, False, "too late: it is running"),
        ("hold", row(State.DONE), row(State.DONE), False, "already done"),
        ("release", HELD, QUEUED, True, "released"),
        ("release", HELD, RUNNING, True, "released"),
        ("release", HELD, HELD, False, "not released yet"),
        ("release", QUEUED, QUEUED, True, "was not held: it is queued"),
        ("release", RUNNING, RUNNING, False, "was not held: it is running"),
        ("release", row(State.FAILED), row(State.FAILED), False, "already failed"),
    ],
)
def test_what_became_of_a_hold_or_release(verb: str, before: Row, after: Row, ok: bool, what: str):
    _, reply_of = wishes.VERBS[verb]
    reply = reply_of(before, after)
    assert (reply.ok, reply.job) == (ok, JOB)
    assert reply.what.startswith(what)


OUTCOMES = (None, DONE, FAILED, CANCELLED)


def test_only_what_is_so_is_called_so():
    """For every pair of rows that there may be: ok means that it is as was asked."""
    meant = {"cancel": {"cancelled"}, "hold": {"held"}}
    for verb, (_, reply_of) in wishes.VERBS.items():
        for before, after, outcome, why in product(State, State, OUTCOMES, OUTCOMES):
            now = row(after, outcome=outcome, why=why)
            reply = reply_of(row(before), now)
            assert reply.what
            assert reply.to_dict()["state"] in SHOWN_STATES
            if reply.ok and verb in meant and not before.final:
                assert reply.state in meant[verb], (verb, before, now)
            if reply.ok and verb == "release":
                assert before in {State.HELD, State.QUEUED}


def test_verbs_are_for_states_that_are_shown():
    for verb, states in wishes.ALLOWED.items():
        assert set(wishes.CONCERNED[verb]) <= set(states) <= set(SHOWN_STATES)


def test_a_retry_is_for_what_has_ended_and_never_makes_a_second_live_job_of_one_key():
    old = row(State.FAILED, key="k")
    other = Row(job=OTHER, seq=2, key="k")
    assert wishes.why_no_retry(old, None) == ""
    assert wishes.why_no_retry(old, old) == ""
    assert other.job in wishes.why_no_retry(old, other)
    ended = Row(job=other.job, seq=2, key="k", state=State.DONE)
    assert wishes.why_no_retry(old, ended) == ""
    assert "it is running" in wishes.why_no_retry(RUNNING, None)


def test_a_job_whose_key_another_one_has_is_not_retried_without_it():
    drop = row(State.QUEUED, key="k", sha256="1")
    judged = keys.judge(drop, Row(job=OTHER, seq=2, key="k", sha256="2"))
    assert isinstance(judged, Row)
    assert OTHER in wishes.why_no_retry(msgspec.structs.replace(judged, state=State.FAILED), None)
    folder = Outcome(state=State.FAILED, reason=Reason.CONFLICT, message="There is a folder.")
    assert wishes.why_no_retry(row(State.FAILED, outcome=folder), None) == ""


# --- intake and servers --------------------------------------------------------------------------


def test_what_became_of_the_intake():
    assert wishes.paused(False, True)[0]
    assert "already" in wishes.paused(True, True)[1]
    assert not wishes.paused(False, False)[0]
    assert wishes.resumed(True, False, [A]) == (True, "The intake goes on.")
    assert "not paused" in wishes.resumed(False, False, [A])[1]
    assert "Still drained: a;" in wishes.resumed(True, False, [replace(A, draining=True)])[1]
    assert not wishes.resumed(True, True, [A])[0]


def test_what_became_of_a_server():
    drained = replace(A, draining=True)
    assert wishes.drained(A, drained, 2) == (True, "a gets nothing more; 2 prompts to finish.")
    assert "drained already; nothing of ours" in wishes.drained(drained, drained, 0)[1]
    assert not wishes.drained(A, A, 0)[0]
    assert wishes.server_resumed(drained, "", A, "") == (True, "a may be used again.")
    down = replace(A, up=False)
    assert "as soon as it answers" in wishes.server_resumed(drained, "", down, "")[1]
    assert wishes.server_resumed(A, "Stuck.", A, "") == (True, "a may be used again.")
    assert "neither" in wishes.server_resumed(A, "", A, "")[1]
    assert wishes.server_resumed(A, "Stuck.", A, "Stuck.") == (False, "a is still not used: Stuck.")
    assert not wishes.server_resumed(drained, "", drained, "")[0]


def test_a_server_that_answers_is_not_forgotten():
    assert "drain it instead" in wishes.why_not_forget(A.name, A)
    assert "not looked at yet" in wishes.why_not_forget(A.name, replace(A, up=None))
    assert wishes.why_not_forget(A.name, replace(A, up=False)) == ""
    assert wishes.why_not_forget(A.name, None) == ""
    assert wishes.forgotten(A.name, 1, 0)[1].startswith("a is given up: 1 prompt written off")
    assert wishes.forgotten(A.name, 0, 0) == (True, "a had nothing of ours.")
    assert not wishes.forgotten(A.name, 2, 1)[0]


@pytest.mark.parametrize(
    ("changes", "trouble", "state", "reason"),
    [
        ({}, "", ServerState.UP, ""),
        ({"stalled": True}, "", ServerState.DEAF, ""),
        ({"stalled": True, "draining": True}, "", ServerState.DRAINING, "3 prompts to finish"),
        ({"draining": True}, "Nothing moves.", ServerState.WEDGED, "Nothing moves; drained"),
        ({"up": False, "draining": True}, "Nothing moves.", ServerState.DOWN, "refused; drained"),
        ({"up": False, "draining": True}, "", ServerState.DOWN, "refused; drained"),
        ({"up": None}, "", ServerState.DOWN, "refused"),
        ({"refusal": "too old"}, "", ServerState.DOWN, "refused"),
    ],
)
def test_a_server_has_one_word_and_its_reason(changes, trouble, state, reason):
    server = replace(A, **changes)
    told = state_of(server, trouble=trouble, down="refused", in_flight=3)
    assert told[0] is state
    assert told[1].endswith(reason)
    assert bool(told[1]) is bool(reason)


def test_a_server_that_is_fenced_says_what_it_waits_for():
    told = state_of(A, trouble="", down="", in_flight=0, fences=1)
    assert told == (ServerState.UP, "gets nothing until 1 prompt given up there ended for sure")
