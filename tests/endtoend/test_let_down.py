"""Servers that work, but take no submission of some jobs or hand out no outputs: others pass."""

from __future__ import annotations

import json

import trio

from comfyd.simulator import Simulator
from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon, Json
from tests.endtoend.prove_many_servers import farm
from tests.endtoend.test_bundles import GRAPH, make, picture
from tests.endtoend.test_outcomes import by_stem
from tests.endtoend.waiting import until

PATIENCE_S = 90  # for a whole test on a busy machine
ABANDON_S = 2.0
SETTINGS: dict[str, Json] = {"audit": {"abandon_after": f"{ABANDON_S:g}s"}}


def inverted(number: int) -> graphs.Graph:
    return {
        **graphs.picture(number),
        "2": graphs.node("ImageInvert", image=["1", 0]),
        "9": graphs.node("SaveImage", images=["2", 0], filename_prefix="bad"),
    }


async def told(daemon: Daemon, why: str) -> None:
    """Until the status says *why* of some server."""
    while True:
        status = json.loads(await daemon.get("/api/v1/status"))
        if any(server["reason"].startswith(why) for server in status["servers"]):
            return
        await trio.sleep(0.05)


async def test_jobs_that_no_server_takes_do_not_hold_up_the_others(tmp_path):
    async with farm(tmp_path, within_s=PATIENCE_S) as three:
        for simulator in three.simulators:
            simulator.faults.set("post-fail-class=500:ImageInvert")
        for number in range(10):
            three.drop_as(f"bad-{number}", inverted(number))
        await told(three.daemon, "did not take the last")
        three.drop(5)
        await three.daemon.finish(5, within_s=45)
        assert all(stem.startswith("job-") for stem in by_stem(three.daemon))
        for simulator in three.simulators:
            simulator.faults.clear()
        await three.daemon.finish(15, within_s=45)
    three.check()
    assert set(three.runs().values()) == {1}


async def test_a_job_that_a_server_never_takes_is_refused_in_the_end(
    simulator: Simulator, tmp_path
):
    daemon = Daemon(tmp_path, simulator.url)
    simulator.faults.set("post-fail-class=500:ImageInvert")
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("bad.json", {"workflow": inverted(0), "max_attempts": 2})
            number = 0
            while not list(daemon.spool.failed.glob("bad.*/error.json")):
                number += 1
                daemon.drop(f"good-{number}.json", graphs.picture(number))
                await trio.sleep(0.5)
            await until(lambda: daemon.finished() == number + 1)
    results = by_stem(daemon)
    bad = results.pop("bad")
    assert (bad["state"], bad["reason"], bad["attempts"]) == ("failed", "rejected", 3)
    assert "did not take this job (HTTP status 500), and took others" in bad["message"]
    assert {result["state"] for result in results.values()} == {"done"}


async def test_uploads_that_fail_hold_up_nobody_who_brings_no_files(simulator: Simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    document = {"workflow": GRAPH, "files": {"10.image": "photo.png"}}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            photo = await picture(daemon, 1)
            simulator.faults.set("upload-fail=500")
            for number in range(6):
                aside = make(daemon.spool.tmp / f"b{number}", document, photo=photo)
                aside.rename(daemon.spool.new / f"b{number}")
            await until(lambda: len(list(daemon.spool.claimed.iterdir())) == 6)
            daemon.drop("plain.json", graphs.picture(2))
            await daemon.finish(2, within_s=30)
            assert {"plain", "picture-1"} == set(by_stem(daemon))
            simulator.faults.clear()
            simulator.faults.set("upload-fail=400:3")
            await daemon.finish(8, within_s=60)
    states = [result["state"] for stem, result in by_stem(daemon).items() if stem[0] == "b"]
    assert sorted(states) == ["done"] * 3 + ["failed"] * 3
    messages = [r["message"] for r in by_stem(daemon).values() if r["state"] == "failed"]
    assert all('does not take "photo.png" (HTTP status 400' in message for message in messages)


async def test_outputs_that_a_server_keeps_are_made_on_another(tmp_path):
    async with farm(tmp_path, within_s=PATIENCE_S) as three:
        three.simulators[0].faults.set("view-fail=500")
        three.drop(12)
        await three.daemon.finish(12, within_s=60)
    results = three.check()
    assert {result["server"] for result in results.values()} == {"b", "c"}
    again = [result for result in results.values() if result["attempts"] > 1]
    assert again
    assert all(result["attempts"] == 2 for result in again)


async def test_outputs_that_no_server_hands_out_are_missing(simulator: Simulator, tmp_path):
    """ComfyUI closes the connection where a file's name fits into no header."""
    daemon = Daemon(tmp_path, simulator.url, SETTINGS)
    graph = graphs.picture(1)
    graph["9"]["inputs"]["filename_prefix"] = "two\nlines"
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("bad.json", {"workflow": graph, "max_attempts": 2})
            daemon.drop("good.json", graphs.picture(2))
            await daemon.finish(2, within_s=60)
    results = by_stem(daemon)
    assert results["good"]["state"] == "done"
    assert (results["bad"]["reason"], results["bad"]["attempts"]) == ("output_missing", 2)
    assert simulator.executions.total() == 3


async def test_wrong_outputs_are_made_on_another_server(tmp_path):
    async with farm(tmp_path, 2, within_s=PATIENCE_S) as two:
        two.simulators[0].faults.set("view-wrong")
        two.drop(6)
        await two.daemon.finish(6, within_s=60)
    results = two.check()
    assert {result["server"] for result in results.values()} == {"b"}


async def test_what_a_server_takes_in_part_is_taken_whole_by_another(tmp_path):
    async with farm(tmp_path, 2, within_s=PATIENCE_S) as two:
        two.simulators[0].faults.set("missing-model=tuned.safetensors")
        graph = {
            **graphs.picture(1),
            "2": graphs.node("SimModel", image=["1", 0], model="tuned.safetensors"),
            "8": graphs.node("SaveImage", images=["2", 0], filename_prefix="tuned"),
        }
        two.drop_as("whole", graph)
        await two.daemon.finish(1, within_s=60)
    (result,) = two.check().values()
    assert sorted(output["node"] for output in result["outputs"]) == ["8", "9"]
    assert "a did not: The server would run only part" in result["warnings"][0]


async def test_a_part_is_found_out_though_the_servers_answer_is_lost(
    simulator: Simulator, tmp_path
):
    daemon = Daemon(tmp_path, simulator.url)
    simulator.faults.set("post-ambiguous=1")
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("partial.json", graphs.partial(1))
            await daemon.finish(1, within_s=60)
    ((_, result),) = daemon.results().items()
    assert (result["state"], result["reason"]) == ("failed", "partial")
    assert "nodes 2 did not pass its checks" in result["message"]
    assert simulator.posts.total() == 2
