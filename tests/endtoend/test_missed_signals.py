"""The server's events are lost, in every way that a connection allows; the results are not."""

from __future__ import annotations

import json

import pytest
import trio

from comfyd.simulator.faults import HowOften
from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon
from tests.endtoend.waiting import counted, until

PATIENCE_S = 60
JOBS = 4
ENDS = ("end", "execution_success", "execution_error", "execution_interrupted")


@pytest.mark.parametrize("lost", [("end",), ENDS], ids=["end", "all ends"])
async def test_every_end_signal_is_lost(simulator, tmp_path, lost):
    for kind in lost:
        simulator.faults.drop[kind] = HowOften()
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("failing.json", graphs.failing(0))
            for number in range(1, JOBS):
                daemon.drop(f"job-{number}.json", graphs.picture(number))
            await daemon.finish(JOBS, within_s=40)
            metrics = await daemon.metrics()
            status = json.loads(await daemon.get("/api/v1/status"))
    results = daemon.results().values()
    assert sorted(result["state"] for result in results) == ["done"] * (JOBS - 1) + ["failed"]
    assert {result["completion"] for result in results} == {"audit"}
    assert metrics['comfyd_missed_signals_total{cause="silent",server="local"}'] == JOBS
    assert metrics['comfyd_completions_total{server="local",source="audit"}'] == JOBS
    assert status["servers"][0]["missed"] == JOBS
    assert {each["job"] for each in status["missed"]} == daemon.results().keys()
    assert {(each["cause"], each["source"]) for each in status["missed"]} == {("silent", "audit")}
    assert metrics['comfyd_completions_total{server="local",source="signal"}'] == 0
    assert set(simulator.executions.values()) == {1}


async def test_a_deaf_socket_is_found_out_by_the_next_submission(simulator, tmp_path):
    simulator.faults.deaf = HowOften(count=1)
    deaf_after_s = 1
    daemon = Daemon(tmp_path, simulator.url, {"tracker": {"deaf_after": f"{deaf_after_s}s"}})
    deaf = 'comfyd_websocket_disconnects_total{cause="deaf",server="local"}'
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            connected = 'comfyd_websocket_connected{server="local"}'
            await counted(daemon, connected, 1)
            # Still at work when it is found out: no audit of the end can have helped.
            daemon.drop("long.json", graphs.slow(0, deaf_after_s + 2))
            await until(lambda: simulator.posts)
            with trio.fail_after(deaf_after_s + 5):
                await counted(daemon, deaf, 1)
            for number in range(1, JOBS):
                daemon.drop(f"job-{number}.json", graphs.picture(number))
            await daemon.finish(JOBS, within_s=40)
            metrics = await daemon.metrics()
    assert {result["state"] for result in daemon.results().values()} == {"done"}
    assert metrics[deaf] == 1
    assert set(simulator.executions.values()) == {1}


async def test_no_websocket_at_all(simulator, tmp_path):
    simulator.faults.ws_refuse = HowOften()
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("failing.json", graphs.failing(0))
            for number in range(1, JOBS):
                daemon.drop(f"job-{number}.json", graphs.picture(number))
            await daemon.finish(JOBS, within_s=50)
            metrics = await daemon.metrics()
    states = sorted(result["state"] for result in daemon.results().values())
    assert states == ["done"] * (JOBS - 1) + ["failed"]
    assert metrics['comfyd_websocket_connects_total{result="ok",server="local"}'] == 0
    assert metrics['comfyd_websocket_connects_total{result="rejected",server="local"}'] > 0
    assert set(simulator.executions.values()) == {1}
