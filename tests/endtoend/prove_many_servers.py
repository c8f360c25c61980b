"""Proof: of several servers some die, hang, fail everything or lack a model; no job suffers for it.

Run by ``make prove``. What the defaults wait minutes for happens here in seconds, in proportion.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from comfyd.core.model import JobId, Row, prompt_id_of
from comfyd.journal.sqlite import open_readonly
from comfyd.simulator import HowOften, Simulator
from tests.endtoend.daemon import Daemon, fetch
from tests.endtoend.graphs import Graph, node, picture
from tests.endtoend.oracle import runs_by_job
from tests.endtoend.prove_kills import all_taken, consumer, names
from tests.endtoend.server import Server
from tests.endtoend.waiting import counted, until

NAMES: Final = ("a", "b", "c")
NODE_S: Final = 0.03  # two nodes a job
ABANDON_S: Final = 4.0
PING_S: Final = 1.0
STRUCK: Final = HowOften(count=0)
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "audit": {"abandon_after": f"{ABANDON_S:g}s"},
    "tracker": {
        "connect_timeout": "1s",
        "ping_interval": f"{PING_S:g}s",
        "ping_timeout": f"{PING_S:g}s",
        "reconnect_first": "200ms",
        "reconnect_max": "1s",
    },
    "client": {
        "connect_timeout": "1s",
        "submit_timeout": "2s",
        "download_idle_timeout": "1s",
    },
    "history": {"timeout": "1s", "backoff": "200ms"},
    "health": {"interval": "500ms", "timeout": "1s"},
    "jobs": {"stall_timeout": "3s"},
}


class Farm:
    """Simulated servers in the test's own process, and one daemon that uses them all."""

    def __init__(self, simulators: Sequence[Simulator], daemon: Daemon) -> None:
        self.simulators = simulators
        self.daemon = daemon
        self._jobs = 0

    def drop(self, count: int) -> None:
        """Drop *count* jobs more, each a picture of its own."""
        for _ in range(count):
            self._jobs += 1
            self.daemon.drop(f"job-{self._jobs}.json", picture(self._jobs))

    def drop_as(self, name: str, graph: Graph) -> None:
        """Drop one more job under *name*."""
        self._jobs += 1
        self.daemon.drop(f"{name}.json", graph)

    @property
    def jobs(self) -> int:
        return self._jobs

    def check(self, *failed: str) -> dict[str, dict[str, Any]]:
        """Every job dropped has one result, and only those named *failed* did; the results.

        Each prompt was executed once at most, and nobody's but ours.
        """
        results = self.daemon.results()
        assert len(results) == self._jobs
        stems = {job.rpartition(".")[0]: result for job, result in results.items()}
        assert len(stems) == self._jobs
        wrong = {
            stem: (result["reason"], result["message"])
            for stem, result in stems.items()
            if result["state"] != "done" and stem not in failed
        }
        assert wrong == {}
        for result in stems.values():
            assert result["outputs"] or result["state"] != "done"
        assert os.listdir(self.daemon.spool.stage) == []
        for simulator in self.simulators:
            assert set(simulator.executions.values()) <= {1}, "a prompt was executed twice"
            runs_by_job(simulator, results)
        return stems

    def runs(self) -> Counter[str]:
        """How often each finished job was executed, on all servers."""
        runs: Counter[str] = Counter()
        for simulator in self.simulators:
            runs += runs_by_job(simulator, self.daemon.results())
        return runs

    def rows(self) -> list[Row]:
        """What the journal holds of every finished job; the daemon must have ended."""
        journal = open_readonly(self.daemon.state / "comfyd.db")
        try:
            rows = [journal.get(JobId(job)) for job in self.daemon.results()]
        finally:
            journal.close()
        return [row for row in rows if row is not None]


@asynccontextmanager
async def farm(
    home: Path,
    count: int = 3,
    *,
    node_s: float = NODE_S,
    within_s: float = 120,
    **settings: dict[str, Any],
) -> AsyncIterator[Farm]:
    """*count* servers and a daemon that is ready; all of it must take less than *within_s*."""
    simulators = [Simulator(run_s=node_s) for _ in range(count)]
    began_s = trio.current_time()
    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            urls = [await nursery.start(simulator.serve) for simulator in simulators]
            merged = {
                name: {**SETTINGS.get(name, {}), **settings.get(name, {})}
                for name in SETTINGS.keys() | settings.keys()
            }
            daemon = Daemon(home, dict(zip(NAMES, urls, strict=False)), merged)
            found = Farm(simulators, daemon)
            async with daemon.running():
                yield found
            nursery.cancel_scope.cancel()
    runs = found.runs()
    where = Counter(str(result["server"]) for result in daemon.results().values())
    print(
        f"\n{len(daemon.results())} results, by server: {dict(sorted(where.items()))};"
        f" {runs.total()} executions, {sum(n > 1 for n in runs.values())} jobs executed again;"
        f" {trio.current_time() - began_s:.0f} s"
    )


async def test_one_of_three_killed_for_good_in_the_middle_of_300_jobs(tmp_path):
    async with farm(tmp_path) as three:
        three.drop(300)
        await three.daemon.finish(100, within_s=40)
        three.simulators[0].kill()
        await three.daemon.finish(300, within_s=60)
        metrics = await three.daemon.metrics()
    three.check()
    assert len(os.listdir(three.daemon.spool.done)) == 300
    assert three.simulators[0].executions.total() > 20, "it had its share of the work"
    # Only what was there when it died is run again, and one attempt at most is held against a job.
    again = [job for job, count in three.runs().items() if count > 1]
    assert len(again) <= 2
    assert max(three.runs().values()) <= 2
    assert metrics['comfyd_attempts_charged_total{server="a"}'] <= 1
    assert metrics['comfyd_server_up{server="a"}'] == 0


async def test_one_of_three_comes_back_with_its_memory(tmp_path):
    """It is cut off longer than ``abandon_after``, at work; then it must drop what moved on."""
    async with farm(tmp_path) as three:
        lost = three.simulators[0]
        three.drop(100)
        await three.daemon.finish(20, within_s=30)
        lost.faults.set("node-stalls=1")
        with trio.fail_after(20):
            await until(lambda: lost.faults.stalls == STRUCK and lost.running and lost.pending)
        lost.faults.half_open = "all"
        (running,), waiting = list(lost.running), list(lost.pending)
        begun, delivered = set(lost.executions), set(three.daemon.results())
        await three.daemon.finish(100, within_s=60)  # all of it, without that server
        assert (lost.running, lost.pending) == ([running], waiting)
        lost.faults.half_open = None
        lost.drop_connections()
        three.drop(100)
        await three.daemon.finish(200, within_s=60)
        with trio.fail_after(10):
            await until(lambda: running in lost.history)
        messages = json.loads(
            await trio.to_thread.run_sync(fetch, f"{lost.url}/history/{running}")
        )[running]["status"]["messages"]
        assert await trio.to_thread.run_sync(fetch, f"{lost.url}/queue")
    three.check()
    assert len(os.listdir(three.daemon.spool.done)) == 200
    assert messages[-1][0] == "execution_interrupted", "it was ended by its own id"
    assert all(lost.executions[prompt] == 0 for prompt in waiting), "run after its fence"
    assert max(three.runs().values()) <= 2
    # What stood still there was run elsewhere, as is what had ended and was not fetched yet: seen
    # on a busy machine. The others moved.
    again = {job for job, count in three.runs().items() if count == 2}
    undelivered = three.daemon.results().keys() - delivered
    begun_as = {str(prompt_id_of(JobId(job), n)): job for job in undelivered for n in range(1, 4)}
    cut_off = {begun_as[prompt] for prompt in begun & begun_as.keys()}
    assert begun_as[running] in again
    assert again <= cut_off
    assert any(result["server"] == "a" for result in three.daemon.results().values())


async def test_one_of_three_hangs_for_ten_times_ping_timeout(tmp_path):
    """SIGSTOP: its kernel takes connections, and nothing answers. A consumer looks for twins."""
    taken = tmp_path / "taken"
    began_s = trio.current_time()
    with trio.fail_after(150):
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(Server.running(node_s=NODE_S)) for _ in NAMES
            ]
            urls = dict(zip(NAMES, [server.url for server in servers], strict=True))
            daemon = Daemon(tmp_path, urls, SETTINGS)
            await stack.enter_async_context(daemon.running())
            await stack.enter_async_context(consumer(daemon, taken, 1))
            for number in range(200):
                daemon.drop(f"job-{number}.json", picture(number))
            await all_taken(daemon, taken, 50, within_s=40)
            servers[0].pause()
            stopped_s = trio.current_time()
            await all_taken(daemon, taken, 200, within_s=60)
            without_s = trio.current_time() - stopped_s
            await trio.sleep(max(0.0, 10 * PING_S - without_s))
            servers[0].resume()
            for number in range(200, 260):
                daemon.drop(f"job-{number}.json", picture(number))
            await all_taken(daemon, taken, 260, within_s=40)
            await trio.sleep(3)  # for one too many
            histories = [
                json.loads(await trio.to_thread.run_sync(fetch, f"{server.url}/history"))
                for server in servers
            ]
    manifests = [json.loads(path.read_bytes()) for path in taken.glob("done/*/result.json")]
    records = [record for history in histories for record in history.values()]
    executed = Counter(record["prompt"][3]["comfyd"]["job"] for record in records)
    print(
        f"\n200 taken {without_s:.1f} s after the stop, {len(records)} executions for"
        f" {len(manifests)} results, {trio.current_time() - began_s:.0f} s"
    )
    assert names(taken / "failed") == names(taken / "twice") == []
    assert len(manifests) == 260
    assert names(daemon.spool.done) == names(daemon.spool.failed) == []
    assert len(records) == len(set().union(*histories)), "a prompt was executed twice"
    assert max(executed.values()) <= 2
    assert any(manifest["server"] == "a" for manifest in manifests[-60:])


@pytest.mark.parametrize("kind", ["cuda", "memory", "other"])
async def test_a_card_that_fails_everything_at_once(tmp_path, kind):
    async with farm(tmp_path) as three:
        sick = three.simulators[0]
        sick.faults.set(f"card-fails={kind}")
        three.drop(150)
        await three.daemon.finish(150, within_s=60)
        metrics = await three.daemon.metrics()
    results = three.check()
    seen = +runs_by_job(sick, three.daemon.results())
    print(f"{len(seen)} jobs saw the sick card")
    assert 1 <= len(seen) <= 10
    assert {result["server"] for result in results.values()} == {"b", "c"}
    assert metrics['comfyd_jobs_finished_total{outcome="failed",server="a"}'] == 0
    assert metrics['comfyd_server_state{server="a",state="wedged"}'] == 1


async def test_a_job_that_is_wrong_fails_all_the_same(tmp_path):
    """Tried elsewhere in case it was the server; then it is told what its node said."""
    async with farm(tmp_path) as three:
        three.drop_as(
            "failing",
            {
                **picture(1),
                "2": node("SimFail", image=["1", 0], message="boom"),
                "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
            },
        )
        three.drop(30)
        await three.daemon.finish(31, within_s=40)
        metrics = await three.daemon.metrics()
    results = three.check("failing")
    assert results["failing"]["reason"] == "execution_error"
    assert "SimFail" in results["failing"]["message"]
    for name in NAMES:
        assert metrics[f'comfyd_server_state{{server="{name}",state="up"}}'] == 1


@pytest.mark.parametrize("servers", [1, 3])
async def test_a_job_that_kills_its_server_harms_no_other(tmp_path, servers):
    poison = {
        **picture(0),
        "2": node("SimCrash", image=["1", 0]),
        "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
    }
    async with farm(tmp_path, servers) as some:
        for simulator in some.simulators:
            simulator.faults.set("crash-down=500ms")
        some.drop(60)
        some.drop_as("poison", poison)
        some.drop(140)
        await some.daemon.finish(201, within_s=100)
        metrics = await some.daemon.metrics()
    results = some.check("poison")
    crashes = sum(simulator.restarts for simulator in some.simulators)
    rows = some.rows()
    charged = {row.job.rpartition(".")[0]: row.charged for row in rows if row.charged}
    print(f"{crashes} crashes; charged: {charged}")
    assert (results["poison"]["state"], results["poison"]["reason"]) == ("failed", "lost")
    assert len(rows) == 201
    assert 1 <= crashes <= 3
    assert charged == {"poison": crashes}
    counted = [n for name, n in metrics.items() if name.startswith("comfyd_attempts_charged_total")]
    assert sum(counted) == crashes


@pytest.mark.parametrize("lack", ["missing-model=tuned.safetensors", "missing-node=SimModel"])
async def test_what_one_server_lacks_is_run_on_the_others(tmp_path, lack):
    async with farm(tmp_path) as three:
        three.simulators[0].faults.set(lack)
        for number in range(60):
            graph = {
                **picture(number),
                "2": node("SimModel", image=["1", 0], model="tuned.safetensors"),
                "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
            }
            three.drop_as(f"tuned-{number}", graph)
        three.drop(60)
        three.drop_as("nowhere", {"1": node("NoSuchNodeAnywhere", value=1)})
        await three.daemon.finish(121, within_s=60)
        metrics = await three.daemon.metrics()
    results = three.check("nowhere")
    assert {results[f"tuned-{n}"]["server"] for n in range(60)} == {"b", "c"}
    assert {result["server"] for result in results.values()} >= {"a", "b", "c"}
    assert results["nowhere"]["reason"] == "rejected"
    assert "NoSuchNodeAnywhere" in results["nowhere"]["message"]
    assert metrics['comfyd_job_failures_total{reason="rejected"}'] == 1


async def test_a_server_whose_worker_takes_nothing(tmp_path):
    """While there is work for all, what waits there waits; it is seen to be sick after 30 s."""
    wedged = 'comfyd_server_state{server="a",state="wedged"}'
    async with farm(tmp_path, node_s=0.2) as three:
        stuck = three.simulators[0]
        stuck.faults.set("stuck-worker")
        three.drop(200)
        with trio.fail_after(60):
            await counted(three.daemon, wedged, 1)
        await three.daemon.finish(200, within_s=60)
        assert (stuck.executions, stuck.pending) == ({}, [])
    results = three.check()
    assert {result["server"] for result in results.values()} == {"b", "c"}
    assert set(three.runs().values()) == {1}


async def test_few_jobs_do_not_wait_for_a_worker_that_takes_nothing(tmp_path):
    """Called back as soon as another server is free; at the latest when it is seen to be sick."""
    async with farm(tmp_path) as three:
        three.simulators[0].faults.set("stuck-worker")
        three.drop(30)
        await three.daemon.finish(28, within_s=15)
        await three.daemon.finish(30, within_s=60)
    three.check()
    assert three.simulators[0].executions == {}
    assert set(three.runs().values()) == {1}


@pytest.mark.parametrize("fault", ["node-stalls=1", "node-hangs=1"])
async def test_a_server_that_stands_still_within_a_node(tmp_path, fault):
    """The stalled one is ended, or given up, and made elsewhere; those behind it move on."""
    async with farm(tmp_path) as three:
        three.simulators[0].faults.set(fault)
        three.drop(100)
        await three.daemon.finish(100, within_s=90)
    results = three.check()
    rows = three.rows()
    (stalled,) = [row for row in rows if row.charged]
    print(f"stalled: {stalled.job}, {stalled.attempt} attempts, made by {stalled.server}")
    assert stalled.charged == 1
    assert results[stalled.job.rpartition(".")[0]]["attempts"] == 2
    again = {job for job, count in three.runs().items() if count > 1}
    assert again == {stalled.job}
