"""Bundles and keys, in a daemon of their own, as a user drops them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import trio

from comfyd.simulator import Simulator
from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon
from tests.endtoend.waiting import counted, until

PATIENCE_S = 60
DONE = 'comfyd_jobs_finished_total{outcome="done",server="local"}'
DUPLICATES = 'comfyd_spool_rejected_total{reason="duplicate"}'

GRAPH = {
    "10": graphs.node("LoadImage", image="replaced.png"),
    "2": graphs.node("ImageInvert", image=["10", 0]),
    "9": graphs.node("SaveImage", images=["2", 0], filename_prefix="bundle"),
}


async def picture(daemon: Daemon, number: int) -> bytes:
    """A picture in a colour of its own, made by the server."""
    daemon.drop(f"picture-{number}.json", graphs.picture(number))
    before = daemon.finished()
    await daemon.finish(before + 1, within_s=20)
    (path,) = daemon.spool.done.glob(f"picture-{number}.*/9-0.png")
    return path.read_bytes()


def make(folder: Path, document: object, **files: bytes) -> Path:
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(document))
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


def pixels(daemon: Daemon, stem: str) -> bytes:
    """The output's pixels, still packed: the rest of a PNG names its workflow."""
    (path,) = daemon.spool.done.glob(f"{stem}.*/9-0.png")
    content = path.read_bytes()
    return content[content.index(b"IDAT") :]


async def test_a_bundle_with_a_picture_however_it_comes(simulator: Simulator, tmp_path: Path):
    """Moved in, copied in slowly, and with a named workflow: all give the same output."""
    flows = tmp_path / "flows"
    flows.mkdir()
    (flows / "invert.json").write_text(json.dumps(GRAPH))
    daemon = Daemon(tmp_path, simulator.url)
    settings = {**json.loads(daemon.config.read_bytes()), "workflows": "flows"}
    daemon.config.write_text(json.dumps(settings))
    document = {"workflow": GRAPH, "files": {"10.image": "photo.png"}}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            photo = await picture(daemon, 0x102030)
            await picture(daemon, 0xEFDFCF)
            aside = make(daemon.spool.tmp / "moved", document, photo=photo)
            aside.rename(daemon.spool.new / "moved")

            copied = daemon.spool.new / "copied"
            copied.mkdir()
            (copied / "job.json").write_text(json.dumps(document))
            await trio.sleep(0.3)  # less than it takes to settle
            (copied / "photo.png").write_bytes(photo[:10])
            await trio.sleep(0.3)
            (copied / "photo.png").write_bytes(photo)

            naming = {**document, "workflow": "invert.json"}
            aside = make(daemon.spool.tmp / "named", naming, photo=photo)
            aside.rename(daemon.spool.new / "named")
            await daemon.finish(5, within_s=30)
            for stem in ("moved", "copied", "named"):
                assert pixels(daemon, stem) == pixels(daemon, f"picture-{0xEFDFCF}")
            (named,) = daemon.spool.done.glob("named.*")
    assert sorted(path.name for path in (named / "job").iterdir()) == [
        "invert.json", "job.json", "photo.png",
    ]  # fmt: skip
    assert len(simulator.uploads) == 1
    assert simulator.uploads.total() == 3
    assert os.listdir(daemon.spool.claimed) == os.listdir(daemon.spool.stage) == []


async def test_a_bundle_outlives_a_kill(simulator: Simulator, tmp_path: Path):
    daemon = Daemon(tmp_path, simulator.url)
    document = {"workflow": GRAPH, "files": {"10.image": "photo.png"}}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            photo = await picture(daemon, 1)
            simulator.faults.set("upload-fail=503")
            for number in range(3):
                aside = make(daemon.spool.tmp / f"b{number}", document, photo=photo)
                aside.rename(daemon.spool.new / f"b{number}")
            await until(lambda: len(os.listdir(daemon.spool.claimed)) == 3)
            await daemon.kill()
            simulator.faults.clear()
            await daemon.start()
            await daemon.ready()
            await daemon.finish(4, within_s=30)
            await until(lambda: not os.listdir(daemon.spool.claimed))
    assert {result["state"] for result in daemon.results().values()} == {"done"}
    assert simulator.posts.total() == 4


async def test_a_key_dropped_twice_is_one_job(simulator: Simulator, tmp_path: Path):
    daemon = Daemon(tmp_path, simulator.url)
    document = {"workflow": graphs.picture(7), "key": "nightly-0042"}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            for name in ("first", "second"):
                daemon.drop(f"{name}.json", document)
            await counted(daemon, DUPLICATES, 1)
            await daemon.finish(1, within_s=20)
            daemon.drop("third.json", document)
            metrics = await counted(daemon, DUPLICATES, 2)
            daemon.drop("other.json", {**document, "priority": 1})
            await daemon.finish(2, within_s=20)
            await until(lambda: not os.listdir(daemon.spool.claimed))
            assert metrics[DONE] == 1
    results = {job.rpartition(".")[0]: result for job, result in daemon.results().items()}
    other = results.pop("other")
    ((stem, done),) = results.items()
    assert stem in {"first", "second"}
    assert done["state"] == "done"
    assert (other["state"], other["reason"]) == ("failed", "conflict")
    assert done["job"] in other["message"]
    assert simulator.posts.total() == 1


async def test_a_job_may_accept_that_the_server_drops_outputs(simulator: Simulator, tmp_path: Path):
    daemon = Daemon(tmp_path, simulator.url)
    document = {"workflow": graphs.partial(3), "on_partial": "accept"}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("partial.json", document)
            await daemon.finish(1, within_s=20)
    ((_, result),) = daemon.results().items()
    assert result["state"] == "done"
    assert [output["node"] for output in result["outputs"]] == ["9"]
    assert "The server dropped some outputs; nodes 2 did" in result["warnings"][0]
