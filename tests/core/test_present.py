"""What people are shown of a job and of the daemon."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from comfyd.core.model import (
    JobId,
    Outcome,
    PromptId,
    Reason,
    Row,
    ServerName,
    Source,
    Staged,
    State,
    Verdict,
)
from comfyd.core.present import (
    LIVE_STATES,
    SHOWN_STATES,
    bare_url,
    job_story,
    job_summary,
    journal_state,
    rfc3339,
    shown_counts,
    shown_since,
    shown_state,
)
from comfyd.core.snapshot import JobView, ServerState, ServerView, Snapshot
from comfyd.core.wire.stats import Device

T = 1_900_000_000.0
JOB = JobId("portrait.01K0000000000000000000000A")
DONE = Row(
    job=JOB,
    seq=7,
    state=State.DONE,
    attempt=2,
    charged=1,
    server=ServerName("local"),
    prompt_id=PromptId("p-2"),
    completion=Source.AUDIT,
    outcome=Outcome(state=State.DONE),
    staged=Staged(manifest_sha256="0" * 64, outputs=2, bytes=4096),
    key="secret-key",
    metadata={"ticket": "secret-42"},
    drawn={"3.seed": 5},
    warnings=("One thing.",),
    abandoned=(("old", "http://u:hunter2@old:8188", "p-1"),),
    claimed_at=T,
    submitted_at=T + 1,
    started_at=T + 1.5,
    ended_at=T + 4,
    published_at=T + 4.25,
)


@dataclass
class Told:
    at: float
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


def test_a_summary_tells_how_it_went():
    assert job_summary(DONE) == {
        "job": JOB,
        "seq": 7,
        "state": "done",
        "server": "local",
        "prompt_id": "p-2",
        "attempts": 2,
        "charged": 1,
        "priority": 0,
        "completion": "audit",
        "reason": None,
        "message": "",
        "times": {
            "claimed": "2030-03-17T17:46:40.000Z",
            "submitted": "2030-03-17T17:46:41.000Z",
            "started": "2030-03-17T17:46:41.500Z",
            "ended": "2030-03-17T17:46:44.000Z",
            "published": "2030-03-17T17:46:44.250Z",
        },
        "durations_s": {"wait": 1.0, "queue": 0.5, "run": 2.5, "collect": 0.25, "total": 4.25},
    }


def test_a_queued_job_has_only_been_claimed():
    summary = job_summary(Row(job=JOB, seq=1, claimed_at=T))
    assert summary["state"] == "queued"
    assert {name for name, at in summary["times"].items() if at} == {"claimed"}
    assert summary["message"] == ""


def test_a_failure_says_why_as_soon_as_it_is_decided():
    failed = Outcome(state=State.FAILED, reason=Reason.STALLED, message="It stood still.")
    stopping = Row(job=JOB, seq=1, state=State.STOPPING, why=failed)
    collecting = Row(job=JOB, seq=1, state=State.COLLECTING, outcome=failed)
    for summary in map(job_summary, (stopping, collecting)):
        assert (summary["reason"], summary["message"]) == ("stalled", "It stood still.")


def test_a_held_job_says_what_for():
    assert job_summary(Row(job=JOB, seq=1, state=State.HELD, held="Look."))["message"] == "Look."


def test_a_job_that_a_server_said_no_to_says_which_and_why():
    outcome = Outcome(state=State.FAILED, reason=Reason.REJECTED, message="No such model.")
    waiting = Row(job=JOB, seq=1, verdicts=(Verdict(ServerName("a"), "http://a", outcome),))
    assert job_summary(waiting)["message"].endswith("a: No such model.")
    assert job_summary(msgspec.structs.replace(waiting, state=State.SUBMITTED))["message"] == ""
    said = {"server": "a", "reason": "rejected", "message": "No such model."}
    assert job_story(waiting, [])["verdicts"] == [said]


def test_a_job_that_was_never_sent_has_waited_to_its_end():
    cancelled = Row(job=JOB, seq=1, state=State.CANCELLED, claimed_at=T, published_at=T + 4)
    waited = {"wait": 4.0, "queue": 0.0, "run": 0.0, "collect": 0.0, "total": 4.0}
    assert job_summary(cancelled)["durations_s"] == waited


def test_a_story_is_for_everyone_only_without_what_its_owner_wrote():
    told = [Told(T, "moved", {"state": "submitted"}), Told(T + 1, "signal")]
    story = job_story(DONE, told)
    assert story["events"] == [
        {"at": "2030-03-17T17:46:40.000Z", "kind": "moved", "data": {"state": "submitted"}},
        {"at": "2030-03-17T17:46:41.000Z", "kind": "signal", "data": {}},
    ]
    assert story["outputs"] == {"files": 2, "bytes": 4096}
    assert story["abandoned"] == [{"server": "old", "url": "http://old:8188", "prompt_id": "p-1"}]
    assert "secret" not in json.dumps(story)
    assert "hunter2" not in json.dumps(story)
    full = job_story(DONE, told, full=True)
    assert full.items() >= story.items()
    assert full["metadata"] == {"ticket": "secret-42"}
    assert full["key"] == "secret-key"


def test_running_is_a_submitted_job_that_was_seen_to_run():
    row = Row(job=JOB, seq=1, state=State.SUBMITTED)
    assert shown_state(row) == "submitted"
    assert shown_state(Row(job=JOB, seq=1, state=State.SUBMITTED, started_at=T)) == "running"
    assert shown_state(Row(job=JOB, seq=1, state=State.STOPPING, started_at=T)) == "stopping"


def test_every_state_is_shown():
    assert {journal_state(shown) for shown in SHOWN_STATES} == set(State)
    assert set(SHOWN_STATES) - set(LIVE_STATES) == {s.value for s in State if s.final}
    with pytest.raises(ValueError, match="nonsense"):
        journal_state("nonsense")


def test_counts_set_running_apart_and_never_go_below_zero():
    counts = shown_counts({State.SUBMITTED: 3, State.DONE: 9}, running=2)
    assert (counts["submitted"], counts["running"], counts["done"]) == (1, 2, 9)
    assert shown_counts({}, running=1)["submitted"] == 0


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("http://127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("https://me:pa@ss@host:1/comfy?token=abc#x", "https://host:1/comfy"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://[::1]:8188/", "http://[::1]:8188/"),
    ],
)
def test_no_url_is_shown_with_its_credentials(url, bare):
    assert bare_url(url) == bare


def test_milliseconds_are_always_written():
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(0.0016) == "1970-01-01T00:00:00.001Z"


def test_a_snapshot_as_json():
    server = ServerView(
        name="local",
        url="http://u:hunter2@127.0.0.1:8188",
        state=ServerState.WEDGED,
        reason="Nothing moves.",
        stale=1,
        devices=(Device("cuda:0 RTX", "cuda", 0, 8, 4),),
    )
    job = JobView(
        job=JOB, state="running", server="local", prompt_id="p", attempt=1, since=T - 5, silent_s=2
    )
    shown = Snapshot(
        at=T,
        version="1.0",
        started_at=T - 60,
        servers=(server,),
        counts=shown_counts({State.QUEUED: 4}, running=1),
        oldest_at={"queued": T - 9, "submitted": None},
        jobs=(job,),
        more=3,
        free_bytes=10,
    ).to_dict()
    assert "hunter2" not in json.dumps(shown)
    assert shown["uptime_s"] == 60
    assert shown["stale"] == 1
    assert shown["oldest_age_s"] == {"queued": 9.0, "submitted": 0.0}
    assert shown["at_hand"][0]["for_s"] == 5
    assert (shown["servers"][0]["state"], shown["servers"][0]["reason"]) == (
        "wedged",
        "Nothing moves.",
    )
    assert shown["servers"][0]["devices"][0]["vram_free_bytes"] == 4
    assert shown["more"] == 3


def test_a_clock_that_was_set_back_shows_no_negative_ages():
    view = JobView(job=JOB, state="queued", server=None, prompt_id=None, attempt=0, since=T + 5)
    shown = Snapshot(at=T, version="1", oldest_at={"queued": T + 9}, jobs=(view,)).to_dict()
    assert shown["oldest_age_s"]["queued"] == 0
    assert shown["at_hand"][0]["for_s"] == 0
    assert shown["started"] is None


@pytest.mark.parametrize(
    ("state", "submitted_at", "started_at", "since"),
    [
        (State.SUBMITTED, T, T + 5, T + 5),  # running: not since it was submitted
        (State.SUBMITTED, T, None, T),
        (State.SUBMITTED, None, None, T + 60),
        (State.COLLECTING, T, T + 5, T + 60),
    ],
)
def test_since_when_it_is_as_shown_outlives_a_restart(state, submitted_at, started_at, since):
    row = Row(job=JOB, seq=1, state=state, submitted_at=submitted_at, started_at=started_at)
    assert shown_since(row, T + 60) == since
