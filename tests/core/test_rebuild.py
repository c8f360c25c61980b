"""The rows of a lost journal, from manifests and attempts that were found."""

from __future__ import annotations

import hashlib
import json

import pytest

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
