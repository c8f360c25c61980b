"""``comfyd demo``: sample jobs through a real daemon, to verified results, in a fresh folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from comfyd import app, config, log
from comfyd.cli.exits import Exit
from comfyd.cli.follow import Follower
from comfyd.cli.progress import shown
from comfyd.cli.samples import TEXT_NODE, Sample, samples
from comfyd.cli.screen import put_json, say
from comfyd.config import Config
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool, drop

TICK_S: Final = 0.1
PATIENCE_S: Final = 60.0  # for the first job; each more adds JOB_S
JOB_S: Final = 10.0
NODE_S: Final = 0.3  # of the simulated run: slow enough to be seen
PNG: Final = b"\x89PNG\r\n\x1a\n"


def main(args: argparse.Namespace) -> int:
    """Run it; OK only if every result was verified."""
    folder = Path(tempfile.mkdtemp(prefix="comfyd-demo-"))
    return int(trio.run(partial(_demo, args, folder)))


async def _demo(args: argparse.Namespace, folder: Path) -> Exit:
    async with trio.open_nursery() as nursery:
        url = args.server
        if url is None:
            simulator = Simulator(run_s=NODE_S, directory=folder / "comfyui")
            url = await nursery.start(simulator.serve, 0)
            say(f"A simulated ComfyUI serves at {url}.")
        settings = _settings(folder, url)
        log.configure("info", "logfmt", stream=(folder / "comfyd.log").open("w", encoding="utf-8"))
        # A nursery of its own: the daemon is stopped before the server it talks to.
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, settings, signals=args.keep))
            try:
                code = await _show(args, settings, daemon)
                if args.keep and code is Exit.OK:
                    say("The daemon goes on; Ctrl-C ends it.")
                    await daemon.stopped.wait()
            finally:
                daemon.stop()
        nursery.cancel_scope.cancel()
    return code


def _settings(folder: Path, url: str) -> Config:
    """A configuration of its own, kept beside the results as an example that works."""
    lines = [
        "spool: spool",
        "state: state",
        "servers:",
        "  - name: demo",
        f"    url: {json.dumps(url)}",
        "    insecure: true   # asked for on the command line",
        "metrics: {listen: 127.0.0.1:0}",
        "outputs: {min_free_bytes: 16MiB}",
    ]
    path = folder / "comfyd.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return config.load(path)


async def _show(args: argparse.Namespace, settings: Config, daemon: app.Daemon) -> Exit:
    """Submit, follow to the end, verify, and say where everything is."""
    spool = Spool(settings.spool)
    wanted: dict[str, Sample] = {}
    for sample in samples(args.jobs, random.Random()):
        data = json.dumps(sample.document).encode()
        job = await trio.to_thread.run_sync(drop, spool, f"{sample.name}.json", data)
        wanted[job] = sample
    say(f"{len(wanted)} jobs lie in {spool.new}.")
    follower = Follower.of(spool, wanted)
    deadline = trio.current_time() + PATIENCE_S + JOB_S * len(wanted)
    with shown(sys.stderr, changes=True) as show:
        while follower.open and trio.current_time() < deadline:
            await trio.to_thread.run_sync(follower.look)
            follower.hear((await daemon.snapshot()).to_dict())
            show.update(follower)
            await trio.sleep(TICK_S)
        show.update(follower)
    problems = {
        job: problem
        for job, sample in wanted.items()
        if (problem := await trio.to_thread.run_sync(_problem, spool.done / job, sample))
    }
    _report(args, settings, daemon, wanted, problems)
    return Exit.FAILED if problems else Exit.OK


def _problem(folder: Path, sample: Sample) -> str:
    """What is wrong with the result in *folder*, or "" if it is all that it should be."""
    try:
        result = json.loads((folder / "result.json").read_bytes())
    except FileNotFoundError:
        return "there is no result"
    if result["state"] != "done":
        return f"its state is {result['state']}"
    if len(result["outputs"]) != sample.images:
        return f"{len(result['outputs'])} files instead of {sample.images}"
    for output in result["outputs"]:
        data = (folder / output["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != output["sha256"] or len(data) != output["bytes"]:
            return f"{output['file']} is not what was downloaded"
        if not data.startswith(PNG):
            return f"{output['file']} is no PNG picture"
    if sample.text and result["ui"].get(TEXT_NODE, {}).get("text") != [sample.text]:
        return "its text is missing"
    return ""


def _report(
    args: argparse.Namespace,
    settings: Config,
    daemon: app.Daemon,
    wanted: dict[str, Sample],
    problems: dict[str, str],
) -> None:
    folder = settings.spool.parent
    said: dict[str, Any] = {
        "jobs": len(wanted),
        "verified": len(wanted) - len(problems),
        "problems": problems,
        "results": str(settings.spool / "done"),
        "log": str(folder / "comfyd.log"),
        "config": str(folder / "comfyd.yaml"),
    }
    if args.keep:
        said["http"] = daemon.http_url
    if args.json:
        put_json(said)
        return
    for job, problem in problems.items():
        say(f"comfyd: {job}: {problem}")
    pictures = sum(sample.images for sample in wanted.values())
    print(f"{said['verified']} of {len(wanted)} results verified ({pictures} pictures expected).")
    print(f"Results:  {said['results']}")
    print(f"Log:      {said['log']}")
    print(f"Config:   {said['config']}")
    if args.keep:
        print(f"Status:   {daemon.http_url}/")
        print(f"Metrics:  {daemon.http_url}/metrics")
    else:
        print(
            "Metrics:  comfyd demo --keep goes on serving them, and the status page, until Ctrl-C"
        )
    sys.stdout.flush()
