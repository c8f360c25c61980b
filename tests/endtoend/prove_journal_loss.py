"""Proof: 100 losses of the journal, at any moment, lose no job and deliver none twice.

Run by ``make prove``. Each run draws a seed and prints it; PROVE_SEED repeats one. Results are
taken away as soon as their claimed file is gone: what happens to one that is taken before is the
limit in ``docs/decisions/009-rebuilding-a-lost-journal.md``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import trio

from comfyd.simulator import Simulator
from comfyd.spool.layout import job_of
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import picture
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.seeds import drawn_seed

JOBS = 200
LOSSES = 100
NODE_S = 0.47  # two a job: there is work left at the last loss
GRACE = {"audit": {"lost_grace": "300ms"}, "health": {"interval": "500ms"}}


def remove(daemon: Daemon, chance: random.Random) -> None:
    """The file, its WAL, or both."""
    for name in chance.choice((["comfyd.db"], ["comfyd.db", "comfyd.db-wal"])):
        (daemon.state / name).unlink(missing_ok=True)


def overwrite(daemon: Daemon, chance: random.Random) -> None:
    """Some bytes anywhere, a page of zeros, or everything after a point."""
    files = [daemon.state / name for name in ("comfyd.db", "comfyd.db-wal")]
    written = [file for file in files if file.exists() and file.stat().st_size]
    if not written:  # it was killed before it wrote any
        return
    path = chance.choice(written)
    size = path.stat().st_size
    at = chance.randrange(size)
    how = chance.choice(("bytes", "zeros", "truncate"))
    if how == "truncate" and path == files[0]:
        os.truncate(path, at)
        return
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(4096) if how == "zeros" else chance.randbytes(200))


class Consumer:
    """Takes results whose claimed file is gone, and notices one that comes again or changes."""

    def __init__(self, daemon: Daemon, taken: Path) -> None:
        self._daemon = daemon
        self._taken = taken
        taken.mkdir()
        self._seen: dict[str, int] = {}
        self.twice: set[str] = set()

    def look(self) -> None:
        spool = self._daemon.spool
        claimed = {job_of(name) for name in os.listdir(spool.claimed)}
        for name in os.listdir(spool.done):
            if name.startswith("."):
                continue
            inode = (spool.done / name).stat().st_ino
            if self._seen.setdefault(name, inode) != inode or (self._taken / name).exists():
                self.twice.add(name)
            elif name not in claimed and name not in {
                job_of(each) for each in os.listdir(spool.claimed)
            }:
                (spool.done / name).rename(self._taken / name)

    def results(self) -> set[str]:
        return {*os.listdir(self._taken), *os.listdir(self._daemon.spool.done)}


def count_events(daemon: Daemon, said: Counter[str]) -> None:
    said.update(event["event"] for event in daemon.events())


async def test_the_journal_lost_at_100_moments_of_200_jobs(tmp_path):
    seed = drawn_seed()
    chance = random.Random(seed)
    simulator = Simulator(run_s=NODE_S)
    simulator.faults.post_delay_s = 0.05  # a submission is often on its way
    undropped = list(range(JOBS))
    kinds: Counter[str] = Counter()
    said: Counter[str] = Counter()
    began_s = trio.current_time()
    with trio.fail_after(420):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(simulator.serve)
            daemon = Daemon(tmp_path, url, GRACE)
            consumer = Consumer(daemon, tmp_path / "taken")

            async def work(seconds: float) -> None:
                until_s = trio.current_time() + seconds
                while trio.current_time() < until_s:
                    if undropped and chance.random() < 0.3:
                        number = undropped.pop()
                        daemon.drop(f"job-{number}.json", picture(number))
                    consumer.look()
                    await trio.sleep(0.05)

            try:
                for _ in range(LOSSES):
                    await daemon.start()
                    if chance.random() < 0.9:  # else it may be killed while it rebuilds
                        await daemon.ready()
                    await work(chance.uniform(0, 1.2))
                    kind = chance.choice(("killed, removed", "killed, damaged", "removed, killed"))
                    kinds[kind] += 1
                    if kind == "removed, killed":
                        remove(daemon, chance)
                        await work(chance.uniform(0, 0.5))
                    await daemon.bury()
                    if kind == "killed, removed":
                        remove(daemon, chance)
                    elif kind == "killed, damaged":
                        overwrite(daemon, chance)
                    count_events(daemon, said)
                at_last_loss = len(consumer.results())
                for number in undropped:
                    daemon.drop(f"job-{number}.json", picture(number))
                await daemon.start()
                await daemon.ready()
                with trio.move_on_after(120):
                    while len(consumer.results()) < JOBS or os.listdir(daemon.spool.claimed):
                        daemon.check_alive()
                        consumer.look()
                        await trio.sleep(0.1)
                await work(2)  # for one too many
                assert await daemon.stop() == 0
                count_events(daemon, said)
                consumer.look()
            finally:
                await daemon.bury()
            nursery.cancel_scope.cancel()

    jobs = consumer.results()
    runs = runs_by_job(simulator, jobs)
    again = {job: count for job, count in runs.items() if count != 1}
    print(
        f"{LOSSES} losses ({dict(kinds)}), {said['journal_rebuilt']} rebuilt,"
        f" {said['journal_quarantined']} set aside;"
        f" {at_last_loss} results by the last one; {len(again)} jobs executed more than once,"
        f" {runs.total() - len(jobs)} executions for nothing; {trio.current_time() - began_s:.0f} s"
    )
    assert os.listdir(daemon.spool.failed) == []
    assert consumer.twice == set()
    assert sorted(job.split(".")[0] for job in jobs) == sorted(f"job-{n}" for n in range(JOBS))
    spool = daemon.spool
    assert [*os.listdir(spool.claimed), *os.listdir(spool.new), *os.listdir(spool.stage)] == []
    assert max(simulator.executions.values()) == 1, "an identity was used twice"
