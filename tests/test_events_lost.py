"""A server that publishes nothing, or whose history is slow or fails: all is delivered, once."""

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
