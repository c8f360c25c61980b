"""Proof: the daemon and a real ComfyUI. Run by ``make prove-comfyui COMFYUI_URL=...``.

Only nodes that need no model. The server is left as it was found, but for files in its folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import wave
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import pytest
import trio

from tests.contract import graphs as whole
from tests.endtoend import graphs
from tests.endtoend.daemon import ROOT, Daemon, fetch
from tests.endtoend.waiting import until

URL: Final = os.environ.get("COMFYUI_URL", "")
JOBS: Final = 200
PATIENCE_S: Final = 240

pytestmark = pytest.mark.skipif(not URL, reason="set COMFYUI_URL to a running ComfyUI")


def colour() -> int:
    """One that no run before has used: the server's cache answers for those."""
    return time.time_ns() // 1000 % (1 << 24)


def slow(number: int, nodes: int) -> dict[str, Any]:
    """About 50 ms a node on a slow CPU; it can be interrupted between nodes."""
    graph = {"1": graphs.node("EmptyImage", width=256, height=256, batch_size=1, color=number)}
    for each in range(2, nodes + 2):
        graph[str(each)] = graphs.node(
            "ImageBlur", image=[str(each - 1), 0], blur_radius=31, sigma=1.0
        )
    last = [str(nodes + 1), 0]
    return {**graph, "900": graphs.node("SaveImage", images=last, filename_prefix="slow")}


async def command(daemon: Daemon, *words: str) -> str:
    """What ``comfyd`` says to *words*."""
    line = [sys.executable, "-m", "comfyd", "-c", str(daemon.config), *words]
    ended = await trio.run_process(line, cwd=ROOT, capture_stdout=True, check=False)
    return ended.stdout.decode()


async def record(prompt_id: str) -> dict[str, Any]:
    """What the server's history says of *prompt_id*; {} if nothing."""
    found = json.loads(await trio.to_thread.run_sync(fetch, f"{URL}/history/{prompt_id}"))
    return dict(found.get(prompt_id, {}))


async def queue() -> list[str]:
    """The prompts that run or wait at the server."""
    found = json.loads(await trio.to_thread.run_sync(fetch, f"{URL}/queue"))
    return [each[1] for part in ("queue_running", "queue_pending") for each in found[part]]


def jobs(daemon: Daemon, stem: str) -> dict[str, Any]:
    ((_, result),) = [
        each for each in daemon.results().items() if each[0].rpartition(".")[0] == stem
    ]
    return result


async def running(daemon: Daemon) -> str:
    """The prompt that is seen to run."""
    while True:
        for job in json.loads(await daemon.get("/api/v1/status"))["at_hand"]:
            if job["state"] == "running":
                return str(job["prompt_id"])
        await trio.sleep(0.05)


async def test_200_jobs_each_equal_to_what_the_server_keeps(tmp_path: Path):
    daemon, first = Daemon(tmp_path, URL), colour()
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            began_s = trio.current_time()
            for number in range(JOBS):
                daemon.drop(f"job-{number}.json", graphs.picture(first + number))
            await daemon.finish(JOBS, within_s=PATIENCE_S)
            took_s = trio.current_time() - began_s
            results = daemon.results()
            for job, result in results.items():
                (output,) = result["outputs"]
                kept = await trio.to_thread.run_sync(
                    fetch, f"{URL}/view?{urlencode(output['source'])}"
                )
                ours = (daemon.spool.done / job / output["file"]).read_bytes()
                assert hashlib.sha256(ours).hexdigest() == output["sha256"]
                assert ours == kept
    assert {result["state"] for result in results.values()} == {"done"}
    how = [result["completion"] for result in results.values()]
    print(f"\n{JOBS} jobs in {took_s:.1f} s; by signal: {how.count('signal')}")
    assert how.count("signal") == JOBS


async def test_every_kind_of_output(tmp_path: Path):
    daemon, number = Daemon(tmp_path, URL), colour()
    made = {
        "mixed": whole.mixed("prove", number),
        "sounds": whole.sounds("prove"),
        "films": whole.films("prove", number),
        "latent": whole.latent("prove"),
    }
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            for name, graph in made.items():
                daemon.drop(f"{name}.json", graph)
            await daemon.finish(len(made), within_s=120)
    for name in made:
        result = jobs(daemon, name)
        files = sorted(output["file"] for output in result["outputs"])
        print(f"\n{name}: {result['state']} {files} {sorted(result['ui'])} {result['warnings']}")
        assert result["state"] == "done", result
        assert all(output["bytes"] > 0 for output in result["outputs"])
    found = {
        Path(output["file"]).suffix for name in made for output in jobs(daemon, name)["outputs"]
    }
    assert found >= {".png", ".webp", ".flac", ".mp3", ".opus", ".webm", ".mp4", ".latent"}
    assert jobs(daemon, "mixed")["ui"]["12"]["text"] == ["text of prove"]


async def test_a_bundle_with_a_picture_and_a_sound(tmp_path: Path):
    daemon = Daemon(tmp_path, URL)
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(colour().to_bytes(4, "big") * 800)
    (tmp_path / "sound.wav").write_bytes(sound.getvalue())
    graph = {
        "10": graphs.node("LoadImage", image="replaced.png"),
        "2": graphs.node("ImageInvert", image=["10", 0]),
        "9": graphs.node("SaveImage", images=["2", 0], filename_prefix="bundle"),
        "20": graphs.node("LoadAudio", audio="replaced.wav"),
        "29": graphs.node("SaveAudio", audio=["20", 0], filename_prefix="bundle"),
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("photo.json", graphs.picture(colour(), side_px=64))
            await daemon.finish(1, within_s=30)
            (photo,) = daemon.spool.done.glob("photo.*/9-0.png")
            said = await command(
                daemon, "submit", str(tmp_path / "graph.json"), "--name", "bundle", "--wait",
                "--file", f"10.image={photo}", "--file", f"20.audio={tmp_path / 'sound.wav'}",
            )  # fmt: skip
    result = jobs(daemon, "bundle")
    assert result["job"] in said
    assert result["state"] == "done", result
    assert sorted(output["file"] for output in result["outputs"]) == ["29-0.flac", "9-0.png"]


async def test_a_cancel_of_a_pending_and_of_a_running_prompt(tmp_path: Path):
    daemon, number = Daemon(tmp_path, URL), colour()
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("running.json", slow(number, 400))
            ran = await running(daemon)
            daemon.drop("pending.json", slow(number + 1, 400))
            await until(lambda: len(os.listdir(daemon.spool.claimed)) == 2)
            waits = ""
            while not waits:
                waits = next((each for each in await queue() if each != ran), "")
            began_s = trio.current_time()
            said = await command(daemon, "cancel", "--match", "pending.*")
            print(f"\n{said.strip()} after {trio.current_time() - began_s:.1f} s")
            assert waits not in await queue()
            assert await record(waits) == {}
            assert ran in await queue()  # and nothing else was touched
            began_s = trio.current_time()
            said = await command(daemon, "cancel", "--match", "running.*")
            print(f"{said.strip()} after {trio.current_time() - began_s:.1f} s")
            assert ran not in await queue()
            messages = [each[0] for each in (await record(ran))["status"]["messages"]]
            assert "execution_interrupted" in messages
            await daemon.finish(2, within_s=30)
    for name in ("pending", "running"):
        assert jobs(daemon, name)["state"] == "cancelled"


async def test_a_run_deadline_that_fires(tmp_path: Path):
    daemon = Daemon(tmp_path, URL)
    document = {"workflow": slow(colour(), 400), "timeouts": {"run": "2s"}}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("late.json", document)
            prompt_id = await running(daemon)
            await daemon.finish(1, within_s=60)
            assert prompt_id not in await queue()
            messages = [each[0] for each in (await record(prompt_id))["status"]["messages"]]
            assert "execution_interrupted" in messages
    result = jobs(daemon, "late")
    print(f"\n{result['reason']}: {result['message']} {result['durations_s']}")
    assert result["reason"] == "run_timeout"
    assert 2 <= result["durations_s"]["run"] < 10


async def test_what_the_server_says_no_to(tmp_path: Path):
    daemon, number = Daemon(tmp_path, URL), colour()
    expected: dict[str, tuple[object, str]] = {
        "unknown": (whole.unknown_class(), "rejected"),
        "range": (whole.out_of_range("prove"), "rejected"),
        "failing": (graphs.failing(number), "execution_error"),
        "partial": (graphs.partial(number), "partial"),
        "editor": ({"nodes": [], "links": []}, "invalid_job"),
    }
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            for name, (document, _) in expected.items():
                daemon.drop(f"{name}.json", document)
            await daemon.finish(len(expected), within_s=60)
    for name, (_, reason) in expected.items():
        result = jobs(daemon, name)
        print(f"\n{name}: {result['reason']}: {result['message']}")
        assert result["reason"] == reason
