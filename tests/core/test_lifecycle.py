"""The state table, pair by pair, and what a few whole lives look like."""

# mypy: disable-error-code="comparison-overlap, unreachable"
# Life.tell changes what mypy believes it has just seen.

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core import completion, facts, lifecycle, orders, rules
from comfyd.core.facts import FetchResult, Hint, Presence, Sign, Token, Uncollected
from comfyd.core.job import (
    Assigned,
    Context,
    Doubted,
    Due,
    Expired,
    GivenUp,
    Job,
    JobFact,
    NoServerLeft,
    Orphaned,
    Recalled,
    Step,
)
from comfyd.core.model import (
    End,
    FileRef,
    JobId,
    NodeFailure,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    Source,
    Staged,
    State,
    prompt_id_of,
)
from comfyd.core.policy import Policy
from comfyd.core.submitted import collected_of
from comfyd.errors import ProtocolViolation

J = JobId("fox.01K0000000000000000000000A")
S = ServerName("local")
POLICY = Policy()
IMAGE = FileRef(node="9", key="images", filename="a.png")
SUCCESS = Record(end=End.SUCCESS, files=(IMAGE,))
ERROR = Record(
    end=End.ERROR,
    failure=NodeFailure(node="3", node_type="KSampler", exception_type="OOM", message="too big\n"),
)
STAGED = Staged(manifest_sha256="ab", outputs=1, bytes=10)


def at(now_s: float, *, elsewhere: bool = False) -> Context:
    return Context(now_s=now_s, u=0.0, policy=POLICY, elsewhere=elsewhere)


class Life:
    """A job that is told facts; answers get the current token by themselves."""

    def __init__(self, **row: object) -> None:
        self.job = Job(Row(job=J, seq=1, claimed_at=0.0, **row))  # type: ignore[arg-type]
        self.now_s = 0.0
        self.orders: tuple[orders.JobOrder, ...] = ()
        self.notes: list[tuple[str, dict[str, Any]]] = []

    @property
    def token(self) -> Token:
        return Token(J, self.job.row.attempt, self.job.live.seq)

    def tell(self, fact: JobFact, *, after_s: float = 0.0, elsewhere: bool = False) -> Step:
        self.now_s += after_s
        before = self.job.row
        done = lifecycle.step(self.job, fact, at(self.now_s, elsewhere=elsewhere))
        rules.check(before, done.job)
        self.job, self.orders = done.job, done.orders
        self.notes += [(note.kind, note.data) for note in done.notes]
        return done

    def assign(self) -> Life:
        self.tell(Assigned(S, "http://s", "c1"))
        return self

    def accept(self, **fields: object) -> Life:
        self.assign().tell(facts.Accepted(token=self.token, **fields))  # type: ignore[arg-type]
        return self

    def hint(self, sign: Sign) -> Life:
        prompt_id = prompt_id_of(J, self.job.row.attempt)
        self.tell(Hint(server=S, prompt_id=prompt_id, sign=sign))
        return self

    def fetch(self, record: Record | None, result: FetchResult = FetchResult.FOUND) -> Life:
        self.tell(facts.Fetched(token=self.token, result=result, record=record))
        return self

    def probe(
        self, presence: Presence, record: Record | None = None, *, elsewhere: bool = False
    ) -> Life:
        probed = facts.Probed(token=self.token, presence=presence, record=record)
        self.tell(probed, elsewhere=elsewhere)
        return self

    def due(self) -> Life:
        """Let time pass to the next planned look."""
        assert self.job.live.look_s < math.inf
        self.now_s = max(self.now_s, self.job.live.look_s)
        self.tell(Due())
        return self

    def finish(self) -> Life:
        self.tell(facts.Collected(token=self.token, staged=STAGED))
        self.tell(facts.Published(token=self.token))
        self.tell(facts.Retired(token=self.token))
        return self

    @property
    def ordered(self) -> list[type]:
        return [type(order) for order in self.orders]


# --- the table -----------------------------------------------------------------------------------

FACTS: list[type] = [
    *get_args(facts.Answer), Hint, facts.CheckAsked, facts.CancelAsked, facts.ReleaseAsked,
    facts.HoldAsked, facts.LateSuccess, Assigned, Orphaned, Doubted, Due, Expired, GivenUp,
    NoServerLeft, Recalled,
]  # fmt: skip

# Which answers each state's orders can bring. A current one without a row would be a bug.
ANSWERS: dict[State, set[type]] = {
    State.SUBMITTING: {
        facts.Accepted, facts.Rejected, facts.NotSent, facts.SubmitUnknown, facts.Unsendable,
        facts.Probed,
    },
    State.SUBMITTED: {facts.Probed, facts.Fetched},
    State.STOPPING: {facts.Probed, facts.Fetched},
    State.COLLECTING: {facts.Collected, facts.CollectFailed},
    State.PUBLISHING: {facts.Published, facts.PublishConflict, facts.PublishDelayed},
    State.DONE: {facts.Retired},
    State.FAILED: {facts.Retired},
    State.CANCELLED: {facts.Retired},
}  # fmt: skip


@pytest.mark.parametrize(("state", "fact"), list(itertools.product(State, get_args(facts.Answer))))
def test_an_answer_has_a_row_exactly_where_an_order_can_bring_it(state, fact):
    assert ((state, fact) in lifecycle.TABLE) == (fact in ANSWERS.get(state, set()))


def test_the_table_knows_no_other_facts():
    assert {fact for _, fact in lifecycle.TABLE} <= set(FACTS)


def test_final_states_have_no_way_out():
    for state in (State.DONE, State.FAILED, State.CANCELLED):
        assert {fact for s, fact in lifecycle.TABLE if s is state} == {facts.Retired}


def test_a_current_answer_to_another_order_is_a_violation():
    life = Life().accept()
    life.tell(Doubted())  # a Probe is out
    with pytest.raises(ProtocolViolation, match="Retired does not answer PROBE"):
        life.tell(facts.Retired(token=life.token))


def test_an_answer_that_is_not_current_is_dropped_and_counted():
    life = Life().assign()
    old = Token(J, life.job.row.attempt, life.token.seq - 1)
    before = life.job
    life.tell(facts.Rejected(token=old, message="no"))
    assert life.job == before
    assert life.notes[-1] == ("dropped", {"reason": "stale_answer"})
    life.tell(facts.Accepted(token=life.token))
    again = Token(J, 1, 1)
    life.tell(facts.Accepted(token=again))
    assert life.notes[-1] == ("dropped", {"reason": "stale_answer"})


# --- the straight way ----------------------------------------------------------------------------


def test_a_success_by_its_end_signal():
    life = Life().assign()
    assert life.ordered == [orders.Submit]
    assert life.job.row.prompt_id == prompt_id_of(J, 1)
    life.tell(facts.Accepted(token=life.token, number=7), after_s=1)
    assert life.job.row.state is State.SUBMITTED
    life.now_s = 5
    life.hint(Sign.ALIVE)
    life.now_s = 9
    life.hint(Sign.ENDED)
    assert life.ordered == [orders.Fetch]
    life.fetch(SUCCESS)
    assert life.ordered == [orders.Collect]
    assert life.job.row.completion is Source.SIGNAL
    life.finish()
    assert life.job.row.state is State.DONE
    assert life.job.row.retired
    finished = dict(life.notes)["finished"]
    assert finished["outcome"] == "done"
    assert finished["durations_s"] == {"wait": 1, "queue": 4, "run": 4, "collect": 0, "total": 9}


@pytest.mark.parametrize("sign", [Sign.ALIVE, Sign.ENDED])
def test_a_hint_before_the_answer_of_the_post_is_remembered(sign):
    life = Life().assign().hint(sign)
    assert life.orders == ()
    life.tell(facts.Accepted(token=life.token))
    assert life.job.row.started_at is not None
    assert life.ordered == ([orders.Fetch] if sign is Sign.ENDED else [])


def test_an_early_end_is_looked_into_even_if_the_answer_never_comes():
    life = Life().assign().hint(Sign.ENDED)
    life.tell(facts.SubmitUnknown(token=life.token, reason="timeout"))
    life.due().probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.completion is Source.SIGNAL


def test_success_error_and_interrupt_end_as_the_contract_says():
    for record, state, reason in [
        (SUCCESS, State.DONE, None),
        (ERROR, State.FAILED, Reason.EXECUTION_ERROR),
        (Record(end=End.INTERRUPTED), State.FAILED, Reason.INTERRUPTED),
    ]:
        life = Life().accept().hint(Sign.ENDED).fetch(record)
        assert life.job.row.outcome is not None
        assert (life.job.row.outcome.state, life.job.row.outcome.reason) == (state, reason)
        life.finish()
        assert life.job.row.state is state
    message = Life().accept().hint(Sign.ENDED).fetch(ERROR).job.row.outcome
    assert message is not None
    assert message.message == "Node 3 (KSampler) raised OOM: too big"


def test_a_success_without_outputs_is_done_with_a_warning():
    life = Life().accept().hint(Sign.ENDED).fetch(Record(end=End.SUCCESS))
    assert life.job.row.outcome == Outcome(state=State.DONE)
    assert "without any output" in life.job.row.warnings[0]


# --- submitting ----------------------------------------------------------------------------------


def test_nothing_sent_gives_the_identity_back():
    life = Life().assign()
    life.tell(facts.NotSent(token=life.token, reason="refused"))
    assert life.job.row.state is State.QUEUED
    assert (life.job.row.attempt, life.job.row.charged) == (0, 0)
    assert life.assign().job.row.prompt_id == prompt_id_of(J, 1)


def test_an_unknown_post_is_looked_for_after_the_grace_and_is_lost_only_twice_absent():
    life = Life().assign()
    life.tell(facts.SubmitUnknown(token=life.token, reason="timeout"), after_s=10)
    assert life.orders == ()
    life.due()
    assert life.now_s == 10 + POLICY.lost_grace_s
    assert life.ordered == [orders.Probe]
    life.probe(Presence.ABSENT)
    assert life.job.row.state is State.SUBMITTING
    life.due().probe(Presence.ABSENT)
    assert life.now_s == 10 + 2 * POLICY.lost_grace_s
    assert life.job.row.state is State.QUEUED
    assert (life.job.row.attempt, life.job.row.charged) == (1, 0)


def test_an_unknown_post_that_is_there_goes_on():
    for presence in (Presence.PENDING, Presence.RUNNING):
        life = Life().assign()
        life.tell(facts.SubmitUnknown(token=life.token, reason="status"))
        life.due().probe(presence)
        assert life.job.row.state is State.SUBMITTED
        assert (life.job.row.started_at is not None) == (presence is Presence.RUNNING)


def test_a_rejection_is_final_at_once():
    life = Life().assign()
    life.tell(facts.Rejected(token=life.token, message="no such node", detail={"a": 1}))
    assert life.ordered == [orders.Collect]
    assert life.job.row.outcome == Outcome(
        state=State.FAILED, reason=Reason.REJECTED, message="no such node", detail={"a": 1}
    )


def test_partial_acceptance_is_stopped_and_fails_even_if_the_rest_succeeds():
    for record in (SUCCESS, Record(end=End.INTERRUPTED)):
        life = Life().accept(node_errors={"9": {}})
        assert life.job.row.state is State.STOPPING
        assert life.ordered == [orders.Stop]
        life.probe(Presence.FINISHED, record)
        assert life.job.row.outcome is not None
        assert life.job.row.outcome.reason is Reason.PARTIAL


def test_partial_acceptance_can_be_accepted():
    life = Life(accept_partial=True).accept(node_errors={"9": {}})
    assert life.job.row.state is State.SUBMITTED
    assert "nodes 9 did not pass" in life.job.row.warnings[0]


# --- completion and audit ------------------------------------------------------------------------


def test_an_empty_history_is_fetched_three_times_then_the_auditor_owns_it():
    life = Life().accept().hint(Sign.ENDED)
    waits = []
    for _ in range(2):
        asked_s = life.now_s
        life.fetch(None, FetchResult.EMPTY).due()
        assert life.ordered == [orders.Fetch]
        waits.append(life.now_s - asked_s)
    assert waits == [1, 2]
    life.fetch(None, FetchResult.EMPTY).due()
    assert life.ordered == [orders.Probe]
    life.probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.completion is Source.SIGNAL  # the signal did come


def test_the_auditor_looks_from_stale_after_and_then_every_interval_whether_it_talks_or_not():
    life = Life().accept()
    looks = []
    for _ in range(3):
        life.hint(Sign.ALIVE).due()
        looks.append(life.now_s)
        life.probe(Presence.RUNNING)
    assert looks == [300, 330, 360]


def test_execution_success_without_the_end_signal_is_looked_into_after_two_seconds():
    life = Life().accept().hint(Sign.ENDING)
    assert life.orders == ()
    life.due()
    assert (life.now_s, life.ordered) == (2, [orders.Probe])
    life.probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.completion is Source.AUDIT
    assert dict(life.notes)["ended"]["missed"] == "silent"


@pytest.mark.parametrize(
    ("cause", "source", "missed"),
    [("disconnected", Source.RECONNECT, "disconnected"), ("deaf", Source.AUDIT, "deaf")],
)
def test_an_orphan_is_probed_at_once_then_every_two_seconds(cause, source, missed):
    life = Life().accept()
    life.tell(Orphaned(cause))
    assert life.ordered == [orders.Probe]
    looks = []
    for _ in range(3):
        life.probe(Presence.RUNNING).due()
        looks.append(life.now_s)
    assert looks == [2, 4, 6]
    life.probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.completion is source
    assert dict(life.notes)["ended"]["missed"] == missed


def test_what_is_found_after_a_restart_is_recovery_and_not_missed():
    row = Life().accept().job.row
    done = lifecycle.load(row, at(50), crashed=False)
    assert [type(order) for order in done.orders] == [orders.Probe]
    life = Life()
    life.job = done.job
    life.probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.completion is Source.RECOVERY
    assert dict(life.notes)["ended"]["missed"] is None


def test_unknown_changes_nothing_until_the_attempt_is_abandoned_in_writing():
    life = Life().accept()
    life.tell(Doubted())
    row = life.job.row
    while life.now_s < 2 * POLICY.abandon_after_s:
        assert life.job.row == row
        life.probe(Presence.UNKNOWN)
        if life.job.row.state is State.QUEUED:
            break
        life.due()
    assert life.job.row.state is State.QUEUED
    assert life.job.row.charged == 0
    assert life.job.row.abandoned == ((S, "http://s", prompt_id_of(J, 1)),)


def test_unknown_between_two_absences_does_not_shorten_the_proof():
    life = Life().accept()
    life.tell(Doubted())
    life.probe(Presence.ABSENT)
    life.tell(Doubted())
    life.probe(Presence.PENDING)
    life.tell(Doubted(), after_s=POLICY.lost_grace_s)
    life.probe(Presence.ABSENT)
    assert life.job.row.state is State.SUBMITTED


def lose(life: Life, presence: Presence = Presence.ABSENT) -> Life:
    life.tell(Doubted())
    life.probe(presence)
    life.due().probe(presence)
    return life


def die(life: Life, *, alone: bool) -> Life:
    """The server dies while the prompt runs there, alone or beside others of ours."""
    life.accept().hint(Sign.ALIVE)
    life.tell(Orphaned("disconnected", alone))
    life.probe(Presence.REFUSED).due()
    while life.job.row.state is State.SUBMITTED:
        life.probe(Presence.REFUSED)
        if life.job.row.state is State.SUBMITTED:
            life.due()
    return life


@pytest.mark.parametrize(
    ("deaths", "charged"),
    [
        ([True], [1]),
        ([True, True], [1, 2]),
        ([False], [0]),  # any of them may have been it
        ([False, False], [0, 2]),  # it was sent alone after the first: that one is proven too
        ([True, False], [1, 2]),
    ],
)
def test_charged_is_what_can_only_have_killed_its_server(deaths, charged):
    life, seen = Life(), []
    for alone in deaths:
        die(life, alone=alone)
        seen.append(life.job.row.charged)
    assert seen == charged
    assert life.job.row.state is State.QUEUED
    assert [data["charged"] for kind, data in life.notes if kind == "lost"] == [
        after - before for before, after in itertools.pairwise([0, *charged])
    ]


def test_a_job_that_kills_its_servers_fails_after_three_deaths():
    life = die(die(die(Life(), alone=False), alone=False), alone=False)
    assert life.job.row.state is State.COLLECTING
    assert life.job.row.outcome is not None
    assert (life.job.row.outcome.reason, life.job.row.charged) == (Reason.LOST, 3)


def test_a_prompt_deleted_by_someone_else_is_run_again_uncharged_once_then_charged():
    life = lose(Life().accept())
    assert (life.job.row.charged, life.job.row.dropped) == (0, 1)
    lose(life.accept())
    assert (life.job.row.charged, life.job.row.dropped) == (1, 2)
    assert life.job.row.not_before > life.now_s


def test_three_charged_losses_fail_the_job():
    life = Life()
    for _ in range(3):
        life.accept().hint(Sign.ALIVE)
        lose(life, Presence.REFUSED)
    assert life.job.row.state is State.COLLECTING
    assert life.job.row.outcome is not None
    assert life.job.row.outcome.reason is Reason.LOST
    assert life.finish().job.row.state is State.FAILED


def test_a_record_with_another_jobs_mark_proves_nothing():
    life = Life().accept().hint(Sign.ENDED)
    life.fetch(msgspec.structs.replace(SUCCESS, ours=("other", 1)))
    assert life.job.row.state is State.SUBMITTED


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("comfyd/owl.01ARZ3NDEKTSV4RRFFQ69G5FAV-1", True),
        ("comfyd\\owl.01ARZ3NDEKTSV4RRFFQ69G5FAV-12\\in", True),
        ("comfyd/fox.01ARZ3NDEKTSV4RRFFQ69G5FAW-2", False),
        ("comfyd/mine-1", False),
        ("", False),
    ],
)
def test_a_file_that_was_made_for_another_job_is_told(folder, told):
    job = JobId("fox.01ARZ3NDEKTSV4RRFFQ69G5FAW")
    ref = FileRef(node="9", key="images", filename="x.png", subfolder=folder)
    record = msgspec.structs.replace(SUCCESS, files=(ref, ref))
    row = msgspec.structs.replace(Life().accept().job.row, job=job)
    done = completion.judge(row, record)
    context = Context(now_s=1.0, u=0.0, policy=POLICY)
    kept = collected_of(row, done, record, Source.SIGNAL, context)["warnings"]
    assert any("another job, owl.01ARZ3" in each and "1 more" in each for each in kept) is told
    assert len(kept) == told


def test_a_record_that_stays_unreadable_fails_the_job_in_the_end():
    life = Life().accept()
    life.tell(Doubted())
    while life.job.row.state is State.SUBMITTED:
        life.probe(Presence.UNREADABLE)
        if life.job.row.state is State.SUBMITTED:
            life.due()
    assert life.now_s >= POLICY.stale_after_s
    assert life.job.row.outcome is not None
    assert life.job.row.outcome.reason is Reason.SERVER_PROTOCOL


# --- stopping ------------------------------------------------------------------------------------


def test_cancel_is_confirmed_before_it_is_believed():
    life = Life().accept()
    life.tell(facts.CancelAsked(job=J))
    assert life.ordered == [orders.Stop]
    life.probe(Presence.RUNNING).due()
    assert life.ordered == [orders.Stop]
    life.probe(Presence.ABSENT)
    assert life.job.row.state is State.STOPPING
    life.due().probe(Presence.ABSENT)
    assert life.job.row.outcome is not None
    assert life.job.row.outcome.state is State.CANCELLED


def test_a_success_that_came_before_the_cancel_stands():
    life = Life().accept()
    life.tell(facts.CancelAsked(job=J))
    life.probe(Presence.FINISHED, SUCCESS)
    assert life.job.row.outcome == Outcome(state=State.DONE)


def test_a_cancel_while_a_look_is_out_waits_for_its_answer():
    life = Life().accept()
    life.tell(Doubted())
    life.tell(facts.CancelAsked(job=J))
    assert life.orders == ()
    life.probe(Presence.RUNNING)
    assert life.ordered == [orders.Stop]


def test_a_cancel_during_the_post_takes_effect_with_its_answer():
    life = Life().assign()
    life.tell(facts.CancelAsked(job=J))
    life.tell(facts.Accepted(token=life.token))
    assert life.job.row.state is State.STOPPING
    other = Life().assign()
    other.tell(facts.CancelAsked(job=J))
    other.tell(facts.NotSent(token=other.token, reason="refused"))
    assert other.job.row.outcome is not None
    assert other.job.row.outcome.state is State.CANCELLED


def test_a_prompt_that_cannot_be_stopped_is_abandoned_in_writing():
    life = Life().accept()
    life.tell(facts.CancelAsked(job=J))
    while life.job.row.state is State.STOPPING:
        life.probe(Presence.RUNNING)
        if life.job.row.state is State.STOPPING:
            life.due()
    assert life.now_s >= POLICY.stop_grace_s
    assert len(life.job.row.abandoned) == 1
    assert life.job.row.state is State.COLLECTING


# --- collecting and publishing -------------------------------------------------------------------


def collecting(record: Record = SUCCESS, **row: object) -> Life:
    return Life(**row).accept().hint(Sign.ENDED).fetch(record)


def fail_collect(life: Life, cause: Uncollected) -> Life:
    life.tell(facts.CollectFailed(token=life.token, cause=cause, message="gone"))
    return life


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (Uncollected.MISSING, Reason.OUTPUT_MISSING),
        (Uncollected.INVALID, Reason.OUTPUT_INVALID),
    ],
)
def test_lost_outputs_are_made_again_and_charged_until_there_are_no_attempts_left(cause, reason):
    life = fail_collect(collecting(max_attempts=2), cause)
    assert (life.job.row.state, life.job.row.charged) == (State.QUEUED, 1)
    fail_collect(life.accept().hint(Sign.ENDED).fetch(SUCCESS), cause)
    assert life.job.row.outcome is not None
    assert life.job.row.outcome.reason is reason
    assert life.job.row.record is not None
    assert life.job.row.record.files == (IMAGE,)  # what can be had is put beside the error
    assert life.finish().job.row.state is State.FAILED


def test_only_what_a_server_made_counts_as_output():
    cancelled = Life()
    cancelled.tell(facts.CancelAsked(job=J))
    assert cancelled.finish().job.row.state is State.CANCELLED
    assert "fetched" not in dict(cancelled.notes)
    assert dict(collecting().finish().notes)["fetched"] == {"outputs": 1, "bytes": 10}


@pytest.mark.parametrize("cause", [Uncollected.SERVER, Uncollected.DISK])
def test_a_download_that_could_not_be_made_is_tried_again_later(cause):
    life = fail_collect(collecting(), cause)
    assert (life.job.row.state, life.orders) == (State.COLLECTING, ())
    assert life.due().ordered == [orders.Collect]


def test_outputs_of_a_failed_job_are_a_courtesy():
    life = collecting(msgspec.structs.replace(ERROR, files=(IMAGE,)))
    for _ in range(2):
        fail_collect(life, Uncollected.SERVER).due()
    fail_collect(life, Uncollected.SERVER)
    assert life.ordered == [orders.Collect]
    assert life.job.row.record is not None
    assert life.job.row.record.files == ()
    assert "could not be fetched" in life.job.row.warnings[-1]


def test_a_taken_place_in_done_fails_the_job_and_in_failed_waits_for_a_person():
    life = collecting()
    life.tell(facts.Collected(token=life.token, staged=STAGED))
    life.tell(facts.PublishConflict(token=life.token, message="taken"))
    assert life.job.row.outcome is not None
    assert life.job.row.outcome.reason is Reason.CONFLICT
    life.tell(facts.Collected(token=life.token, staged=STAGED))
    life.tell(facts.PublishConflict(token=life.token, message="taken"))
    assert life.job.row.state is State.PUBLISHING
    assert life.due().ordered == [orders.Publish]


# --- crashes -------------------------------------------------------------------------------------


def test_a_job_at_hand_in_three_crashes_is_held_and_can_be_released():
    row = collecting().job.row
    for _ in range(2):
        row = lifecycle.load(row, at(9), crashed=True).job.row
        assert row.state is State.COLLECTING
    done = lifecycle.load(row, at(9), crashed=True)
    assert done.job.row.state is State.HELD
    assert "3 times" in done.job.row.held
    life = Life()
    life.job = done.job
    life.tell(facts.ReleaseAsked(job=J))
    assert (life.job.row.state, life.job.row.crashes) == (State.QUEUED, 0)


def test_a_cancelled_job_that_was_held_for_crashes_stays_cancelled_after_a_restart():
    life = Life()
    life.job = lifecycle.load(collecting(crashes=2).job.row, at(9), crashed=True).job
    assert life.job.row.state is State.HELD
    life.tell(facts.CancelAsked(job=J))
    loaded = lifecycle.load(life.job.row, at(10), crashed=False)
    assert loaded.job.row.outcome is not None
    assert loaded.job.row.outcome.state is State.CANCELLED


def test_the_order_at_load_of_each_state():
    submitting, submitted = Life().assign().job.row, Life().accept().job.row
    stopping = Life().accept(node_errors={"9": {}}).job.row
    life = collecting()
    rows = [life.job.row]
    life.tell(facts.Collected(token=life.token, staged=STAGED))
    rows.append(life.job.row)
    life.tell(facts.Published(token=life.token))
    rows.append(life.job.row)
    expected = [orders.Collect, orders.Publish, orders.Retire]
    for row, order in zip(
        [submitted, stopping, *rows], [orders.Probe, orders.Stop, *expected], strict=True
    ):
        assert [type(o) for o in lifecycle.load(row, at(9), crashed=False).orders] == [order]
    loaded = lifecycle.load(submitting, at(9), crashed=False)
    assert loaded.orders == ()
    assert loaded.job.live.look_s == 9 + POLICY.lost_grace_s


# --- whatever comes ------------------------------------------------------------------------------

SIGNS = st.sampled_from(list(Sign))
RECORDS = st.sampled_from([SUCCESS, ERROR, Record(end=End.INTERRUPTED)])


@st.composite
def any_fact(draw: st.DrawFn, token: Token) -> JobFact:
    presence = draw(st.sampled_from(list(Presence)))
    record = draw(RECORDS) if presence is Presence.FINISHED else None
    found = draw(st.booleans())
    result = (
        FetchResult.FOUND
        if found
        else draw(st.sampled_from([FetchResult.EMPTY, FetchResult.ERROR, FetchResult.UNREADABLE]))
    )
    options: list[JobFact] = [
        facts.Accepted(token=token),
        facts.Accepted(token=token, node_errors={"9": {}}),
        facts.Rejected(token=token, message="no"),
        facts.NotSent(token=token, reason="refused"),
        facts.SubmitUnknown(token=token, reason="timeout"),
        facts.Unsendable(token=token, message="gone"),
        facts.Probed(token=token, presence=presence, record=record),
        facts.Fetched(token=token, result=result, record=draw(RECORDS) if found else None),
        facts.Collected(token=token, staged=STAGED),
        facts.CollectFailed(
            token=token, cause=draw(st.sampled_from(list(Uncollected))), message=""
        ),
        facts.Published(token=token),
        facts.PublishConflict(token=token, message=""),
        facts.PublishDelayed(token=token, message=""),
        facts.Retired(token=token),
        Hint(server=S, prompt_id=prompt_id_of(J, 1), sign=draw(SIGNS)),
        facts.CheckAsked(job=J),
        facts.CancelAsked(job=J),
        facts.ReleaseAsked(job=J),
        facts.HoldAsked(job=J, reason="why"),
        Assigned(S, "http://s", "c"),
        Orphaned("disconnected"),
        Doubted(),
        Due(),
        Expired(),
        GivenUp(),
        Recalled(),
    ]
    return draw(st.sampled_from(options))


@given(st.data())
def test_whatever_comes_the_rules_hold_and_a_final_row_never_changes(data):
    life = Life()
    published = 0
    for _ in range(data.draw(st.integers(1, 40))):
        fact = data.draw(any_fact(life.token))
        before = life.job
        try:
            done = life.tell(fact, after_s=data.draw(st.sampled_from([0.0, 1.0, 20.0, 700.0])))
        except ProtocolViolation:
            assert before.live.order is not None
            assert not isinstance(fact, lifecycle.ANSWERS_TO[before.live.order])
            assert life.job is before
            continue
        published += sum(note.kind == "finished" for note in done.notes)
        assert len(done.orders) <= 1
    assert published == (1 if life.job.row.state.final else 0)
