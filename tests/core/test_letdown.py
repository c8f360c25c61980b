"""Servers that are there and take no submission of a job, or keep what they made of it."""

from __future__ import annotations

import pytest

from comfyd.core import facts, orders
from comfyd.core.facts import FetchResult, Presence, Sign, Uncollected
from comfyd.core.job import Ask
from comfyd.core.model import End, FileRef, JobId, Reason, Record, ServerName, Staged, State
from comfyd.core.present import job_summary
from comfyd.core.snapshot import ServerState, state_of
from tests.core.test_engine import POLICY, A, B, Rig, end, names

BAD = JobId("bad")
MADE = Record(end=End.SUCCESS, files=(FileRef(node="9", key="images", filename="a.png"),))


def not_sent(rig: Rig, name: str, status: int | None = 500, **more: object) -> list[str]:
    """An upload of *name* fails; returns what is sent then."""
    fact = facts.NotSent(
        token=rig.token(name), reason="status", operation="upload", reached=True, status=status,
        said=f"upload: HTTP status {status}", **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return names(rig.tell(fact))


def unknown(rig: Rig, name: str, status: int | None = 500) -> None:
    """The POST of *name* is answered with an error, and its prompt is found nowhere."""
    said = f"HTTP status {status}"
    rig.tell(facts.SubmitUnknown(token=rig.token(name), reason="status", status=status, said=said))
    gone(rig, name)


def gone(rig: Rig, name: str) -> None:
    for _ in range(2):
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
        job = rig.engine.jobs[JobId(name)]
        assert job.live.order is Ask.PROBE
        rig.tell(facts.Probed(token=rig.token(name), presence=Presence.ABSENT))


def passes(rig: Rig, name: str) -> None:
    """*name* is accepted a moment later, runs and is done."""
    rig.now_s += 0.1
    rig.accept(name)
    end(rig, [JobId(name)], Record(end=End.SUCCESS))


def until_sent(rig: Rig, most_s: float) -> list[str]:
    """What is sent next, within *most_s*."""
    end_s = rig.now_s + most_s
    while (next_s := rig.engine.next_deadline_s()) <= end_s:
        if sent := names(rig.tell(facts.Tick(), after_s=max(0.0, next_s - rig.now_s))):
            return sent
    return []


def is_sent(rig: Rig, name: str) -> bool:
    """Whether *name* is being sent, now or within a minute."""
    until_s = rig.now_s + 60
    while rig.store[JobId(name)].state is not State.SUBMITTING:
        next_s = rig.engine.next_deadline_s()
        if next_s > until_s:
            return False
        rig.tell(facts.Tick(), after_s=max(0.0, next_s - rig.now_s))
    return True


# --- one bad job, and many -----------------------------------------------------------------------


def test_a_job_that_the_server_never_takes_fails_while_others_pass():
    rig = Rig(1)
    rig.drop(BAD)
    for number in range(3):
        unknown(rig, BAD)
        assert rig.store[BAD].charged == number  # once is no proof: it may be the server
        good = f"good-{number}"
        rig.drop(good)
        assert is_sent(rig, good)
        passes(rig, good)
        assert is_sent(rig, BAD)
    unknown(rig, BAD)
    outcome = rig.outcome(BAD)
    assert (rig.store[BAD].charged, outcome.reason) == (3, Reason.REJECTED)
    assert outcome.message == (
        "Server a did not take this job (HTTP status 500), and took others meanwhile;"
        " look for the reason in the server's log."
    )
    told = [note.data for note in rig.told("charged")]
    assert told == [{"charged": 1, "reason": "turned_away"}] * 3


def test_many_bad_jobs_keep_a_good_one_waiting_for_one_round_at_most():
    rig = Rig(1)
    bad = [f"bad-{number}" for number in range(20)]
    rig.drop(*bad, "good")
    began_s, sent = rig.now_s, [bad[0]]
    while sent != ["good"]:
        not_sent(rig, sent[0])
        sent = until_sent(rig, POLICY.turned_away_max_s)
        assert len(sent) == 1
    assert rig.now_s - began_s <= 20 * POLICY.turned_away_max_s
    assert all(rig.let_down(name).times == 1 for name in bad)
    assert all(rig.store[JobId(name)].charged == 0 for name in bad)


def test_after_a_failure_those_go_first_that_no_server_has_let_down():
    rig = Rig(1)
    rig.drop(BAD)
    assert not_sent(rig, BAD) == []
    rig.drop("good", priority=-1)
    assert until_sent(rig, 60) == ["good"]  # though BAD is due as well, and before it
    assert not_sent(rig, "good") == []
    assert until_sent(rig, 60) == [BAD]  # nobody is left who is better


def test_once_the_server_takes_something_all_go_in_their_order_again():
    rig = Rig(1)
    rig.drop("a")
    rig.drop("b", "c")
    assert not_sent(rig, "a") == []
    assert until_sent(rig, 60) == ["b"]
    assert not_sent(rig, "b") == []
    assert until_sent(rig, 60) == ["c"]
    rig.tell(facts.Tick(), after_s=60)
    rig.accept("c")
    end(rig, [JobId("c")], Record(end=End.SUCCESS))
    assert names(rig.given)[-1] == "a"


def test_one_that_is_sent_alone_keeps_no_server_from_those_that_go_first():
    rig = Rig(1)
    rig.drop(BAD, deaths=1)
    assert not_sent(rig, BAD) == []
    rig.drop("other")
    assert is_sent(rig, "other")
    assert not_sent(rig, "other") == []
    rig.tell(facts.Tick(), after_s=0.9)  # BAD is due again before the server opens
    rig.drop("good")
    assert is_sent(rig, "good")
    passes(rig, "good")
    assert is_sent(rig, BAD)


# --- the server's fault --------------------------------------------------------------------------


def test_a_server_that_takes_nothing_charges_nobody_and_is_asked_patiently():
    rig = Rig(1)
    rig.drop("x")
    waits = []
    for _ in range(8):
        began_s = rig.now_s
        assert not_sent(rig, "x") == []
        assert until_sent(rig, 60) == ["x"]
        waits.append(rig.now_s - began_s)
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30])
    assert rig.store[JobId("x")].charged == 0
    assert rig.store[JobId("x")].attempt == 9  # an old answer can never be taken for a new one
    assert rig.engine.servers[A].failures == 8


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_says_later_charges_nobody(status):
    rig = Rig(1)
    rig.drop(BAD)
    for number in range(5):
        not_sent(rig, BAD, status)
        rig.drop(good := f"good-{number}")
        assert is_sent(rig, good)
        passes(rig, good)
        assert is_sent(rig, BAD)
    assert rig.store[BAD].charged == 0
    assert rig.let_down(BAD).times == 5


def test_a_server_that_is_not_there_lets_nobody_down():
    rig = Rig(1)
    rig.drop("x", "y")
    rig.tell(facts.NotSent(token=rig.token("x"), reason="refused"))
    assert rig.store[JobId("x")].let_down is None
    assert until_sent(rig, 60) == ["x"]


def test_a_post_that_a_crash_cut_off_is_nobodys_fault():
    rig = Rig(1)
    rig.drop("x")
    rig.start()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="new"))
    gone(rig, "x")
    assert rig.store[JobId("x")].let_down is None


def test_after_a_restart_old_acceptances_prove_nothing():
    rig = Rig(1)
    rig.drop(BAD)
    not_sent(rig, BAD)
    rig.drop("good")
    assert until_sent(rig, 60) == ["good"]
    passes(rig, "good")
    assert is_sent(rig, BAD)
    rig.tell(facts.NotSent(token=rig.token(BAD), reason="refused"))
    rig.start()
    rig.tell(facts.Health(server=A, ok=True), facts.Connected(server=A, client_id="new"))
    assert is_sent(rig, BAD)
    not_sent(rig, BAD)
    assert (rig.store[BAD].charged, rig.let_down(BAD).times) == (0, 2)


def test_its_own_acceptance_proves_nothing_either():
    rig = Rig(1)
    rig.drop("x")
    unknown(rig, "x")
    assert until_sent(rig, 60) == ["x"]
    rig.accept("x")
    assert rig.let_down("x").times == 0
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    for _ in range(2):
        rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.REFUSED))
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    assert rig.store[JobId("x")].state is State.SUBMITTING
    charged = rig.store[JobId("x")].charged
    not_sent(rig, "x")
    assert (rig.store[JobId("x")].charged, rig.let_down("x").times) == (charged, 1)


def test_a_job_that_is_not_wanted_any_more_is_not_sent_again():
    rig = Rig(1)
    rig.drop("x")
    rig.tell(facts.CancelAsked(job=JobId("x")))
    not_sent(rig, "x")
    assert rig.outcome("x").reason is Reason.CANCELLED


# --- other servers -------------------------------------------------------------------------------


def test_the_server_that_let_it_down_is_the_last_choice():
    rig = Rig(2, 2)
    rig.drop("x")
    assert rig.store[JobId("x")].server == A
    not_sent(rig, "x")
    rig.tell(facts.Tick(), after_s=0.5)
    assert rig.store[JobId("x")].server == B


def test_a_server_with_proof_against_it_is_not_the_last_word():
    """a never takes it though it takes others; b, too busy until then, is asked before it fails."""
    rig = Rig(1, 1)
    rig.drop(BAD, "busy")
    rig.accept("busy")  # on b, for long
    for number in range(3):
        not_sent(rig, BAD)
        rig.drop(good := f"good-{number}")
        assert is_sent(rig, good)
        passes(rig, good)
        assert is_sent(rig, BAD)
    not_sent(rig, BAD)
    row = rig.store[BAD]
    assert (row.state, row.charged) == (State.QUEUED, 2)
    assert [verdict.server for verdict in row.verdicts] == [A]
    end(rig, [JobId("busy")], Record(end=End.SUCCESS))
    assert rig.store[BAD].server == B
    rig.accept(BAD)
    assert rig.store[BAD].state is State.SUBMITTED


def test_what_is_fetched_back_is_not_given_to_the_server_that_let_it_down():
    rig = Rig(2, 2)
    rig.drop("long", "x")
    rig.accept("long")
    assert rig.store[JobId("x")].server == B
    not_sent(rig, "x")
    rig.tell(facts.Health(server=B, ok=False), after_s=1)
    assert rig.store[JobId("x")].server == A
    rig.accept("x")
    rig.hint("long", Sign.ALIVE)
    rig.tell(facts.Health(server=B, ok=True))
    for _ in range(4):
        rig.tell(facts.Tick(), after_s=POLICY.recall_after_s)
    assert rig.store[JobId("x")].state is State.SUBMITTED


# --- outputs -------------------------------------------------------------------------------------


def collecting(rig: Rig, name: str) -> None:
    server = rig.store[JobId(name)].server
    assert server is not None
    rig.accept(name)
    prompt_id = rig.engine.jobs[JobId(name)].row.prompt_id
    assert prompt_id is not None
    rig.tell(facts.Hint(server=server, prompt_id=prompt_id, sign=Sign.ENDED))
    rig.tell(facts.Fetched(token=rig.token(name), result=FetchResult.FOUND, record=MADE))
    assert rig.store[JobId(name)].state is State.COLLECTING


def kept(rig: Rig, name: str) -> None:
    """The server keeps the outputs until the job is taken from it."""
    job = JobId(name)
    for _ in range(200):
        fact = facts.CollectFailed(
            token=rig.token(name), cause=Uncollected.SERVER, message="It is kept."
        )
        rig.tell(fact)
        row = rig.store[job]
        if row.state is not State.COLLECTING or rig.outcome(name).state is State.FAILED:
            return
        rig.tell(facts.Tick(), after_s=rig.engine.next_deadline_s() - rig.now_s)
    raise AssertionError("nothing is done about it")


def test_outputs_that_a_working_server_keeps_are_made_again_elsewhere_and_charged():
    rig = Rig(1, 1)
    rig.drop("x", max_attempts=2)
    began_s = rig.now_s
    collecting(rig, "x")
    kept(rig, "x")
    assert POLICY.abandon_after_s <= rig.now_s - began_s <= POLICY.abandon_after_s + 60
    assert rig.store[JobId("x")].charged == 1
    assert until_sent(rig, 60) == ["x"]
    assert rig.store[JobId("x")].server == B
    collecting(rig, "x")
    kept(rig, "x")
    row = rig.store[JobId("x")]
    assert row.charged == 2
    assert row.outcome is not None
    assert (row.outcome.reason, row.outcome.message) == (Reason.OUTPUT_MISSING, "It is kept.")
    assert [note.data["charged"] for note in rig.told("lost")] == [1, 1]


def test_outputs_on_a_server_that_is_gone_are_made_again_at_no_charge():
    rig = Rig(1, 1)
    rig.drop("x")
    collecting(rig, "x")
    rig.tell(facts.Disconnected(server=A, cause="closed"), facts.Health(server=A, ok=False))
    kept(rig, "x")
    row = rig.store[JobId("x")]
    assert (row.server, row.charged, row.let_down) == (B, 0, None)


@pytest.mark.parametrize("cause", [Uncollected.MISSING, Uncollected.INVALID])
def test_outputs_that_are_gone_or_wrong_are_made_again_on_another_server(cause):
    rig = Rig(1, 1)
    rig.drop("x")
    collecting(rig, "x")
    rig.tell(facts.CollectFailed(token=rig.token("x"), cause=cause, message="It is wrong."))
    assert is_sent(rig, "x")
    assert rig.store[JobId("x")].server == B


def test_a_cancel_that_came_too_late_still_keeps_it_from_being_made_again():
    rig = Rig(1)
    rig.drop("x")
    collecting(rig, "x")
    rig.tell(facts.CancelAsked(job=JobId("x")))
    row = rig.store[JobId("x")]
    assert (row.state, rig.outcome("x").state) == (State.COLLECTING, State.DONE)
    fact = facts.CollectFailed(token=rig.token("x"), cause=Uncollected.MISSING, message="Gone.")
    rig.tell(fact)
    assert rig.store[JobId("x")].state is State.COLLECTING
    assert rig.outcome("x").reason is Reason.CANCELLED


def test_a_cancel_that_came_too_late_changes_no_result():
    rig = Rig(1)
    rig.drop("x")
    collecting(rig, "x")
    rig.tell(facts.CancelAsked(job=JobId("x")))
    rig.tell(facts.Collected(token=rig.token("x"), staged=Staged(manifest_sha256="0")))
    rig.tell(facts.Published(token=rig.token("x")))
    assert rig.store[JobId("x")].state is State.DONE


# --- what people see -----------------------------------------------------------------------------


def said_of(rig: Rig, name: ServerName = A) -> tuple[ServerState, str]:
    return state_of(rig.engine.servers[name], trouble="", down="", in_flight=0)


def test_status_says_that_a_server_takes_nothing():
    rig = Rig(1)
    rig.drop("x")
    assert said_of(rig) == (ServerState.UP, "")
    not_sent(rig, "x")
    why = "did not take the last submission (upload: HTTP status 500); others are tried"
    assert said_of(rig) == (ServerState.UP, why)
    until_sent(rig, 60)
    not_sent(rig, "x")
    assert "the last 2 submissions (upload: HTTP status 500)" in said_of(rig)[1]
    message = job_summary(rig.store[JobId("x")])["message"]
    assert message == (
        "Is tried again: it was let down 2 times in a row, the last time by a"
        " (upload: HTTP status 500)."
    )
    until_sent(rig, 60)
    rig.tell(facts.NotSent(token=rig.token("x"), reason="refused"))
    assert said_of(rig)[1] == "was not reached by the last 3 submissions; others are tried"
    until_sent(rig, 60)
    passes(rig, "x")
    assert said_of(rig) == (ServerState.UP, "")


def test_a_server_that_was_found_to_have_it_took_it():
    rig = Rig(1)
    rig.drop("x")
    rig.tell(facts.SubmitUnknown(token=rig.token("x"), reason="timeout", said="no answer"))
    assert said_of(rig)[1].startswith("did not take the last submission (no answer)")
    rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.RUNNING))
    assert said_of(rig) == (ServerState.UP, "")


def test_a_person_who_says_that_it_is_well_again_is_believed():
    rig = Rig(1)
    rig.drop("x")
    not_sent(rig, "x")
    rig.tell(facts.ResumeAsked(server=A))
    assert said_of(rig) == (ServerState.UP, "")


def test_nobody_is_thought_to_have_refused_what_was_only_let_down():
    rig = Rig(1)
    rig.drop("x")
    not_sent(rig, "x")
    row = rig.store[JobId("x")]
    assert row.refused  # of those that must not hide others
    rig.tell(facts.Health(server=A, ok=False))
    assert rig.engine.fleet.is_wanted(row, rig.now_s)
    assert not [each for each in rig.given if isinstance(each, orders.Collect)]
