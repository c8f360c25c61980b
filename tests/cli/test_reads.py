"""status, jobs, show and check: from the journal when no daemon runs, else from the daemon."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
import trio

from comfyd.core.model import JobId, Outcome, PromptId, Reason, Row, ServerName, Source, State
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Batch, Event, Remember
from tests.cli.conftest import GRAPH, Serve, Site

T = 1_900_000_000.0
SERVER = ServerName("sim")
DONE = Row(
    job=JobId("fox.01K0000000000000000000000A"),
    seq=1,
    state=State.DONE,
    attempt=1,
    server=SERVER,
    prompt_id=PromptId("p-1"),
    completion=Source.SIGNAL,
    outcome=Outcome(state=State.DONE),
    claimed_at=T,
    submitted_at=T + 1,
    started_at=T + 2,
    ended_at=T + 3,
    published_at=T + 4,
    retired=True,
    metadata={"ticket": 42},
    warnings=("Only\x1b[31m previews.\nReally.",),
    abandoned=(("old", "http://old:8188", "p-0"),),
)
FAILED = Row(
    job=JobId("fox.01K0000000000000000000000B"),
    seq=2,
    state=State.FAILED,
    outcome=Outcome(
        state=State.FAILED, reason=Reason.REJECTED, message="node \u202e1\x07 says\nno"
    ),
    claimed_at=T,
    published_at=T + 200,
    retired=True,
)
RUNNING = Row(
    job=JobId("hare.01K0000000000000000000000C"),
    seq=3,
    state=State.SUBMITTED,
    attempt=2,
    server=SERVER,
    prompt_id=PromptId("p-3"),
    claimed_at=T,
    submitted_at=T + 1,
    started_at=T + 2,
)
QUEUED = Row(job=JobId("owl.01K0000000000000000000000D"), seq=4, priority=5, claimed_at=T + 3)
EVENTS = (
    Event(job=DONE.job, at=T, kind="claimed", data={"payload": "fox.json", "invalid": False}),
    Event(job=DONE.job, at=T + 1, kind="moved", data={"state": "submitting", "server": "sim"}),
    Event(job=DONE.job, at=T + 1.5, kind="retry", data={"operation": "submit", "reason": "busy"}),
    Event(job=DONE.job, at=T + 2, kind="audit", data={"verdict": "running", "reason": ""}),
    Event(
        job=DONE.job,
        at=T + 3,
        kind="ended",
        data={"source": "audit", "missed": "deaf", "end": "success", "server": "sim"},
    ),
    Event(job=DONE.job, at=T + 3.1, kind="lost", data={"cause": "restart", "charged": True}),
    Event(job=DONE.job, at=T + 3.2, kind="signal", data={"sign": "ended"}),
    Event(job=DONE.job, at=T + 3.3, kind="fetched", data={"outputs": 1, "bytes": 2048}),
    Event(job=DONE.job, at=T + 3.4, kind="novel", data={"a": 1}),
    Event(job=DONE.job, at=T + 4, kind="finished", data={"outcome": "done", "reason": None}),
)


@pytest.fixture
def journaled(site: Site) -> Site:
    site.journal(DONE, FAILED, RUNNING, QUEUED, events=EVENTS)
    return site


# --- without a daemon ----------------------------------------------------------------------------


def test_where_no_daemon_ran_there_is_nothing_and_that_is_fine(site: Site):
    code, out, err = site("status")
    assert code == 0
    assert "jobs: none yet" in out
    assert "no daemon has run here yet" in err
    assert site("jobs")[:2] == (0, "")
    assert site.json("jobs") == {"jobs": []}
    assert site("show", "fox")[0] == 1
    assert not (site.home / "state").exists()  # looking makes nothing


def test_a_lost_journal_is_told_from_one_that_never_was(site: Site):
    (site.spool.done / DONE.job).mkdir()
    code, _, err = site("status")
    assert code == 0
    assert "its journal is gone: the next start rebuilds it" in err
    assert not (site.home / "state").exists()


def test_a_damaged_journal_is_told_in_one_sentence(journaled: Site):
    path = journaled.home / "state" / "comfyd.db"
    content = path.read_bytes()
    for damaged in (b"no journal" * 500, content[:100] + b"\xff" * (len(content) - 100)):
        path.write_bytes(damaged)
        for words in (("status",), ("jobs",), ("show", "fox")):
            code, out, err = journaled(*words)
            assert (code, out) == (70, "")
            assert "the journal is damaged" in err
            assert "At its next start the daemon moves it aside" in err
        assert path.read_bytes() == damaged


def test_status_comes_from_the_journal(journaled: Site):
    code, out, err = journaled("status")
    assert code == 0
    assert err.startswith("comfyd: not running, as of 2")
    assert "jobs: 1 queued, 1 running, 1 done, 1 failed" in out
    assert "hare." in out
    status = journaled.json("status")
    assert status["jobs"]["running"] == 1
    assert status["started"] is None
    assert status["servers"] == []
    [at_hand] = status["at_hand"]
    assert (at_hand["state"], at_hand["silent_s"]) == ("running", None)


def test_a_pause_that_a_dead_daemon_left_is_told(journaled: Site):
    assert journaled.json("status")["paused"] is False
    store = SqliteStore.open(journaled.home / "state" / "comfyd.db")
    store.commit(Batch(changes=(Remember(name="paused", value=True),)))
    store.close()
    assert journaled.json("status")["paused"] is True
    assert "intake is paused" in journaled("status")[1]


def test_jobs_come_from_the_journal_newest_first(journaled: Site):
    found = [job["job"] for job in journaled.json("jobs")["jobs"]]
    assert found == [QUEUED.job, RUNNING.job, FAILED.job, DONE.job]
    _, out, err = journaled("jobs")
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["JOB", "STATE", "SERVER"]
    assert len(lines) == 5
    assert "\x07" not in out
    assert "\u202e" not in out
    assert lines[3].endswith("node �1� says no")
    assert "3 min" in lines[3]
    assert "not running" in err


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ("running", [RUNNING.job]),
        ("submitted", []),
        ("queued", [QUEUED.job]),
        ("failed", [FAILED.job]),
        ("held", []),
    ],
)
def test_jobs_are_chosen_by_the_state_that_is_shown(state: str, found: list[str], journaled: Site):
    assert [job["job"] for job in journaled.json("jobs", "--state", state)["jobs"]] == found


def test_a_limit_counts_from_the_newest(journaled: Site):
    assert len(journaled.json("jobs", "--limit", "3")["jobs"]) == 3
    [only] = journaled.json("jobs", "--limit", "1")["jobs"]
    assert only["job"] == QUEUED.job


def test_more_than_a_page_of_jobs_is_listed(site: Site):
    rows = [
        Row(job=JobId(f"j{seq}.01K0000000000000000000000A"), seq=seq, claimed_at=T)
        for seq in range(1, 1203)
    ]
    site.journal(*rows)
    found = [job["seq"] for job in site.json("jobs", "--limit", "1201")["jobs"]]
    assert found == list(range(1202, 1, -1))


def test_show_tells_the_whole_story(journaled: Site):
    code, out, _ = journaled("show", DONE.job)
    assert code == 0
    for told in (
        "state      done",
        "prompt     p-1",
        "found by   signal",
        '{"ticket": 42}',
        "wait 1.0 s, queue 1.0 s, run 1.0 s, collect 1.0 s, total 4.0 s",
        "warning    Only�[31m previews. Really.",
        "abandoned  p-0 on old (http://old:8188)",
        "+0.000 s  claimed as fox.json",
        "+1.000 s  submitting on sim",
        "+1.500 s  submit to be tried again: busy",
        "audit: running",
        "ended on sim with success, learnt by audit, its end signal was missed: deaf",
        "attempt lost: restart, charged",
        "end signal received",
        "1 output downloaded and verified, 2.0 KiB",
        "novel: a 1",
        "(taken away)",
    ):
        assert told in out
    (journaled.spool.done / DONE.job).mkdir()
    assert "(taken away)" not in journaled("show", DONE.job)[1]


@pytest.mark.parametrize("text", [DONE.job, "p-1", "p-0", DONE.job[:-1] + "A"])
def test_show_finds_a_job_by_what_people_have(text: str, journaled: Site):
    assert journaled.json("show", text)["job"] == DONE.job


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fox", "may mean 2 jobs"),
        ("wolf", "no job"),
        ("", "no job"),
        ("\x1b\n", "no job"),
        ("ü", "no job"),
    ],
)
def test_what_names_no_job_or_several_is_refused(text: str, told: str, journaled: Site):
    code, out, err = journaled("show", text)
    assert (code, out) == (1, "")
    assert told in err.splitlines()[-1]
    assert "\x1b" not in err


def test_check_needs_the_daemon(journaled: Site):
    code, out, err = journaled("check", DONE.job)
    assert (code, out) == (69, "")
    assert "No daemon is running" in err


def test_a_daemon_that_holds_the_lock_but_does_not_listen_is_unreachable(journaled: Site):
    with StateLock(journaled.home / "state" / "lock").acquire():
        code, out, err = journaled("status")
    assert (code, out) == (69, "")
    assert "does not answer" in err


@pytest.fixture
def silent(site: Site) -> Iterator[None]:
    """A control socket that takes a question and hangs up."""
    (site.home / "state").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(site.home / "state" / "control.sock"))
        listener.listen()
        listener.settimeout(0)
        yield


@pytest.mark.usefixtures("silent")
def test_a_daemon_that_takes_the_question_and_is_silent_is_unreachable(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("comfyd.cli.reading.ANSWER_S", 0.2)
    code, out, err = site("status")
    assert (code, out) == (69, "")
    assert "did not answer" in err


def test_a_damaged_journal_is_told(journaled: Site):
    path = journaled.home / "state" / "comfyd.db"
    path.write_bytes(b"no journal" * 1000)
    code, out, err = journaled("jobs")
    assert (code, out) == (70, "")
    assert str(path) in err


# --- with a daemon -------------------------------------------------------------------------------


async def call(site: Site, *words: str) -> tuple[int, str, str]:
    return await trio.to_thread.run_sync(lambda: site(*words))


async def test_a_running_daemon_answers_the_same_questions(site: Site, daemon: Serve):
    async with daemon():
        code, out, err = await call(site, "submit", site.file("fox.json", GRAPH), "--wait")
        job = out.strip()
        assert code == 0, err
        assert f"{job}: done" in err
        code, out, err = await call(site, "status")
        assert (code, err) == (0, "")
        assert "up" in out.splitlines()[2].split()
        assert "jobs: 1 done" in out
        code, out, err = await call(site, "jobs")
        assert (code, err) == (0, "")
        assert job in out
        code, out, err = await call(site, "show", "fox")
        assert (code, err) == (0, "")
        assert "end signal received" in out
        code, out, err = await call(site, "check", job)
        assert (code, out, err) == (0, f"{job}: done, nothing to check\n", "")
        code, out, err = await call(site, "show", "wolf")
        assert (code, out) == (1, "")
        assert "wolf" in err
        live = json.loads((await call(site, "show", job, "--json"))[1])
        listed = json.loads((await call(site, "jobs", "--json"))[1])
    assert site.json("show", job) == live
    assert site.json("jobs") == listed
    assert "not running" in site("status")[2]


async def test_check_looks_now(site: Site, daemon: Serve):
    async with daemon(run_s=2.0):
        code, out, _ = await call(site, "submit", site.file("fox.json", GRAPH))
        job = out.strip()
        for _ in range(100):
            if (await call(site, "jobs", "--state", "running"))[1]:
                break
            await trio.sleep(0.05)
        code, out, _ = await call(site, "check", job)
        assert code == 0
        assert out.startswith(f"{job}: still running")
        assert (await call(site, "check", "wolf"))[0] == 1
        result = json.loads((await call(site, "check", job, "--json"))[1])
        assert (result["job"], result["before"], result["after"]) == (job, "running", "running")
