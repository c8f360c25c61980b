"""Measures: from a prompt's end on the server to its result in ``done/``, and how fast jobs pass.

Run by ``make prove``. Both ends are seen from outside: the server's own time of
``execution_success``, and the time of the rename, by the kernel. The clock is one and the same.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import pytest
import trio

from comfyd.simulator import Simulator
from tests.endtoend.daemon import Daemon, fetch
from tests.endtoend.graphs import picture

JOBS = 300
P99_MAX_S = 1.0  # generous: the machine may be busy with other things


def fsync_s(folder: Path) -> float:
    """The median of what one small fsync takes where the spool lies."""
    took = []
    with open(folder / "fsync", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            before_s = trio.current_time()
            os.fsync(file.fileno())
            took.append(trio.current_time() - before_s)
    return statistics.median(took)


@pytest.mark.parametrize("rate", [2, 10])
async def test_latency_at_a_steady_rate(tmp_path, rate):
    count = min(JOBS, 30 * rate)
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            simulator = Simulator(run_s=0.01)
            url = await nursery.start(simulator.serve)
            daemon = Daemon(tmp_path, url)
            async with daemon.running():
                for number in range(count):
                    daemon.drop(f"job-{number}.json", picture(number))
                    await trio.sleep(1 / rate)
                await daemon.finish(count, within_s=30)
            latencies_s = sorted([await latency_s(daemon, url, job) for job in daemon.results()])
            nursery.cancel_scope.cancel()
    assert len(latencies_s) == count
    p50_s, p99_s = latencies_s[count // 2], latencies_s[count * 99 // 100]
    print(
        f"\n{rate} jobs/s: end on the server to result in done/: p50 {p50_s * 1000:.0f} ms,"
        f" p99 {p99_s * 1000:.0f} ms, worst {latencies_s[-1] * 1000:.0f} ms, of {count};"
        f" fsync {fsync_s(tmp_path) * 1000:.1f} ms"
    )
    assert p99_s < P99_MAX_S


async def latency_s(daemon: Daemon, url: str, job: str) -> float:
    folder = daemon.spool.done / job
    prompt_id = json.loads((folder / "result.json").read_bytes())["prompt_id"]
    record = json.loads(await trio.to_thread.run_sync(fetch, f"{url}/history/{prompt_id}"))
    event, data = record[prompt_id]["status"]["messages"][-1]
    assert event == "execution_success"
    return folder.stat().st_ctime_ns / 1e9 - float(data["timestamp"]) / 1000
