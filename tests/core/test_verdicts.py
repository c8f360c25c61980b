"""Second opinions: who is asked, who is believed, and what the job is told in the end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from comfyd.core import facts, verdicts
from comfyd.core.facts import FetchResult, Presence, Sign
from comfyd.core.job import Ask
from comfyd.core.model import (
    End,
    JobId,
    NodeFailure,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    State,
    Verdict,
)
from tests.core.test_engine import CUDA, A, B, Rig, end, here, raised

X = JobId("x")
NO = Outcome(state=State.FAILED, reason=Reason.REJECTED, message="no such model", detail={"a": 1})
RAISED = Outcome(state=State.FAILED, reason=Reason.EXECUTION_ERROR, message="node 3 raised")
SUCCESS = Record(end=End.SUCCESS)


def row(*said: tuple[str, Outcome], server: str | None = "b") -> Row:
    each = (Verdict(server=ServerName(s), origin=f"http://{s}", outcome=o) for s, o in said)
    return Row(
        job=X, seq=0, verdicts=tuple(each), server=None if server is None else ServerName(server)
    )  # fmt: skip


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "outcome", "asks"),
    [
        ((), NO, True),
        ((), RAISED, True),
        ((("a", NO),), NO, True),  # each other server once: a model may be anywhere
        ((("a", NO),), RAISED, True),
        ((("a", RAISED),), NO, True),
        ((("a", RAISED),), RAISED, False),  # one other: it may run for hours
        ((), Outcome(state=State.DONE), False),
        *(
            ((), Outcome(state=State.FAILED, reason=reason), False)
            for reason in Reason
            if reason not in {Reason.REJECTED, Reason.EXECUTION_ERROR}
        ),
    ],
)
def test_what_calls_for_another_opinion(said, outcome, asks):
    assert verdicts.asks_elsewhere(row(*said), outcome) == asks


def test_only_that_server_at_that_url_has_said_it():
    one = row(("a", NO))
    assert verdicts.has_said(one, A, "http://a")
    assert not verdicts.has_said(one, B, "http://b")
    assert not verdicts.has_said(one, A, "http://elsewhere")


def test_the_last_word_names_those_who_agree_and_quotes_those_who_do_not():
    told = verdicts.final(row(("a", NO), ("c", RAISED)), NO)
    assert told.message == "no such model (the same on a) On c before: node 3 raised"
    assert told.detail == {
        "a": 1,
        "elsewhere": [
            {"server": "a", "reason": "rejected", "message": "no such model"},
            {"server": "c", "reason": "execution_error", "message": "node 3 raised"},
        ],
    }


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ((), NO),
        ((("b", NO),), NO),  # it said so itself
        ((("a", NO),), Outcome(state=State.DONE)),
        ((("a", NO),), Outcome(state=State.FAILED, reason=Reason.RUN_TIMEOUT, message="long")),
    ],
)
def test_what_others_said_is_not_told_where_it_does_not_matter(said, outcome):
    assert verdicts.final(row(*said), outcome) == outcome


def test_when_nobody_is_left_the_last_verdict_stands_with_those_before_it():
    told = verdicts.last(row(("a", NO), ("b", RAISED), server=None))
    assert told.reason is Reason.EXECUTION_ERROR
    assert told.message == "node 3 raised On a before: no such model"
    assert verdicts.last(row(("a", NO), server=None)) == NO


@pytest.mark.parametrize(
    ("exception_type", "message", "card"),
    [
        ("RuntimeError", CUDA, True),
        ("torch.OutOfMemoryError", "Allocation on device", True),
        ("RuntimeError", "HIP error: invalid device function", True),
        ("RuntimeError", "MPS backend out of memory", True),
        ("ValueError", "shapes differ", False),
        ("KeyError", "'barracuda'", False),
        ("RuntimeError", "the chip is misshapen", False),
        ("FileNotFoundError", "models/cuda_lora.safetensors", False),
    ],
)
def test_which_exceptions_speak_of_the_card(exception_type, message, card):
    failure = NodeFailure(
        node="3", node_type="KSampler", exception_type=exception_type, message=message
    )  # fmt: skip
    assert verdicts.blames_the_card(failure) == card
    assert not verdicts.blames_the_card(None)


# --- in the engine -------------------------------------------------------------------------------


def reject(rig: Rig, message: str = "no such model") -> None:
    rig.tell(facts.Rejected(token=rig.token("x"), message=message))


def outcome(rig: Rig) -> Outcome:
    found = rig.store[X].outcome
    assert found is not None
    return found


def test_each_server_is_asked_once_before_a_job_is_rejected():
    rig = Rig(1, 1)
    rig.drop("x")
    first = rig.store[X].server
    reject(rig)
    assert (rig.store[X].state, rig.store[X].server) == (State.SUBMITTING, B if first == A else A)
    reject(rig)
    assert outcome(rig).reason is Reason.REJECTED
    assert (rig.store[X].charged, rig.store[X].attempt) == (0, 2)
    assert "(the same on a)" in outcome(rig).message


def test_a_success_elsewhere_is_a_success_that_says_who_did_not():
    rig = Rig(1, 1)
    rig.drop("x")
    reject(rig)
    end(rig, here(rig, A, B), SUCCESS)
    assert outcome(rig).state is State.DONE
    assert rig.store[X].warnings[-1] == "Server a did not: no such model"


def test_the_only_server_is_believed_at_once():
    rig = Rig(1)
    rig.drop("x")
    reject(rig)
    assert outcome(rig).reason is Reason.REJECTED


@pytest.mark.parametrize(
    "news",
    [
        facts.DrainAsked(server=B),
        facts.Health(server=B, ok=True, refusal="too old"),
    ],
)
def test_a_server_that_may_not_be_asked_is_not_waited_for(news):
    rig = Rig(1, 1)
    rig.tell(news)
    rig.drop("x")
    reject(rig)
    assert outcome(rig).reason is Reason.REJECTED


def test_a_second_opinion_waits_its_turn_and_keeps_its_place_in_the_queue():
    rig = Rig(1, 1)
    rig.drop("x", "busy")
    rig.drop("later")
    reject(rig)  # only b is left for it, and b is busy; a takes the next
    assert rig.store[X].state is State.QUEUED
    assert rig.store[JobId("later")].server == A
    rig.accept("busy")
    end(rig, [JobId("busy")], SUCCESS)
    assert (rig.store[X].state, rig.store[X].server) == (State.SUBMITTING, B)


def test_verdicts_outlive_a_restart():
    rig = Rig(1, 1)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    reject(rig)
    rig.start()
    given = rig.tell(
        *(facts.Health(server=name, ok=True) for name in (A, B)),
        *(facts.Connected(server=name, client_id="again") for name in (A, B)),
    )
    assert [(order.row.job, order.row.server) for order in given] == [("x", B)]


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        (CUDA, "shapes differ", {A: 0, B: 0}),  # it raised on both: its own fault
        (CUDA, None, {A: 1, B: 0}),
        ("shapes differ", None, {A: 1, B: 0}),  # it succeeds elsewhere: perhaps the server's
    ],
)
def test_who_is_blamed(first: str, second: str | None, blamed: dict[ServerName, int]):
    rig = Rig(1, 1)
    rig.drop("x")
    end(rig, here(rig, A), raised(first))
    end(rig, here(rig, B), SUCCESS if second is None else raised(second))
    strikes: dict[Any, int] = {s.name: len(s.strikes) for s in rig.engine.servers.values()}
    assert strikes == blamed
    assert outcome(rig).state is (State.DONE if second is None else State.FAILED)
    assert rig.store[X].charged == 0


def test_a_job_that_was_held_is_given_up_when_it_is_released_and_nobody_is_left():
    rig = Rig(1, 1)
    rig.tell(facts.Health(server=B, ok=False))
    rig.drop("x")
    reject(rig)
    rig.tell(facts.HoldAsked(job=X, reason="asked"))
    rig.tell(facts.Tick(), after_s=3600.0)
    assert rig.store[X].state is State.HELD
    rig.tell(facts.ReleaseAsked(job=X))
    assert outcome(rig).reason is Reason.REJECTED


def test_a_verdict_is_a_value():
    said = row(("a", NO)).verdicts[0]
    assert msgspec.json.decode(msgspec.json.encode(said), type=Verdict) == said


def test_a_record_that_one_server_cannot_hand_out_is_made_on_another():
    """An error for /history/{id} that lasts: it has ended there, and nobody can say how."""
    rig = Rig(1, 1)
    rig.drop(X)
    rig.accept(X)
    rig.hint(X, Sign.ENDED)
    fetched = facts.Fetched(token=rig.token(X), result=FetchResult.UNREADABLE, reason="500")
    rig.tell(fetched)
    while rig.store[X].server == A:
        rig.tell(facts.Tick(), after_s=rig.engine.next_deadline_s() - rig.now_s)
        if rig.engine.jobs[X].live.order is Ask.PROBE:
            unreadable = facts.Probed(
                token=rig.token(X), presence=Presence.UNREADABLE, reason="HTTP status 500"
            )
            rig.tell(unreadable)
    job = rig.store[X]
    assert (job.server, job.charged) == (B, 0)
    assert [said.outcome.reason for said in job.verdicts] == [Reason.SERVER_PROTOCOL]
    end(rig, [X], SUCCESS)
    assert "Server a did not: Server a has a record" in rig.store[X].warnings[-1]
