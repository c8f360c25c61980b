"""What a person on call reads in the log of a real daemon: each turn once, and no secret."""

from __future__ import annotations

import json
from collections import Counter

import trio

from comfyd.simulator.faults import HowOften
from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon
from tests.endtoend.server import Server
from tests.endtoend.waiting import counted, until

PATIENCE_S = 60
SECRET = "hunter2"


def story(daemon: Daemon, job: str) -> list[str]:
    """The names of a job's events, in order, but for those of level debug."""
    return [
        each["event"]
        for each in daemon.events()
        if each.get("job") == job and each["level"] != "debug"
    ]


async def test_every_turn_of_a_job_is_told_once(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url, {"log": {"level": "debug", "format": "json"}})
    config = json.loads(daemon.config.read_text())
    (tmp_path / "token").write_text(f"Bearer {SECRET}")
    (tmp_path / "token").chmod(0o600)
    config["servers"][0]["headers"] = {"Authorization": {"file": "token"}}
    daemon.config.write_text(json.dumps(config))
    text = graphs.mixed(0)
    text["12"]["inputs"]["source"] = "a private wish"
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("good.json", text)
            daemon.drop("bad.json", graphs.failing(1))
            daemon.drop("none.json", {"what": "is this"})
            await daemon.finish(3, within_s=30)
            simulator.faults.drop["end"] = HowOften(count=1)
            daemon.drop("missed.json", graphs.picture(2))
            await daemon.finish(4, within_s=30)
    way = ["job_claimed", "job_submitted", "job_started", "job_ended", "job_finished"]
    jobs = {job.rpartition(".")[0]: job for job in daemon.results()}
    assert {stem: story(daemon, job) for stem, job in jobs.items()} == {
        "good": way,
        "bad": way,
        "none": ["job_claimed", "job_finished"],
        "missed": way,
    }
    told = {(each.get("job"), each["event"]): each for each in daemon.events()}
    bad = told[jobs["bad"], "job_finished"]
    assert (bad["outcome"], bad["reason"], bad["level"]) == ("failed", "execution_error", "warning")
    assert bad["server"] == "local"
    assert bad["prompt"] == daemon.results()[jobs["bad"]]["prompt_id"]
    assert told[jobs["none"], "job_finished"]["reason"] == "invalid_job"
    ended = told[jobs["missed"], "job_ended"]
    assert (ended["missed"], ended["source"], ended["level"]) == ("silent", "audit", "warning")
    assert told[jobs["good"], "job_ended"]["level"] == "info"
    assert SECRET not in daemon.log()
    assert "private wish" not in daemon.log()


async def test_a_server_that_dies_is_told_once_and_so_is_its_return(tmp_path):
    with trio.fail_after(PATIENCE_S):
        async with Server.running(node_s=0.05) as server:
            daemon = Daemon(tmp_path, server.url)
            async with daemon.running():
                up = 'comfyd_server_state{server="local",state="up"}'
                down = 'comfyd_server_state{server="local",state="down"}'
                await counted(daemon, up, 1)
                daemon.drop("long.json", graphs.slow(0, 30))
                await until(lambda: any(e["event"] == "job_started" for e in daemon.events()))
                await server.kill()
                await counted(daemon, down, 1)
                await until(lambda: any(e["event"] == "attempt_lost" for e in daemon.events()))
                await trio.sleep(3)  # more probes that fail
                await server.start()
                await counted(daemon, up, 1)
    states = [each for each in daemon.events() if each["event"] == "server_state"]
    assert [(each["state"], each.get("was")) for each in states] == [
        ("up", None), ("down", "up"), ("up", "down"),
    ]  # fmt: skip
    assert [each["level"] for each in states] == ["info", "warning", "info"]
    assert "refused" in states[1]["reason"]
    counts = Counter(each["event"] for each in daemon.events())
    assert (counts["attempt_lost"], counts["websocket_disconnected"]) == (1, 1)
    assert (counts["ready"], counts["stopping"], counts["stopped"]) == (1, 1, 1)
