"""The daemon ends, in good order or killed, and carries on where it was."""

from __future__ import annotations

import os
import sys

import trio

from comfyd.cli.exits import Exit
from tests.endtoend import graphs
from tests.endtoend.daemon import ROOT, Daemon
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.waiting import until

PATIENCE_S = 60
ORDERLY_S = 5
JOBS = 4


async def test_sigterm_with_jobs_in_flight(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            for number in range(JOBS):
                daemon.drop(f"job-{number}.json", graphs.slow(number, 0.5))
            await until(lambda: simulator.running and simulator.pending)
            began_s = trio.current_time()
            assert await daemon.stop() == 0
            assert trio.current_time() - began_s < ORDERLY_S
        assert daemon.finished() < JOBS
        await until(lambda: not simulator.running and not simulator.pending)  # nobody listens
        async with daemon.running():
            await daemon.finish(JOBS, within_s=30)
            metrics = await daemon.metrics()
    results = daemon.results().values()
    assert {result["state"] for result in results} == {"done"}
    assert {result["attempts"] for result in results} == {1}
    assert "recovery" in {result["completion"] for result in results}
    assert metrics['comfyd_attempts_charged_total{server="local"}'] == 0
    assert set(simulator.executions.values()) == {1}
    assert len(simulator.executions) == JOBS


async def test_a_second_daemon_keeps_away(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            second = await trio.run_process(
                [sys.executable, "-m", "comfyd", "run", "-c", str(daemon.config)],
                cwd=ROOT,
                check=False,
                capture_stderr=True,
            )
            assert second.returncode == Exit.BUSY
            assert b"Traceback" not in second.stderr
            daemon.drop("after.json", graphs.picture(1))
            await daemon.finish(1, within_s=20)


async def test_killed_twice_during_30_jobs(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        try:
            for number in range(30):
                daemon.drop(f"job-{number}.json", graphs.slow(number, 0.05))
            for finished in (5, 15):
                await daemon.start()
                await daemon.ready()
                await daemon.finish(finished, within_s=20)
                await daemon.kill()
            assert daemon.finished() < 30
            await daemon.start()
            await daemon.ready()
            await daemon.finish(30, within_s=40)
            await until(lambda: not os.listdir(daemon.spool.claimed))  # cleared away afterwards
            assert await daemon.stop() == 0
        finally:
            await daemon.bury()
    jobs = os.listdir(daemon.spool.done)
    assert sorted(job.split(".")[0] for job in jobs) == sorted(f"job-{n}" for n in range(30))
    assert os.listdir(daemon.spool.failed) == []
    assert os.listdir(daemon.spool.claimed) == os.listdir(daemon.spool.new) == []
    assert set(simulator.executions.values()) == {1}, "a prompt was executed twice"
    assert set(runs_by_job(simulator, jobs).values()) == {1}, "a job was executed twice"
