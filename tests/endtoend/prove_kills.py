"""Proof: whatever is killed, at any moment, no job is lost and none delivered twice.

Run by ``make prove``. Each run draws a seed and prints it; PROVE_SEED repeats one.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from comfyd.core.model import State
from comfyd.journal.sqlite import open_readonly
from comfyd.simulator import Simulator
from tests.endtoend.daemon import ROOT, Daemon, end
from tests.endtoend.graphs import picture
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.seeds import drawn_seed

JOBS = 200
KILLS = 20


@asynccontextmanager
async def consumer(daemon: Daemon, taken: Path, seed: int) -> AsyncIterator[None]:
    module = "tests.endtoend.consumer"
    command = [sys.executable, "-m", module, str(daemon.spool.root), str(taken), str(seed)]
    process = await trio.lowlevel.open_process(command, cwd=ROOT)
    try:
        yield
        assert process.poll() is None
    finally:
        await end(process)


def names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


async def all_taken(daemon: Daemon, taken: Path, count: int, *, within_s: float) -> None:
    with trio.move_on_after(within_s):
        while len(names(taken / "done")) + len(names(taken / "failed")) < count:
            daemon.check_alive()
            await trio.sleep(0.1)
        return
    raise AssertionError(
        f"{len(names(taken / 'done'))} of {count} came in {within_s} s:\n{daemon.log()[-8000:]}"
    )


def submitting(daemon: Daemon) -> set[str]:
    """The jobs whose POST may have been on its way when the daemon was killed."""
    path = daemon.state / "comfyd.db"
    if not path.exists():
        return set()
    journal = open_readonly(path)
    try:
        return {row.job for row in journal.active() if row.state is State.SUBMITTING}
    finally:
        journal.close()


async def test_the_daemon_killed_at_20_moments_of_200_jobs(tmp_path):
    seed = drawn_seed()
    chance = random.Random(seed)
    simulator = Simulator(run_s=0.08)  # two nodes a job: the last kill finds work left
    simulator.faults.post_delay_s = 0.05  # a submission is often on its way
    taken = tmp_path / "taken"
    doubtful: set[str] = set()
    undropped = list(range(JOBS))
    began_s = trio.current_time()
    with trio.fail_after(240):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(simulator.serve)
            daemon = Daemon(tmp_path, url)
            try:
                async with consumer(daemon, taken, seed):
                    for _ in range(KILLS):
                        await daemon.start()
                        if chance.random() < 0.75:  # else it may be killed while it starts
                            await daemon.ready()
                        until_s = trio.current_time() + chance.uniform(0, 3)
                        while trio.current_time() < until_s:
                            if undropped and chance.random() < 0.8:
                                number = undropped.pop()
                                daemon.drop(f"job-{number}.json", picture(number))
                            await trio.sleep(chance.uniform(0, 0.1))
                        await daemon.kill()
                        doubtful |= await trio.to_thread.run_sync(submitting, daemon)
                    at_last_kill = len(names(taken / "done"))
                    for number in undropped:
                        daemon.drop(f"job-{number}.json", picture(number))
                    await daemon.start()
                    await all_taken(daemon, taken, JOBS, within_s=120)
                    await trio.sleep(2)  # for one too many
                    assert await daemon.stop() == 0
            finally:
                await daemon.bury()
            nursery.cancel_scope.cancel()

    jobs = names(taken / "done")
    assert names(taken / "failed") == []
    assert names(taken / "twice") == []
    assert sorted(job.split(".")[0] for job in jobs) == sorted(f"job-{n}" for n in range(JOBS))
    assert names(daemon.spool.claimed) == names(daemon.spool.new) == names(daemon.spool.stage) == []

    assert set(simulator.executions.values()) == {1}, "a prompt was executed twice"
    runs = runs_by_job(simulator, jobs)
    again = {job for job, count in runs.items() if count != 1}
    print(
        f"{KILLS} kills, {at_last_kill} results by the last one, {len(doubtful)} POSTs in flight"
        f" at a kill, {len(again)} jobs executed twice, {trio.current_time() - began_s:.0f} s"
    )
    assert again <= doubtful, "executed again without a POST in doubt"
