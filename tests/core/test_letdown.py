"""Servers that are there and take no submission of a job, or keep what they made of it."""

from __future__ import annotations

import pytest

from comfyd.core import facts, orders
from comfyd.core.facts import FetchResult, Presence, Sign, Uncollected
from comfyd.core.job import Ask, Job
from comfyd.core.lookahead import OTHERS_AHEAD, LookAhead
from comfyd.core.model import (
    End,
    FileRef,
    JobId,
    LetDown,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    Shelf,
    Staged,
    State,
    Verdict,
    prompt_id_of,
)
from comfyd.core.present import job_summary
from comfyd.core.snapshot import ServerState, state_of
from tests.core.test_engine import POLICY, A, B, C, Rig, end, names

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


def passes(rig: Rig, name: str, *, uploaded: bool = True) -> None:
    """*name* is accepted a moment later, with its files, runs and is done."""
    rig.now_s += 0.1
    rig.accept(name, uploaded=uploaded)
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


def until_taken(rig: Rig, name: str, *, most: int) -> int:
    """Turn away whatever is sent until *name* is; returns how many that were."""
    for tries in range(most + 1):
        under_way = [job for job, row in rig.store.items() if row.state is State.SUBMITTING]
        sent = under_way or until_sent(rig, POLICY.turned_away_max_s)
        assert len(sent) == 1
        if sent == [name]:
            return tries
        not_sent(rig, sent[0])
    raise AssertionError(f"{name} was not sent")


def test_many_bad_jobs_keep_a_good_one_waiting_for_one_round_at_most():
    rig = Rig(1)
    bad = [f"bad-{number}" for number in range(20)]
    rig.drop(*bad, "good")
    began_s = rig.now_s
    assert until_taken(rig, "good", most=20) == 20
    assert rig.now_s - began_s <= 20 * POLICY.turned_away_max_s
    assert all(rig.let_down(name).times == 1 for name in bad)
    assert all(rig.store[JobId(name)].charged == 0 for name in bad)


def test_nor_does_it_wait_for_longer_once_it_was_let_down_itself():
    """Bad ones before it come due again as fast as they are tried."""
    rig = Rig(1)
    bad = [f"bad-{number}" for number in range(20)]
    rig.drop(*bad, "good")
    until_taken(rig, "good", most=20)
    for _ in range(3):
        not_sent(rig, "good")
        assert until_taken(rig, "good", most=20) <= 20


def test_a_stream_of_bad_ones_does_not_keep_it_waiting_for_ever():
    rig = Rig(1)
    rig.drop("good", priority=100)
    not_sent(rig, "good")
    rig.drop("bad-0", "bad-1")
    for number in range(2, 20):
        sent = until_sent(rig, POLICY.turned_away_max_s)
        if sent == ["good"]:
            assert number <= 5
            return
        rig.drop(f"bad-{number}")  # there is always one that no server has let down
        not_sent(rig, sent[0])
    raise AssertionError("it was never tried again")


def test_more_than_there_is_room_for_in_memory_hide_nobody():
    """All have been let down, and the journal is asked for those that have waited for longest."""
    rig = Rig(1)
    bad = [f"bad-{number:03}" for number in range(2 * OTHERS_AHEAD)]
    rig.drop(*bad, "good")
    assert until_taken(rig, "good", most=len(bad)) == len(bad)
    not_sent(rig, "good")
    assert until_taken(rig, "good", most=2 * len(bad)) <= len(bad) + OTHERS_AHEAD


def test_memory_keeps_those_that_have_waited_for_longest():
    away = LetDown(server=A, origin="http://a", times=1, since_s=0.0, said="")
    count = 2 * OTHERS_AHEAD
    rows = [
        Row(job=JobId(f"job-{seq}"), seq=seq, let_down=away, not_before=float(count - seq))
        for seq in range(count)
    ]
    ahead = LookAhead({row.job: Job(row) for row in rows})
    for row in rows:
        ahead.index(None, row)
    assert ahead.overflow(1000.0) == [row.job for row in reversed(rows[:OTHERS_AHEAD])]


def test_those_that_were_refused_hide_no_one_that_was_let_down():
    """However many wait for b, which is busy: a may take this one."""
    rig = Rig(1, 1)
    rig.drop("first", "long")  # one on each
    (on_a,) = [name for name, row in rig.store.items() if row.server == A]
    rig.accept("first", "long")
    end(rig, [on_a], Record(end=End.SUCCESS))
    for number in range(OTHERS_AHEAD + 2):
        rig.drop(name := f"refused-{number}")
        rig.tell(facts.Rejected(token=rig.token(name), message="no such model"))
    rig.drop("x")
    not_sent(rig, "x")
    assert until_sent(rig, 1) == ["x"]
    assert rig.store[JobId("x")].server == A


def test_where_submissions_fail_who_waits_for_longest_goes_first():
    rig = Rig(1)
    rig.drop(BAD)
    assert not_sent(rig, BAD) == []
    rig.drop("good", priority=-1)
    assert until_sent(rig, 60) == ["good"]  # BAD may be sent since later, though before it in order
    assert not_sent(rig, "good") == []
    assert until_sent(rig, 60) == [BAD]


def test_once_the_server_takes_something_all_go_in_their_order_again():
    rig = Rig(1)
    rig.drop("a", priority=1)
    rig.drop("b", "c")
    assert not_sent(rig, "a") == []
    assert until_sent(rig, 60) == ["b"]
    rig.tell(facts.Tick(), after_s=60)  # all may be sent, and c for longest
    rig.accept("b")
    end(rig, [JobId("b")], Record(end=End.SUCCESS))
    assert names(rig.given)[-1] == "a"


@pytest.mark.parametrize("wires", ["polled", "dies"])
def test_whose_post_is_lost_goes_to_the_back_whatever_became_of_the_server(wires):
    rig = Rig(1, connected=wires == "dies")
    rig.tell(facts.Tick(), after_s=POLICY.listen_grace_s)
    rig.drop(BAD, "good")
    rig.tell(facts.SubmitUnknown(token=rig.token(BAD), reason="status", status=500))
    if wires == "dies":
        rig.tell(facts.Disconnected(server=A, cause="closed"))
    for _ in range(2):
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
        rig.tell(facts.Probed(token=rig.token(BAD), presence=Presence.ABSENT))
    assert rig.let_down(BAD).times == 1
    assert is_sent(rig, "good")


def test_one_that_is_sent_alone_has_its_turn_too():
    """Each POST that is answered with 500 holds its place for a while: none is ever empty."""
    rig = Rig(2)
    bad = [f"bad-{number}" for number in range(4)]
    rig.drop(*bad)
    rig.drop("good", deaths=1)
    answered: set[object] = set()
    until_s = rig.now_s + 600
    while rig.store[JobId("good")].state is State.QUEUED:
        assert rig.now_s < until_s
        for name, job in list(rig.engine.jobs.items()):
            if job.live.order is Ask.SUBMIT:
                answered.add(name)
                token = rig.token(name)
                rig.tell(facts.SubmitUnknown(token=token, reason="status", status=500))
            elif job.live.order is Ask.PROBE:
                rig.tell(facts.Probed(token=rig.token(name), presence=Presence.ABSENT))
        rig.tell(facts.Tick(), after_s=max(0.01, rig.engine.next_deadline_s() - rig.now_s))
    assert len(answered) == len(bad)


def test_one_that_is_sent_alone_keeps_no_server_from_the_others():
    rig = Rig(1)
    rig.drop(BAD, deaths=1)
    assert not_sent(rig, BAD) == []
    rig.drop("other")
    assert is_sent(rig, "other")
    assert not_sent(rig, "other") == []
    rig.tell(facts.Tick(), after_s=0.9)  # BAD may be sent before the server opens
    rig.drop("good")
    assert until_taken(rig, "good", most=2) <= 2
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
    rig.accept("x", uploaded=True)
    assert rig.let_down("x").times == 0
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    for _ in range(2):
        rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.REFUSED))
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
    assert rig.store[JobId("x")].state is State.SUBMITTING
    charged = rig.store[JobId("x")].charged
    not_sent(rig, "x")
    assert (rig.store[JobId("x")].charged, rig.let_down("x").times) == (charged, 1)


def proven(rig: Rig, name: str) -> None:
    """Its server lets *name* down, takes another job with files, and is given *name* again."""
    not_sent(rig, name)
    rig.drop(good := f"good-{len(rig.store)}")
    assert is_sent(rig, good)
    passes(rig, good)
    assert is_sent(rig, name)


def test_a_job_that_is_not_wanted_any_more_is_not_sent_again_nor_blamed():
    rig = Rig(1)
    rig.drop("x", max_attempts=1)
    proven(rig, "x")
    rig.tell(facts.CancelAsked(job=JobId("x")))
    not_sent(rig, "x")
    assert rig.outcome("x").reason is Reason.CANCELLED


def test_only_jobs_with_files_prove_that_files_are_taken():
    """Its input folder is full, or read-only, and all that need none pass."""
    rig = Rig(1)
    rig.drop(BAD, max_attempts=1)
    for number in range(5):
        not_sent(rig, BAD)
        rig.drop(good := f"good-{number}")
        assert is_sent(rig, good)
        passes(rig, good, uploaded=False)
        assert is_sent(rig, BAD)
    assert rig.store[BAD].charged == 0
    unknown(rig, BAD)  # its files were taken: this is about its prompt, as with all others
    assert rig.outcome(BAD).reason is Reason.REJECTED


def test_what_is_refused_is_not_taken():
    rig = Rig(1)
    rig.drop(BAD, max_attempts=1)
    unknown(rig, BAD)
    rig.drop("other")
    assert is_sent(rig, "other")
    rig.tell(facts.Rejected(token=rig.token("other"), message="no such node"), after_s=1)
    assert is_sent(rig, BAD)
    unknown(rig, BAD)
    assert (rig.store[BAD].charged, rig.let_down(BAD).times) == (0, 2)


def test_what_the_server_takes_after_it_failed_is_no_proof():
    """The outage may have ended between the two; only later is it certain what came of the POST."""
    rig = Rig(2)
    rig.drop("x", max_attempts=1)
    unknown(rig, "x")
    assert is_sent(rig, "x")
    away = facts.SubmitUnknown(token=rig.token("x"), reason="status", status=500, said="HTTP 500")
    rig.tell(away)
    rig.drop("other")
    assert is_sent(rig, "other")
    passes(rig, "other")
    gone(rig, "x")
    row = rig.store[JobId("x")]
    assert (row.state, row.charged, rig.let_down("x").times) == (State.QUEUED, 0, 2)


def test_a_server_that_dies_of_nothing_in_particular_is_no_proof():
    rig = Rig(1)
    rig.drop("x", max_attempts=1)
    proven(rig, "x")
    rig.tell(facts.SubmitUnknown(token=rig.token("x"), reason="timeout", said="no answer"))
    rig.tell(facts.Disconnected(server=A, cause="ping_timeout"))
    for _ in range(2):
        rig.tell(facts.Tick(), after_s=POLICY.lost_grace_s)
        rig.tell(facts.Probed(token=rig.token("x"), presence=Presence.REFUSED))
    row = rig.store[JobId("x")]
    assert (row.charged, rig.let_down("x").times) == (0, 2)
    assert row.outcome is None


@pytest.mark.parametrize(("status", "most_s"), [(500, 5), (503, 30), (429, 30), (None, 30)])
def test_how_long_a_server_is_left_alone(status, most_s):
    """Briefly where it answers: the job may be why. Longer where it says "later", or nothing."""
    rig = Rig(1)
    rig.drop(*(f"job-{number}" for number in range(10)))
    for number in range(10):
        began_s = rig.now_s
        not_sent(rig, f"job-{number}", status)
        until_sent(rig, 60)
    assert rig.now_s - began_s == pytest.approx(most_s)


def test_when_the_server_says_to_come_back_is_heeded_after_a_post_too():
    rig = Rig(2)
    rig.drop("x", "y")
    fact = facts.SubmitUnknown(
        token=rig.token("x"), reason="status", status=503, said="HTTP 503", retry_after_s=77.0
    )
    rig.tell(fact)
    assert rig.engine.servers[A].closed_until_s == rig.now_s + 77
    rig.tell(facts.NotSent(token=rig.token("y"), reason="refused"))  # which was under way too
    assert rig.engine.servers[A].closed_until_s == rig.now_s + 77


def test_a_new_connection_opens_the_server():
    rig = Rig(1)
    rig.drop("x", "y")
    for _ in range(6):
        not_sent(rig, "x" if rig.store[JobId("x")].state is State.SUBMITTING else "y")
        until_sent(rig, 60)
    not_sent(rig, "x" if rig.store[JobId("x")].state is State.SUBMITTING else "y")
    rig.tell(facts.Tick(), after_s=4.9)
    assert not any(row.state is State.SUBMITTING for row in rig.store.values())
    rig.tell(facts.Disconnected(server=A, cause="closed"))
    assert len(names(rig.tell(facts.Connected(server=A, client_id="new")))) == 1


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


def test_two_servers_that_take_nothing_do_not_keep_it_from_a_third():
    rig = Rig(1, 1, 1)
    rig.drop("x")
    seen = []
    for _ in range(3):
        seen.append(rig.store[JobId("x")].server)
        if seen[-1] == C:
            break
        not_sent(rig, "x")
        assert is_sent(rig, "x")
    assert seen == [A, B, C]


def test_a_server_that_is_left_alone_for_a_moment_is_waited_for():
    """Else the one that never takes it is the one that is open, each time that it comes due."""
    said = Outcome(state=State.FAILED, reason=Reason.REJECTED)
    refused = Verdict(server=B, origin="http://b", outcome=said)
    rig = Rig(1, 1)
    rig.drop(BAD, verdicts=(refused,))  # which a lets down, each time
    rig.now_s += 0.05
    rig.drop("good")
    tried = []
    for _ in range(8):
        for job in [name for name, row in rig.store.items() if row.state is State.SUBMITTING]:
            tried.append((job, rig.store[job].server))
            rig.now_s += 0.05
            not_sent(rig, job, 503)
        until_sent(rig, 60)
    assert ("good", A) in tried


def test_but_not_for_long():
    rig = Rig(1, 1)
    rig.drop("other", "x")  # on a and on b
    not_sent(rig, "other", 503, retry_after_s=500.0)
    assert rig.store[JobId("x")].server == B
    rig.tell(facts.CancelAsked(job=JobId("other")))
    not_sent(rig, "x")
    assert is_sent(rig, "x")
    assert rig.store[JobId("x")].server == B


def test_nor_is_it_fetched_back_from_the_third_for_them():
    rig = Rig(1, 1, 2)
    rig.drop("long")
    for server in (A, B):
        assert rig.store[JobId("long")].server == server
        not_sent(rig, "long")
        assert is_sent(rig, "long")
    rig.accept("long")
    rig.drop("x")
    assert rig.store[JobId("x")].server == A
    not_sent(rig, "x")
    assert is_sent(rig, "x")
    rig.accept("x")
    assert rig.store[JobId("x")].server == C  # behind the long one
    for _ in range(5):
        rig.tell(facts.Hint(server=C, prompt_id=prompt_id_of(JobId("long"), 3), sign=Sign.ALIVE))
        rig.tell(facts.Tick(), after_s=POLICY.recall_after_s)
    assert rig.store[JobId("x")].state is State.SUBMITTED


def test_where_nothing_runs_any_more_it_is_fetched_back_even_for_the_one_that_let_it_down():
    rig = Rig(1, 2)
    rig.drop("x")
    not_sent(rig, "x")
    assert is_sent(rig, "x")
    rig.accept("x")
    assert rig.store[JobId("x")].server == B
    rig.drop("other")
    passes(rig, "other")
    for _ in range(20):
        rig.tell(facts.QueueLooked(server=B, running=0, pending=1), after_s=60)
    assert rig.engine.servers[B].wedged
    assert rig.store[JobId("x")].state is State.STOPPING  # it is being fetched back


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


def asked_again(rig: Rig, cause: Uncollected) -> None:
    """The outputs of x are asked for once more, and do not come."""
    job = JobId("x")
    while rig.engine.jobs[job].live.order is None:
        rig.tell(facts.Tick(), after_s=rig.engine.next_deadline_s() - rig.now_s)
    rig.tell(facts.CollectFailed(token=rig.token("x"), cause=cause, message="It is kept."))


def test_a_full_disk_is_no_part_of_the_time_that_outputs_are_kept():
    rig = Rig(1)
    rig.drop("x", max_attempts=1)
    collecting(rig, "x")
    asked_again(rig, Uncollected.SERVER)
    began_s = rig.now_s
    while rig.now_s < began_s + 2 * POLICY.abandon_after_s:
        asked_again(rig, Uncollected.DISK)
    asked_again(rig, Uncollected.SERVER)
    assert rig.store[JobId("x")].state is State.COLLECTING
    assert rig.store[JobId("x")].charged == 0


@pytest.mark.parametrize("other", [Uncollected.DISK, Uncollected.SERVER])
def test_what_is_kept_is_not_waited_for_without_end_for_a_bad_moment_now_and_then(other):
    rig = Rig(1)
    rig.drop("x", max_attempts=1)
    collecting(rig, "x")
    began_s, tries = rig.now_s, 0
    while rig.store[JobId("x")].charged == 0:
        tries += 1
        there = tries % 15 > 0
        rig.tell(facts.Health(server=A, ok=there or other is Uncollected.DISK))
        asked_again(rig, Uncollected.SERVER if there else other)
        assert rig.now_s - began_s < 2 * POLICY.abandon_after_s
    assert rig.now_s - began_s >= POLICY.abandon_after_s


def test_nor_is_an_outage():
    rig = Rig(1)
    rig.drop("x", max_attempts=1)
    collecting(rig, "x")
    rig.tell(facts.Disconnected(server=A, cause="closed"), facts.Health(server=A, ok=False))
    began_s = rig.now_s
    while rig.now_s < began_s + POLICY.abandon_after_s - 60:
        asked_again(rig, Uncollected.SERVER)
    rig.tell(facts.Health(server=A, ok=True))
    back_s = rig.now_s
    while rig.now_s < began_s + POLICY.abandon_after_s + 60:
        asked_again(rig, Uncollected.SERVER)
        assert rig.store[JobId("x")].charged == 0
    while rig.store[JobId("x")].charged == 0:
        asked_again(rig, Uncollected.SERVER)
    assert rig.now_s - back_s >= POLICY.abandon_after_s


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
    why = "did not take the last 3 submissions (not reached); others are tried"
    assert said_of(rig)[1] == why
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
    assert row.shelf is Shelf.LET_DOWN  # where it hides no others
    rig.tell(facts.Health(server=A, ok=False))
    assert rig.engine.fleet.is_wanted(row, rig.now_s)
    assert not [each for each in rig.given if isinstance(each, orders.Collect)]
