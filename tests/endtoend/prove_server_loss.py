"""Proof: a server that dies, or forgets everything, costs time and no job.

Run by ``make prove``. Each run draws a seed and prints it; PROVE_SEED repeats one.
"""

from __future__ import annotations

import random
from collections import Counter

import trio

from comfyd.simulator import Simulator
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import picture
from tests.endtoend.seeds import drawn_seed
from tests.endtoend.server import Server

JOBS = 200
LOSSES = 5
NODE_S = 0.03  # two nodes a job


def tell(daemon: Daemon, metrics: dict[str, float], began_s: float) -> None:
    results = daemon.results()
    sources = Counter(result["completion"] for result in results.values())
    attempts = sum(result["attempts"] for result in results.values())
    charged = metrics['comfyd_attempts_charged_total{server="local"}']
    lost = {name[28:]: int(n) for name, n in metrics.items() if "attempts_lost_total" in name and n}
    print(
        f"{LOSSES} losses, {attempts} attempts for {len(results)} results, {charged:.0f} charged,"
        f" lost: {lost}, learnt by {dict(sources)}, {trio.current_time() - began_s:.0f} s"
    )


def check(daemon: Daemon) -> None:
    assert list(daemon.spool.failed.iterdir()) == []
    jobs = [path.name.split(".")[0] for path in daemon.spool.done.iterdir()]
    assert sorted(jobs) == sorted(f"job-{number}" for number in range(JOBS))
    assert list(daemon.spool.claimed.iterdir()) == list(daemon.spool.stage.iterdir()) == []


async def test_the_server_killed_5_times_during_200_jobs(tmp_path):
    chance = random.Random(drawn_seed())
    began_s = trio.current_time()
    with trio.fail_after(180):
        async with Server.running(node_s=NODE_S) as server:
            daemon = Daemon(tmp_path, server.url)
            async with daemon.running():
                for number in range(JOBS):
                    daemon.drop(f"job-{number}.json", picture(number))
                for _ in range(LOSSES):
                    await trio.sleep(chance.uniform(0.2, 2.5))
                    await server.kill()
                    await trio.sleep(chance.uniform(0, 3))
                    await server.start()
                at_last_loss = daemon.finished()
                await daemon.finish(JOBS, within_s=120)
                await trio.sleep(1)
                print(f"{at_last_loss} results by the last loss")
                tell(daemon, await daemon.metrics(), began_s)
    check(daemon)


async def test_the_servers_memory_lost_5_times_during_200_jobs(tmp_path):
    chance = random.Random(drawn_seed())
    began_s = trio.current_time()
    with trio.fail_after(180):
        async with trio.open_nursery() as nursery:
            simulator = Simulator(run_s=NODE_S)
            daemon = Daemon(tmp_path, await nursery.start(simulator.serve))
            async with daemon.running():
                for number in range(JOBS):
                    daemon.drop(f"job-{number}.json", picture(number))
                for _ in range(LOSSES):
                    await trio.sleep(chance.uniform(0.2, 2.5))
                    simulator.restart()
                at_last_loss = daemon.finished()
                await daemon.finish(JOBS, within_s=120)
                await trio.sleep(1)
                print(f"{at_last_loss} results by the last loss")
                tell(daemon, await daemon.metrics(), began_s)
            nursery.cancel_scope.cancel()
    check(daemon)
    assert set(simulator.executions.values()) == {1}, "a prompt was executed twice"
