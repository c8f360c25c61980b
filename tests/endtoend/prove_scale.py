"""Proof: ten thousand files dropped at once are all taken, and neither memory nor metrics grow.

Run by ``make prove``. The names are those that nobody would choose.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import trio

from comfyd.simulator import Simulator
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import picture

FIRST = 10
EARLY = 1_000
JOBS = 10_000
MORE_RSS = 1.10
NAMES = (
    "plain-{}.json",
    "-rf {}.json",
    "{} ünïcödé 狐.json",
    'quote" {{job="x"}} {}.json',
    "line\nbreak\r{}.json",
    "$(touch {})`;.json",
    "a..{}.json",
    "comfyd_jobs_{}.yaml",
    "{}." + "x" * 200 + ".json",
    "\x1b[31m{}\\\t%s%n.JSON",
)
# One tick of the kernel's clock for CPU times, in seconds.
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def name(number: int) -> str:
    return NAMES[number % len(NAMES)].format(number)


def rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


async def test_10000_jobs_dropped_at_once(tmp_path):
    with trio.fail_after(900):
        async with trio.open_nursery() as nursery:
            simulator = Simulator(run_s=0, directory=tmp_path / "server")
            daemon = Daemon(tmp_path, await nursery.start(simulator.serve))
            async with daemon.running():
                for number in range(FIRST):
                    daemon.drop(name(number), picture(number))
                await daemon.finish(FIRST, within_s=20)
                await trio.sleep(2)
                series = set(await daemon.metrics())

                began_s, began_cpu_s = trio.current_time(), cpu_s(daemon.pid)
                simulator_cpu_s = time.process_time()
                await trio.to_thread.run_sync(drop_all, daemon)
                dropped_s = trio.current_time() - began_s
                await reached(daemon, EARLY)
                early_kib = rss_kib(daemon.pid)
                await reached(daemon, JOBS)
                took_s = trio.current_time() - began_s
                late_kib = rss_kib(daemon.pid)
                daemon_cpu_s = cpu_s(daemon.pid) - began_cpu_s
                simulator_cpu_s = time.process_time() - simulator_cpu_s
                await trio.sleep(2)
                metrics = await daemon.metrics()
            nursery.cancel_scope.cancel()
    print(
        f"\n{JOBS - FIRST} files dropped in {dropped_s:.1f} s, done in {took_s:.0f} s:"
        f" {(JOBS - FIRST) / took_s:.0f} jobs/s; CPU: daemon {daemon_cpu_s:.0f} s,"
        f" test and simulator {simulator_cpu_s:.0f} s\n"
        f"RSS {early_kib / 1024:.1f} MiB after {EARLY}, {late_kib / 1024:.1f} MiB after {JOBS};"
        f" {len(series)} series after {FIRST} jobs, {len(metrics)} after {JOBS}"
    )
    assert list(daemon.spool.failed.iterdir()) == []
    assert len(list(daemon.spool.done.iterdir())) == JOBS
    assert list(daemon.spool.new.iterdir()) == list(daemon.spool.claimed.iterdir()) == []
    assert set(simulator.executions.values()) == {1}
    assert len(simulator.executions) == JOBS
    assert metrics['comfyd_jobs_finished_total{outcome="done",server="local"}'] == JOBS
    assert set(metrics) == series
    assert late_kib <= early_kib * MORE_RSS


def drop_all(daemon: Daemon) -> None:
    for number in range(FIRST, JOBS):
        daemon.drop(name(number), picture(number))


async def reached(daemon: Daemon, count: int) -> None:
    """Until *count* jobs are finished; counted seldom, for counting takes time too."""
    while await trio.to_thread.run_sync(daemon.finished) < count:
        daemon.check_alive()
        await trio.sleep(1)
