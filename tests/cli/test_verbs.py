"""cancel, retry, hold, release, pause, resume, drain and forget, as they are typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from comfyd.cli import verbs
from comfyd.core.model import JobId, Row, prompt_id_of
from comfyd.web.control_client import ask
from tests.cli.conftest import GRAPH, Serve, Site
from tests.cli.test_reads import call

SLEEP: dict[str, Any] = {
    "1": GRAPH["1"],
    "5": {"class_type": "SimSleep", "inputs": {"image": ["1", 0], "seconds": 60.0}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
}
JOB_VERBS = ("cancel", "retry", "hold", "release")
SERVER_VERBS = ("pause", "resume", "drain", "forget")


@pytest.fixture
def quick(site: Site) -> Site:
    site.config.write_text(site.config.read_text() + "audit: {lost_grace: 300ms}\n")
    return site


async def submit(site: Site, name: str, graph: object = SLEEP) -> str:
    file = site.file(f"{name}.json", graph)
    code, out, err = await call(site, "submit", file)
    assert code == 0, err
    return out.strip()


async def until(site: Site, job: str, *states: str) -> None:
    for _ in range(200):
        code, out, _ = await call(site, "show", job, "--json")
        if code == 0 and json.loads(out)["state"] in states:
            return
        await trio.sleep(0.05)
    raise AssertionError(f"{job} is not {states}: {out}")


def manifest(site: Site, job: str) -> dict[str, Any]:
    path = site.spool.failed / job / "error.json"
    made: dict[str, Any] = json.loads(path.read_bytes())
    return made


# --- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cancel"], "say which jobs"),
        (["cancel", "fox", "--state", "queued"], "not both"),
        (["hold", "fox", "--match", "*"], "not both"),
        (["cancel", "--state", "done"], "invalid choice"),
        (["hold", "--state", "running"], "invalid choice"),
        (["retry", "--state", "queued"], "invalid choice"),
        (["release", "--state", ""], "invalid choice"),
        (["pause", "gpu1"], "unrecognized"),
        (["drain"], "required"),
        (["forget"], "required"),
        (["drain", "a", "b"], "unrecognized"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(site: Site, words: list[str], told: str):
    code, out, err = site(*words)
    assert (code, out) == (64, "")
    assert told in err


@pytest.mark.parametrize("verb", [*JOB_VERBS, *SERVER_VERBS])
def test_nothing_is_changed_without_a_daemon(site: Site, verb: str):
    words = ["fox"] if verb in JOB_VERBS else ["a"] if verb in {"drain", "forget"} else []
    code, out, err = site(verb, *words)
    assert (code, out) == (69, "")
    assert "No daemon is running" in err
    assert f"To {verb} needs the running daemon." in err
    assert not (site.home / "state").exists()


@pytest.mark.parametrize("verb", [*JOB_VERBS, *SERVER_VERBS])
def test_help_says_what_happens_and_with_which_exit_code(site: Site, verb: str):
    code, out, _ = site(verb, "--help")
    assert code == 0
    assert "exit codes: 0" in out
    assert "\\n" not in out
    assert max(map(len, out.splitlines())) <= 100


# --- jobs ----------------------------------------------------------------------------------------


async def test_a_waiting_and_a_running_prompt_are_cancelled_and_nothing_else_is(
    quick: Site, daemon: Serve
):
    async with daemon() as simulator:
        running, pending, queued, other = [await submit(quick, name) for name in "abcd"]
        await until(quick, running, "running")
        await until(quick, pending, "submitted")
        code, out, err = await call(quick, "cancel", pending, queued[:-1], "wolf")
        assert code == 1
        assert out.splitlines() == [
            f"{pending}  cancelled",
            f"{queued}  cancelled",
            'wolf  no job is known as "wolf"',
        ]
        assert err == "comfyd: 3 jobs: 2 cancelled, 1 unknown\n"
        for job in (pending, queued):
            assert manifest(quick, job)["state"] == manifest(quick, job)["reason"] == "cancelled"
        await until(quick, other, "submitted")
        code, out, err = await call(quick, "cancel", running)
        assert (code, out, err) == (0, f"{running}  cancelled\n", "")
        await until(quick, other, "running")  # no interrupt was meant for it
        code, out, _ = await call(quick, "cancel", "--match", "?.*", "--json")
        assert code == 0
        assert [json.loads(line) for line in out.splitlines()] == [
            {
                "job": other,
                "ok": True,
                "outcome": "cancelled",
                "what": "cancelled",
                "state": "cancelled",
            }
        ]
        assert await call(quick, "cancel", other) == (0, f"{other}  already cancelled\n", "")
        code, out, err = await call(quick, "cancel", "--match", "*")
        assert (code, out, err) == (0, "", "comfyd: no job to cancel was found\n")
        ran = {prompt_id_of(JobId(job), 1) for job in (running, other)}
        assert set(simulator.executions) == ran


async def test_jobs_are_held_released_and_made_again(quick: Site, daemon: Serve):
    async with daemon():
        await call(quick, "drain", "sim")
        jobs = [
            await submit(quick, name, {"workflow": GRAPH, "set": {"1.batch_size": 1}})
            for name in ("fox", "hare")
        ]
        await until(quick, jobs[1], "queued")
        code, out, err = await call(quick, "hold", "--state", "queued")
        assert code == 0
        assert sorted(out.splitlines()) == [f"{job}  held" for job in sorted(jobs)]
        assert err == "comfyd: 2 jobs: 2 held\n"
        assert "person holds it" in (await call(quick, "jobs"))[1]
        await call(quick, "resume", "sim")
        assert (await call(quick, "release", "fox"))[:2] == (0, f"{jobs[0]}  released\n")
        await until(quick, jobs[0], "done")
        assert (await call(quick, "cancel", "fox"))[:2] == (1, f"{jobs[0]}  already done\n")
        assert (await call(quick, "retry", "hare"))[0] == 1
        assert (await call(quick, "cancel", "hare"))[0] == 0
        code, out, _ = await call(quick, "retry", jobs[0], jobs[1], "--json")
        assert code == 0
        made = [json.loads(line)["new"] for line in out.splitlines()]
        for old, new in zip(jobs, made, strict=True):
            await until(quick, new, "done")
            story = json.loads((await call(quick, "show", new, "--json"))[1])
            assert story["retry_of"] == old
            assert f"retried as {new}" in (await call(quick, "show", old))[1]
            copied = (quick.spool.done / new / "job.json").read_bytes()
            assert json.loads(copied)["set"] == {"1.batch_size": 1}
        shutil.rmtree(quick.spool.done / made[0])
        code, out, _ = await call(quick, "retry", made[0])
        assert code == 1
        assert "taken away from done/" in out
        assert list(quick.spool.claimed.iterdir()) == []


async def test_a_retry_that_ended_before_its_row_is_a_plain_job_at_the_next_start(
    quick: Site, daemon: Serve
):
    async with daemon():
        job = await submit(quick, "fox", GRAPH)
        await until(quick, job, "done")
    left = quick.spool.claimed / "fox.01K0000000000000000000000Z.json"
    shutil.copy(quick.spool.done / job / "job.json", left)
    async with daemon():
        await until(quick, left.stem, "done")
        assert len(json.loads((await call(quick, "jobs", "--json"))[1])["jobs"]) == 2


async def test_a_long_queue_is_cancelled_in_portions(
    site: Site, daemon: Serve, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verbs, "PORTION", 50)
    async with daemon():
        await call(site, "drain", "sim")  # it is remembered: the next one sends nothing
    count = 620  # more than a page, and more than what the daemon keeps of its queue in memory
    rows = []
    for seq in range(1, count + 1):
        job = JobId(f"j{seq}.01K0000000000000000000000A")
        rows.append(Row(job=job, seq=seq, payload=f"{job}.json", claimed_at=1.0))
        (site.spool.claimed / f"{job}.json").write_text("{}")
    site.journal(*rows)
    async with daemon():
        code, out, err = await call(site, "cancel", "--state", "queued")
        assert code == 0
        assert len(out.splitlines()) == count
        assert err == f"comfyd: {count} jobs: {count} cancelled\n"
        for _ in range(100):
            counts = json.loads((await call(site, "status", "--json"))[1])["jobs"]
            if counts["cancelled"] == count:
                break
            await trio.sleep(0.05)
        assert counts["cancelled"] == count
        assert len(list(site.spool.failed.iterdir())) == count


def test_thousands_of_names_are_asked_in_portions(site: Site, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def ask(config: object, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        asked.append(len(request["jobs"]))
        made = [
            {"job": job, "ok": True, "outcome": "held", "what": "held"} for job in request["jobs"]
        ]
        return {"ok": True, "results": made}

    monkeypatch.setattr(verbs, "ask_daemon", ask)
    code, out, err = site("hold", *(f"j{n}" for n in range(10_000)))
    assert code == 0
    assert len(out.splitlines()) == 10_000
    assert err == "comfyd: 10000 jobs: 10000 held\n"
    assert max(asked) == verbs.PORTION
    assert sum(asked) == 10_000


async def test_odd_names_are_told_inert(quick: Site, daemon: Serve):
    async with daemon():
        for odd in ("\x1b[31m", "\udcff", "\u202e", "x" * 5000, "a\nb"):
            code, out, err = await call(quick, "cancel", odd)
            assert code == 1
            assert len((out + err).splitlines()) == 1
            assert "\x1b" not in out + err


async def test_no_number_in_a_request_ends_the_daemon(site: Site, daemon: Serve):
    socket = site.home / "state" / "control.sock"
    async with daemon():
        for after in (10**30, -(10**30), 1.5, "1", [1]):
            request: dict[str, Any] = {"verb": "jobs", "after": after}
            answer = await trio.to_thread.run_sync(ask, socket, request, 5.0)
            assert (answer["ok"], answer["kind"]) == (False, "UsageError")
        for more in ({"limit": 10**30}, {"after": 0}):
            request = {"verb": "jobs", **more}
            answer = await trio.to_thread.run_sync(ask, socket, request, 5.0)
            assert answer == {"ok": True, "jobs": []}


# --- the intake and servers ----------------------------------------------------------------------


async def test_a_paused_intake_leaves_files_in_new(quick: Site, daemon: Serve, tmp_path: Path):
    async with daemon():
        code, out, err = await call(quick, "pause")
        assert (code, err) == (0, "")
        assert out.startswith("The intake is paused: ")
        job = await submit(quick, "fox", GRAPH)
        await trio.sleep(1)
        assert list(quick.dropped()) == [f"{job}.json"]
        assert "intake is paused" in (await call(quick, "status"))[1]
        assert json.loads((await call(quick, "status", "--json"))[1])["paused"] is True
        result = json.loads((await call(quick, "resume", "--json"))[1])
        assert (result["ok"], result["paused"]) == (True, False)
        await until(quick, job, "done")


async def test_a_drained_server_is_told_in_words(quick: Site, daemon: Serve):
    async with daemon():
        assert (await call(quick, "drain", "gpu9"))[0] == 1
        assert "there are: sim" in (await call(quick, "drain", "gpu9"))[2]
        job = await submit(quick, "fox")
        await until(quick, job, "running")
        code, out, _ = await call(quick, "drain", "sim")
        assert (code, out) == (0, "sim gets nothing more; 1 prompt to finish.\n")
        out = (await call(quick, "status"))[1]
        assert "draining" in out
        assert "gets nothing more; 1 prompt to finish" in out
        assert (await call(quick, "cancel", job))[0] == 0
        assert "nothing of ours is left there" in (await call(quick, "status"))[1]
        code, out, err = await call(quick, "forget", "sim")
        assert (code, out) == (1, "")
        assert "drain it instead" in err
        assert (await call(quick, "resume", "sim"))[:2] == (0, "sim may be used again.\n")
        await until(quick, await submit(quick, "hare", GRAPH), "done")
