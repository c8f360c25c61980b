"""A server whose events fail in every way we know: all is delivered, and counted as missed."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from comfyd import app
from comfyd.config import Config
from comfyd.simulator import Faults, Simulator
from comfyd.spool.layout import Spool, drop
from tests.test_app import GRAPH, settings, until

JOBS = 20


async def metric(daemon: app.Daemon, name: str) -> Counter[str]:
    """The values of one metric by their labels, as a scraper sees them."""
    host, _, port = daemon.http_url.removeprefix("http://").rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b"".join([chunk async for chunk in stream]).decode()
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.removeprefix(name).rpartition(" ")
            found[labels] = int(float(value))
    return found


async def counted(daemon: app.Daemon, name: str, labels: str, count: int) -> None:
    """Until a counter has come so far, as a scraper sees it."""
    while (await metric(daemon, name))[labels] < count:  # noqa: ASYNC110 - that is how to see it
        await trio.sleep(0.05)


async def dropped(configured: Config, count: int, first: int = 0) -> list[str]:
    spool = Spool(configured.spool)
    jobs: list[str] = []
    for colour in range(first, first + count):
        graph: dict[str, Any] = json.loads(json.dumps(GRAPH))
        graph["1"]["inputs"]["color"] = colour
        data = json.dumps(graph).encode()
        jobs.append(await trio.to_thread.run_sync(drop, spool, f"job{colour}.json", data))
    return jobs


async def delivered(configured: Config, jobs: list[str]) -> Counter[str]:
    """How each job's end was learnt, once all are in ``done/``."""
    done = configured.spool / "done"
    await until(lambda: all((done / job / "result.json").exists() for job in jobs), 50)
    found = [json.loads((done / job / "result.json").read_bytes()) for job in jobs]
    assert {result["attempts"] for result in found} == {1}
    return Counter(result["completion"] for result in found)


def quick(tmp_path: Path, url: str, **more: str) -> Config:
    audit = "{interval: 300ms, stale_after: 500ms, orphan_interval: 200ms, lost_grace: 500ms}"
    return settings(tmp_path, url, **{"audit": audit, **more})


async def test_every_end_signal_dropped(tmp_path, nursery):
    faults = Faults.parse(["drop-executing", "drop-execution_success", "drop-status"])
    simulator = Simulator(run_s=0.0, faults=faults)
    configured = quick(tmp_path, await nursery.start(simulator.serve, 0))
    with trio.fail_after(60):
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            sources = await delivered(configured, await dropped(configured, JOBS))
            missed = await metric(daemon, "comfyd_missed_signals_total")
            daemon.stop()
    assert sources["signal"] == 0
    assert missed.total() == JOBS
    assert set(simulator.executions.values()) == {1}


async def test_a_websocket_that_is_refused_for_the_whole_run(tmp_path, nursery):
    simulator = Simulator(run_s=0.0, faults=Faults.parse(["ws-refuse"]))
    configured = quick(tmp_path, await nursery.start(simulator.serve, 0))
    with trio.fail_after(60):
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            sources = await delivered(configured, await dropped(configured, JOBS))
            missed = await metric(daemon, "comfyd_missed_signals_total")
            connects = await metric(daemon, "comfyd_websocket_connects_total")
            daemon.stop()
    assert sources == {"reconnect": JOBS}
    assert missed.total() == JOBS
    assert connects['{result="rejected",server="s"}'] > 0


async def test_a_deaf_socket_is_found_within_deaf_after_of_the_next_submission(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    tracker = "{deaf_after: 1s, ping_interval: 1s, reconnect_first: 100ms}"
    url = await nursery.start(simulator.serve, 0)
    configured = quick(tmp_path, url, tracker=tracker)
    with trio.fail_after(60):
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            assert await delivered(configured, await dropped(configured, 3)) == {"signal": 3}
            simulator.faults.set("deaf")
            simulator.drop_connections()  # the next one opens, greets, and then hears nothing
            await counted(daemon, "comfyd_websocket_connects_total", '{result="ok",server="s"}', 2)
            jobs = await dropped(configured, JOBS, first=3)
            submitted_s = trio.current_time()
            deaf = '{cause="deaf",server="s"}'
            await counted(daemon, "comfyd_websocket_disconnects_total", deaf, 1)
            found_s = trio.current_time() - submitted_s
            sources = await delivered(configured, jobs)
            daemon.stop()
    assert found_s <= 1 + 5  # deaf_after, and what the issue of a deaf socket may cost
    assert sources["signal"] == 0


async def test_a_stalled_publisher_is_worked_by_polling(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    tracker = "{deaf_after: 500ms, ping_interval: 500ms, reconnect_first: 100ms}"
    configured = quick(tmp_path, await nursery.start(simulator.serve, 0), tracker=tracker)
    with trio.fail_after(60):
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            await delivered(configured, await dropped(configured, 2))
            simulator.faults.set("stalled-publisher")
            sources = await delivered(configured, await dropped(configured, JOBS, first=2))
            daemon.stop()
    assert sources["signal"] == 0


@pytest.mark.parametrize("fault", ["history-delay=300ms", "history-fail=5", "slow=50ms"])
async def test_a_slow_or_failing_history_costs_time_and_no_job(tmp_path, nursery, fault):
    simulator = Simulator(run_s=0.0, faults=Faults.parse([fault]))
    url = await nursery.start(simulator.serve, 0)
    configured = quick(tmp_path, url, history="{backoff: 100ms}", completion="{backoff: 100ms}")
    with trio.fail_after(60):
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            await delivered(configured, await dropped(configured, 8))
            daemon.stop()
    assert set(simulator.executions.values()) == {1}
