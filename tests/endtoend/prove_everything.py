"""Proof: all at once. A lossy, deaf, forgetful server, a daemon that is killed: still each once.

Run by ``make prove``. Each run draws a seed and prints it; PROVE_SEED repeats one.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import trio

from comfyd.simulator import Faults, Simulator
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import picture
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.seeds import drawn_seed
from tests.endtoend.waiting import until

JOBS = 100
BLOWS = 15
FAULTS = (
    "drop-end=0.3",
    "drop-execution_success=0.3",
    "drop-status=0.1",
    "deaf=0.3",
    "ws-refuse=0.2",
    "history-fail=0.1",
    "queue-fail=0.1",
    "post-refuse=0.1",
    "post-ambiguous=0.1",
    "post-hang=0.03",
    "view-truncate=0.1",
    "post-delay=20ms",
)
# Whoever ran at a loss of memory is charged for it; here that can hit one job often.
SETTINGS: dict[str, dict[str, Any]] = {
    "jobs": {"max_attempts": 20},
    "tracker": {"reconnect_first": "200ms", "reconnect_max": "2s", "deaf_after": "1s"},
    "client": {"submit_timeout": "2s"},
    "history": {"timeout": "5s"},
}


async def test_every_fault_and_every_kill_at_once(tmp_path):
    seed = drawn_seed()
    chance = random.Random(seed)
    simulator = Simulator(run_s=0.03, faults=Faults.parse(FAULTS, seed=seed))
    blows: Counter[str] = Counter()
    began_s = trio.current_time()
    with trio.fail_after(300):
        async with trio.open_nursery() as nursery:
            daemon = Daemon(tmp_path, await nursery.start(simulator.serve), SETTINGS)
            async with daemon.running():
                for number in range(JOBS):
                    daemon.drop(f"job-{number}.json", picture(number))
                for _ in range(BLOWS):
                    await trio.sleep(chance.uniform(0.3, 3))
                    blow = chance.choice(["daemon", "memory", "server", "connections", "history"])
                    blows[blow] += 1
                    match blow:
                        case "daemon":
                            await daemon.kill()
                            await daemon.start()
                            await daemon.ready()
                        case "memory":
                            simulator.restart()
                        case "server":
                            simulator.kill()
                            await trio.sleep(chance.uniform(0, 3))
                            simulator.revive()
                        case "connections":
                            simulator.drop_connections()
                        case _:
                            simulator.clear_history()
                at_last_blow = daemon.finished()
                await daemon.finish(JOBS, within_s=200)
                with trio.fail_after(10):  # the claimed file goes after the result came
                    await until(lambda: not os.listdir(daemon.spool.claimed))
            nursery.cancel_scope.cancel()
    results = daemon.results()
    sources = Counter(result["completion"] for result in results.values())
    runs = runs_by_job(simulator, results)
    print(
        f"{dict(blows)}, {at_last_blow} results by the last; learnt by {dict(sources)};"
        f" {sum(result['attempts'] for result in results.values())} attempts,"
        f" {runs.total()} executions for {len(results)} results,"
        f" {trio.current_time() - began_s:.0f} s"
    )
    assert os.listdir(daemon.spool.failed) == []
    assert sorted(job.split(".")[0] for job in results) == sorted(f"job-{n}" for n in range(JOBS))
    assert len(results) == JOBS
    assert os.listdir(daemon.spool.stage) == []
    assert set(simulator.executions.values()) == {1}, "a prompt was executed twice"
