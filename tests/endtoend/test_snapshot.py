"""A snapshot taken in the midst of it, and put back after more has happened: nothing is lost."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import trio

from comfyd.core.model import prompt_id_of
from comfyd.spool.layout import job_of
from tests.endtoend import graphs
from tests.endtoend.daemon import ROOT, Daemon
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.waiting import until

SETTINGS = {"audit": {"lost_grace": "300ms"}}


async def comfyd(daemon: Daemon, *words: str) -> tuple[int, str]:
    done = await trio.run_process(
        [sys.executable, "-m", "comfyd", "-c", str(daemon.config), *words],
        cwd=ROOT, check=False, capture_stdout=True, capture_stderr=True,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stderr.decode()


class Consumer:
    """Takes half of the results, once their claimed files are gone; notices one that comes again.

    What becomes of one that is taken before that is the limit of a lost journal.
    """

    def __init__(self, daemon: Daemon, taken: Path) -> None:
        self.spool, self.taken = daemon.spool, taken
        taken.mkdir()
        self.seen: dict[str, int] = {}

    def look(self) -> int:
        """How many have been seen."""
        for name in os.listdir(self.spool.done):
            if name.startswith("."):
                continue
            inode = (self.spool.done / name).stat().st_ino
            assert self.seen.setdefault(name, inode) == inode, f"{name} was delivered twice"
            claimed = {job_of(each) for each in os.listdir(self.spool.claimed)}
            if hash(name) % 2 and name not in claimed:
                (self.spool.done / name).rename(self.taken / name)
        return len(self.seen)


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_a_snapshot_put_back_goes_on_with_what_was_in_flight(simulator, tmp_path, killed):
    daemon = Daemon(tmp_path, simulator.url, SETTINGS)
    consumer = Consumer(daemon, tmp_path / "taken")
    copy = tmp_path / "snapshot.db"
    with trio.fail_after(90):
        try:
            await daemon.start()
            await daemon.ready()
            for number in range(12):
                daemon.drop(f"job-{number}.json", graphs.slow(number, 0.25))
            await until(lambda: consumer.look() >= 3)
            [held] = [job_of(each) for each in os.listdir(daemon.spool.claimed) if "-11." in each]
            assert await comfyd(daemon, "hold", "--match", "job-11*") == (0, "")
            code, said = await comfyd(daemon, "snapshot", str(copy))
            assert code == 0, said
            # It goes on: jobs of the snapshot end, are held no more, and new ones come.
            assert (await comfyd(daemon, "release", "--match", "job-11*"))[0] == 0
            for number in range(12, 18):
                daemon.drop(f"job-{number}.json", graphs.slow(number, 0.25))
            before = consumer.look()
            await until(lambda: consumer.look() >= before + 4)
            # What the snapshot holds is on the server: else it would stay held, and rightly so.
            sent = prompt_id_of(held, 1)
            await until(lambda: sent in simulator.pending or simulator.executions[sent])
            await until(lambda: simulator.running)
            if killed:
                await daemon.kill()
            else:
                assert await daemon.stop() == 0
            shutil.rmtree(daemon.state)
            daemon.state.mkdir(0o700)
            copy.rename(daemon.state / "comfyd.db")
            assert len(consumer.seen) < 18
            await daemon.start()
            await daemon.ready()
            await until(lambda: consumer.look() == 18 and not os.listdir(daemon.spool.claimed))
            await trio.sleep(1.0)  # for one too many
            consumer.look()
            assert "journal_rebuilt" in {event["event"] for event in daemon.events()}
            assert await daemon.stop() == 0
        finally:
            await daemon.bury()
    assert sorted(name.split(".")[0] for name in consumer.seen) == sorted(
        f"job-{number}" for number in range(18)
    )
    assert os.listdir(daemon.spool.failed) == os.listdir(daemon.spool.stage) == []
    assert max(simulator.executions.values()) == 1, "an identity was used twice"
    assert set(runs_by_job(simulator, consumer.seen).values()) == {1}, "a job was executed twice"
