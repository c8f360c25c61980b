"""A running daemon takes up another configuration: by SIGHUP, and as it is asked by the command."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter

import trio

from comfyd.cli.exits import Exit
from comfyd.simulator import Simulator
from tests.endtoend import graphs
from tests.endtoend.daemon import QUICK, ROOT, Daemon
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.seeds import drawn_seed
from tests.endtoend.waiting import until

JOBS = 60
PATIENCE_S = 60
OK = "comfyd_config_last_reload_successful"


async def reload(daemon: Daemon, **environ: str) -> tuple[int, str]:
    """``comfyd reload``: its exit code, and what it says."""
    done = await trio.run_process(
        [sys.executable, "-m", "comfyd", "reload", "-c", str(daemon.config)],
        cwd=ROOT,
        env={**os.environ, **environ},
        check=False,
        capture_stdout=True,
        capture_stderr=True,
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def refusals(daemon: Daemon) -> list[str]:
    return [e["problem"] for e in daemon.events() if e["event"] == "reload_refused"]


async def test_a_server_comes_and_one_goes_in_the_middle_of_60_jobs(tmp_path):
    simulators = {name: Simulator(run_s=0.05) for name in "abc"}
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            urls = {name: await nursery.start(each.serve) for name, each in simulators.items()}
            daemon = Daemon(tmp_path, {name: urls[name] for name in "ab"})
            async with daemon.running():
                for number in range(JOBS):
                    daemon.drop(f"job-{number}.json", graphs.picture(number))
                await daemon.finish(10, within_s=20)
                assert simulators["a"].running
                daemon.rewrite(servers=[{"name": name, "url": urls[name]} for name in "bc"])
                code, said = await reload(daemon)
                assert (code, said) == (Exit.OK, "Reloaded; servers: b, c.\n")
                assert daemon.finished() < JOBS
                await daemon.finish(JOBS, within_s=30)
                metrics = await daemon.metrics()
            nursery.cancel_scope.cancel()
    results = daemon.results()
    assert Counter(result["state"] for result in results.values()) == {"done": JOBS}
    assert len({job.split(".")[0] for job in results}) == JOBS
    runs: Counter[str] = Counter()
    for simulator in simulators.values():
        runs += runs_by_job(simulator, results)
    assert set(runs.values()) == {1}, "a job was executed twice"
    assert all(simulator.executions for simulator in simulators.values())
    assert metrics[OK] == 1
    # The one that stayed kept its socket; of the one that went nothing is left.
    assert metrics['comfyd_websocket_connects_total{result="ok",server="b"}'] == 1
    assert not [sample for sample in metrics if 'server="a"' in sample]


async def test_a_bad_file_changes_nothing_and_a_good_one_does(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    good = daemon.config.read_text()
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.rewrite(audit={"interval": "soon"}, health={"intervall": "1s"})
            lines = daemon.config.read_text().splitlines()
            code, said = await reload(daemon)
            assert code == Exit.CONFIG
            for key, word in (("audit.interval", '"soon"'), ("health.intervall", '"intervall"')):
                [(line, text)] = [(n, t) for n, t in enumerate(lines, 1) if word in t]
                place = f"{daemon.config}:{line}:{text.index(word) + 1}: {key}: "
                assert place in said
                assert any(problem.startswith(place) for problem in refusals(daemon))
            assert "Nothing was changed." in said
            assert (await daemon.metrics())[OK] == 0

            daemon.config.write_text(good[: len(good) // 2])  # half a file
            code, said = await reload(daemon)
            assert code == Exit.CONFIG
            assert f"{daemon.config}:" in said
            assert "is not valid YAML" in said

            daemon.config.write_text(good)
            daemon.rewrite(metrics={"listen": "127.0.0.1:1"}, jobs={"max_attempts": 1})
            code, said = await reload(daemon)
            assert (code, "metrics.listen: a change of it needs a restart" in said) == (78, True)

            # Another state folder, as systemd reloads: nobody listens there.
            daemon.config.write_text(good)
            assert (await reload(daemon))[0] == 0
            assert (await daemon.metrics())[OK] == 1
            daemon.rewrite(state=str(tmp_path / "elsewhere"))
            code, said = await reload(daemon, MAINPID=str(daemon.pid))
            assert (code, "that needs a restart" in said) == (78, True)
            await until(lambda: "state: a change of it needs a restart" in refusals(daemon)[-1])
            assert (await daemon.metrics())[OK] == 0

            daemon.drop("before.json", graphs.picture(1))
            await daemon.finish(1, within_s=20)

            daemon.config.write_text(good)
            daemon.rewrite(jobs={"max_file_bytes": 10})
            os.kill(daemon.pid, signal.SIGHUP)
            await until(lambda: "reloaded" in {event["event"] for event in daemon.events()})
            assert (await daemon.metrics())[OK] == 1
            daemon.drop("after.json", graphs.picture(2))
            await daemon.finish(2, within_s=20)
    reasons = {result["reason"] for result in daemon.results().values() if "reason" in result}
    assert reasons == {"invalid_job"}  # too large by now


async def test_a_storm_of_reloads_costs_no_run(tmp_path):
    """Servers come, go, change their URLs, headers and windows, by chance and all the time."""
    chance = random.Random(drawn_seed())
    simulators = {name: Simulator(run_s=0.02) for name in "abc"}
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            urls = {name: await nursery.start(each.serve) for name, each in simulators.items()}
            daemon = Daemon(tmp_path, urls)
            async with daemon.running():
                for number in range(2 * JOBS):
                    daemon.drop(f"job-{number}.json", graphs.picture(number))
                for _ in range(20):
                    names = chance.sample(sorted(urls), chance.randint(1, 3))
                    there = dict(zip(names, chance.sample(sorted(urls.values()), 3), strict=False))
                    if chance.random() < 0.6:
                        there = {name: urls[name] for name in names}
                    servers = [
                        {
                            "name": name,
                            "url": there[name],
                            "headers": {"X-Try": f"{chance.randint(1, 2)}"},
                            "window": chance.randint(1, 4),
                        }
                        for name in names
                    ]
                    stale = {**QUICK["audit"], "stale_after": f"{chance.randint(2, 9)}s"}
                    daemon.rewrite(servers=servers, audit=stale)
                    os.kill(daemon.pid, signal.SIGHUP)
                    await trio.sleep(chance.uniform(0, 0.4))
                await daemon.finish(2 * JOBS, within_s=40)
            nursery.cancel_scope.cancel()
    results = daemon.results()
    assert Counter(result["state"] for result in results.values()) == {"done": 2 * JOBS}
    runs: Counter[str] = Counter()
    for simulator in simulators.values():
        runs += runs_by_job(simulator, results)
    assert set(runs.values()) == {1}, "a job was executed twice"
