"""What the status page and ``/api/v1/status`` say of a daemon at work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio

from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon

PATIENCE_S = 60
JOB_S = 3.0


async def told(daemon: Daemon, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The status, once it *holds*."""
    while True:
        status: dict[str, Any] = json.loads(await daemon.get("/api/v1/status"))
        if holds(status):
            return status
        await trio.sleep(0.05)


def counts_steps(status: dict[str, Any]) -> bool:
    return any(job["progress"] and job["progress"]["steps"] for job in status["at_hand"])


async def test_progress_pace_and_queue_are_told(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url, {"audit": {"stale_after": "1m"}})
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("first.json", graphs.slow(0, JOB_S))
            running = await told(daemon, counts_steps)
            [job] = running["at_hand"]
            progress = job["progress"]
            assert (job["state"], progress["name"]) == ("running", "SimSleep")
            assert 0 < progress["step"] <= progress["steps"]
            assert (progress["nodes"], progress["nodes_done"]) == (3, 1)
            assert 1 / 3 < progress["share"] <= 2 / 3
            assert (job["ready_s"], running["ready_s"]) == (None, None)  # nothing has run yet

            await told(daemon, lambda status: status["jobs"]["done"])
            for number in range(1, 6):
                document = {"workflow": graphs.slow(number, JOB_S), "priority": int(number == 5)}
                daemon.drop(f"job-{number}.json", document)
            then = await told(
                daemon, lambda status: counts_steps(status) and len(status["queue"]) == 3
            )
            page = (await daemon.get("/")).decode()
        async with daemon.running():  # the pace outlives the daemon; what a prompt's nodes are, not
            status = json.loads(await daemon.get("/api/v1/status"))
    assert [each["position"] for each in then["queue"]] == [1, 2, 3]
    first, second, third = then["queue"]
    assert JOB_S <= then["servers"][0]["run_s"] <= 2 * JOB_S
    assert first["ready_s"] < second["ready_s"] < third["ready_s"] <= then["ready_s"]
    assert third["ready_s"] >= 3 * JOB_S
    for word in ("Everything is fine.", "SimSleep", "Ready in", f'/api/v1/jobs/{first["job"]}"'):
        assert word in page
    assert JOB_S <= status["servers"][0]["run_s"] <= 2 * JOB_S
