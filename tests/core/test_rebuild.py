"""The rows of a lost journal, from manifests and attempts that were found."""

from __future__ import annotations

import hashlib
import json

import pytest
from msgspec.structs import replace

from comfyd.core import rebuild, rules
from comfyd.core.job import Ask, Job, Live
from comfyd.core.model import (
    Fence,
    JobId,
    Outcome,
    Reason,
    Row,
    ServerName,
    Source,
    State,
    prompt_id_of,
)
from comfyd.core.rebuild import UNASKED_ATTEMPTS, Found, Result, Seen
from comfyd.core.result import manifest

J = JobId("fox.01K0000000000000000000000A")
FIRST = Row(
    job=J, seq=7, payload=f"{J}.json", sha256="ab", claimed_at=100.0, queue_by=160.0, priority=3
)
DONE = Row(
    job=J,
    seq=1,
    attempt=2,
    server=ServerName("local"),
    prompt_id=prompt_id_of(J, 2),
    completion=Source.SIGNAL,
    outcome=Outcome(state=State.DONE),
    drawn={"3.seed": 5},
    warnings=("w",),
    metadata={"ticket": 42},
    claimed_at=10.0,
    submitted_at=11.0,
    started_at=12.0,
    ended_at=13.5,
)
FAILED = Row(
    job=J,
    seq=1,
    outcome=Outcome(
        state=State.FAILED, reason=Reason.LOST, message="gone", detail={"times": [1, 2]}
    ),
)


def result_of(row, **changes):
    assert row.outcome is not None
    told = {**manifest(row, [], published_at=14.25), **changes}
    data = json.dumps(told).encode()
    digest = hashlib.sha256(data).hexdigest()
    return Result(done=row.outcome.state is State.DONE, manifest=data, sha256=digest)


def checked(row):
    """*row*, if it is one that the engine accepts."""
    rules.check(None, Job(row, Live(order=Ask.RETIRE)))
    return row


def test_a_published_result_makes_the_row_that_wrote_it():
    row = checked(rebuild.finished(FIRST, result_of(DONE)))
    assert (row.state, row.retired, row.queue_by) == (State.DONE, False, None)
    assert (row.seq, row.payload, row.sha256, row.priority) == (7, FIRST.payload, "ab", 3)
    told = ("attempt", "server", "prompt_id", "completion", "outcome", "drawn", "warnings")
    times = ("metadata", "claimed_at", "submitted_at", "started_at", "ended_at")
    for name in (*told, *times):
        assert getattr(row, name) == getattr(DONE, name), name
    assert row.published_at == 14.25


def test_a_published_failure_keeps_its_reason():
    row = checked(rebuild.finished(FIRST, result_of(FAILED)))
    assert (row.state, row.outcome) == (State.FAILED, FAILED.outcome)


def test_without_a_claimed_file_nothing_is_left_to_do():
    row = rebuild.finished(Row(job=J, seq=7), result_of(DONE))
    assert (row.state, row.retired) == (State.DONE, True)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{}",
        b"[" * 100_000,
        result_of(DONE, job="wolf.01K0000000000000000000000A").manifest,
        result_of(DONE, state="running").manifest,
        result_of(DONE, state="cancelled", attempts="two").manifest,
    ],
)
def test_whatever_a_published_folder_holds_its_job_is_over(done, data):
    row = checked(rebuild.finished(FIRST, Result(done=done, manifest=data, sha256="cd")))
    assert row.state is (State.DONE if done else State.FAILED)
    assert row.outcome is not None
    assert "manifest" in row.outcome.message


@pytest.mark.parametrize("result", [result_of(DONE), result_of(FAILED)])
def test_a_complete_stage_is_only_to_be_published(result):
    row = rebuild.staged(FIRST, result)
    assert row is not None
    assert (checked(row).state, row.retired) == (State.PUBLISHING, False)
    assert row.staged is not None
    assert row.staged.manifest_sha256 == result.sha256


def test_a_stage_that_cannot_be_read_is_not_used():
    assert rebuild.staged(FIRST, Result(done=True, manifest=b"{", sha256="cd")) is None


def found(attempt, seen, server="local", job=J):
    return Found(
        job=job,
        attempt=attempt,
        server=ServerName(server),
        origin=f"http://{server}",
        seen=seen,
        number=4.0,
        client_id="c",
    )


@pytest.mark.parametrize("seen", Seen)
def test_an_attempt_that_was_found_is_taken_up_where_it_is(seen):
    row = rebuild.taken_up(FIRST, [found(3, seen)], all_asked=False, now_s=200.0)
    rules.check(None, Job(row, Live(order=Ask.PROBE)))
    assert (row.state, row.attempt, row.prompt_id) == (State.SUBMITTED, 3, prompt_id_of(J, 3))
    assert (row.server, row.origin, row.client_id, row.number) == ("local", "http://local", "c", 4)
    assert row.submitted_at == 200.0
    assert row.started_at == (200.0 if seen is Seen.RUNNING else None)
    assert rebuild.fences(row, [found(3, seen)]) == ()


def test_of_several_attempts_the_latest_is_followed_and_the_others_are_fenced():
    attempts = [found(1, Seen.FINISHED, "old"), found(4, Seen.PENDING), found(2, Seen.RUNNING)]
    row = rebuild.taken_up(FIRST, attempts, all_asked=True, now_s=200.0)
    assert row.attempt == 4
    assert rebuild.fences(row, attempts) == tuple(
        Fence(prompt_id=prompt_id_of(J, n), job=J, server=ServerName(name), origin=f"http://{name}")
        for n, name in ((1, "old"), (2, "local"))
    )


def test_what_still_runs_for_a_job_that_is_over_is_fenced():
    row = rebuild.finished(FIRST, result_of(DONE))
    attempts = [found(1, Seen.RUNNING), found(2, Seen.FINISHED)]
    assert [fence.prompt_id for fence in rebuild.fences(row, attempts)] == [prompt_id_of(J, 1)]


def test_a_job_found_nowhere_begins_anew_with_an_identity_of_its_own():
    assert rebuild.taken_up(FIRST, [], all_asked=True, now_s=200.0) == FIRST
    unsure = rebuild.taken_up(FIRST, [], all_asked=False, now_s=200.0)
    assert (unsure.state, unsure.attempt) == (State.QUEUED, UNASKED_ATTEMPTS)
    rules.check(None, Job(unsure))


def test_a_file_that_is_no_job_fails_as_it_would_have():
    outcome = Outcome(state=State.FAILED, reason=Reason.INVALID_JOB, message="no")
    row = Row(job=J, seq=7, state=State.COLLECTING, outcome=outcome)
    attempts = [found(1, Seen.RUNNING)]
    assert rebuild.taken_up(row, attempts, all_asked=False, now_s=200.0) == row
    assert len(rebuild.fences(row, attempts)) == 1


@pytest.mark.parametrize(
    ("prompt_id", "tag", "expected"),
    [
        (prompt_id_of(J, 2), (J, 2), (J, 2)),
        (prompt_id_of(J, 2), (J, 1), None),
        (prompt_id_of(J, 2), None, None),
        ("else", (J, 2), None),
    ],
)
def test_a_prompt_is_ours_by_its_mark_and_its_id_together(prompt_id, tag, expected):
    assert rebuild.ours(prompt_id, tag) == expected


def test_jobs_are_sorted_by_the_time_in_their_ids():
    jobs = [JobId(f"{stem}.01K{end:0>23}") for stem, end in (("a", "3"), ("c", "1"), ("b", "2"))]
    assert [job[0] for job in sorted(jobs, key=rebuild.arrival)] == ["c", "b", "a"]


# --- a snapshot that was put back ----------------------------------------------------------------

SNAP = Row(
    job=J, seq=3, version=4, state=State.SUBMITTED, payload=f"{J}.json", sha256="ab", attempt=1,
    server=ServerName("local"), origin="http://local", prompt_id=prompt_id_of(J, 1), client_id="c",
    submitted_at=20.0, claimed_at=10.0, priority=3, key="nightly",
)  # fmt: skip
CLAIMED = rebuild.Lying(claimed=True)


def found_at(attempt, seen=Seen.RUNNING, server="local"):
    name = ServerName(server)
    return Found(job=J, attempt=attempt, server=name, origin=f"http://{server}", seen=seen)


def carried_on(row, lying, *found, all_asked=True):
    new = rebuild.carried_on(row, lying, found, all_asked=all_asked, now_s=99.0)
    if not new.state.final:
        rules.check(None, Job(new, Live(heard_s=0.0, since_s=0.0, order=Ask.PROBE)))
    assert new is row or new.version == row.version + 1
    assert (new.job, new.seq, new.key) == (row.job, row.seq, row.key)
    return new


@pytest.mark.parametrize(
    ("row", "lying", "found"),
    [
        (SNAP, CLAIMED, [found_at(1)]),
        (SNAP, CLAIMED, []),  # it is looked for again, by the usual rules
        (SNAP, rebuild.Lying(claimed=True, stage=True), [found_at(1, Seen.FINISHED)]),
        (FIRST, CLAIMED, []),
        (replace(FIRST, state=State.HELD, held="asked"), CLAIMED, []),
        (replace(FIRST, attempt=2), CLAIMED, [found_at(2, Seen.FINISHED)]),  # known of, and over
        (replace(DONE, state=State.DONE), rebuild.Lying(), []),
    ],
)
def test_what_is_as_it_was_stays_as_it_is(row, lying, found):
    assert carried_on(row, lying, *found) is row


@pytest.mark.parametrize("state", [s for s in State if not s.final])
@pytest.mark.parametrize("claimed", [True, False])
def test_what_was_published_since_is_over(state, claimed):
    row = replace(SNAP, state=state)
    lying = rebuild.Lying(claimed=claimed, stage=False, published=result_of(DONE))
    new = carried_on(row, lying, found_at(5))
    assert (new.state, new.retired, new.attempt) == (State.DONE, not claimed, 2)


@pytest.mark.parametrize("state", [s for s in State if not s.final])
def test_what_lies_nowhere_any_more_has_ended_and_is_never_run_again(state):
    new = carried_on(replace(SNAP, state=state), rebuild.Lying(), found_at(1), found_at(7))
    assert (new.state, new.retired) == (State.DONE, True)
    assert new.outcome is not None
    assert "taken away" in new.outcome.message


def test_what_could_not_be_read_and_lies_in_its_stage_is_not_over():
    row = replace(SNAP, state=State.COLLECTING, attempt=0, outcome=FAILED.outcome, prompt_id=None)
    assert carried_on(row, rebuild.Lying(stage=True)) is row


def test_what_is_complete_in_its_stage_is_published():
    lying = rebuild.Lying(claimed=True, stage=True, staged=result_of(DONE))
    new = carried_on(SNAP, lying)
    assert (new.state, new.attempt) == (State.PUBLISHING, 2)


@pytest.mark.parametrize(
    "state", [State.QUEUED, State.HELD, State.SUBMITTED, State.STOPPING, State.COLLECTING]
)
def test_an_attempt_that_was_made_since_is_followed(state):
    row = replace(SNAP, state=state, why=FAILED.outcome, outcome=FAILED.outcome, held="asked")
    new = carried_on(row, CLAIMED, found_at(1, Seen.FINISHED), found_at(3, server="other"))
    assert (new.state, new.attempt, new.server) == (State.SUBMITTED, 3, "other")
    assert new.prompt_id == prompt_id_of(J, 3)
    assert (new.why, new.outcome, new.held, new.charged) == (None, None, "", row.charged)


@pytest.mark.parametrize("state", [State.QUEUED, State.HELD])
def test_a_silent_server_may_hold_later_attempts(state):
    row = replace(FIRST, state=state, attempt=2, held="asked" if state is State.HELD else "")
    new = carried_on(row, CLAIMED, all_asked=False)
    assert (new.state, new.attempt) == (state, UNASKED_ATTEMPTS)
    assert carried_on(new, CLAIMED, all_asked=False) is new


def test_only_what_is_not_dealt_with_yet_is_fenced():
    known, stray = found_at(1, Seen.FINISHED), found_at(2, Seen.RUNNING, "other")
    new = carried_on(replace(SNAP, attempt=1), CLAIMED, known, stray, found_at(3))
    assert new.attempt == 3
    fences = rebuild.fences_since(new, SNAP, [known, stray, found_at(3)])
    assert [(fence.prompt_id, fence.server) for fence in fences] == [(prompt_id_of(J, 2), "other")]
