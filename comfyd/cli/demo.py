"""``comfyd demo``: a daemon, a server, sample jobs and a check of everything that comes back."""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from comfyd import app, config, log
from comfyd.cli.exits import Exit
from comfyd.cli.follow import Follower
from comfyd.cli.progress import shown
from comfyd.cli.samples import Sample, samples
from comfyd.cli.screen import counted, put, put_json, say
from comfyd.cli.verify import problems_of
from comfyd.config import Config
from comfyd.config.server import is_loopback
from comfyd.errors import ConfigError, UsageError
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool, drop

NODE_S: Final = 0.12  # slow enough to be seen, and eight jobs still end within seconds
TICK_S: Final = 0.1
SERVER_S: Final = 20.0  # for a server to be found up
JOB_S: Final = 60.0  # for each job, on the slowest machine
METRICS_S: Final = 10.0


def main(args: argparse.Namespace) -> int:
    """OK only if every result was verified."""
    folder = Path(tempfile.mkdtemp(prefix="comfyd-demo-"))
    try:
        if args.server is not None:  # before anything starts
            _configure(folder, args.server)
        return trio.run(_demo, args, folder)
    except BaseException:
        if (folder / "spool").exists():
            say(f"comfyd: what there is of the demo lies in {folder}")
        else:
            shutil.rmtree(folder)
        raise


async def _demo(args: argparse.Namespace, folder: Path) -> int:
    with (folder / "comfyd.log").open("w", encoding="utf-8") as lines:
        log.configure("debug", "logfmt", stream=lines)
        async with trio.open_nursery() as nursery:
            url = args.server
            if url is None:
                url = await nursery.start(Simulator(run_s=NODE_S).serve)
            code = await _with_daemon(args, folder, url)
            nursery.cancel_scope.cancel()
    return code


async def _with_daemon(args: argparse.Namespace, folder: Path, url: str) -> int:
    """Everything between the start of the daemon and its orderly end."""
    settings = _configure(folder, url)
    async with trio.open_nursery() as nursery:
        daemon: app.Daemon = await nursery.start(partial(app.run, settings))
        jobs = counted(args.jobs, "job")
        say(f"comfyd: {jobs} for {url}; folder {folder}, with comfyd.log")
        began_s = trio.current_time()
        spool = Spool(settings.spool)
        made = samples(args.jobs, random.Random())  # colours that no cache has seen
        submitted = {_submit(spool, sample): sample for sample in made}
        follower = Follower.of(spool, submitted)
        stopped = await _follow(follower, daemon, json=args.json)
        took_s = trio.current_time() - began_s
        problems = await trio.to_thread.run_sync(_verify, follower, submitted)
        metrics = folder / "metrics.txt"
        metrics.write_text(await _metrics_of(daemon.http_url), encoding="utf-8")
        if args.json:
            put_json(_report(follower, problems, folder, took_s))
        else:
            _tell(follower, problems, folder, took_s)
        if stopped:
            say(f"comfyd: {stopped}")
        if args.keep:
            say(f"comfyd: the daemon goes on at {daemon.http_url}/ until Ctrl-C")
            await _until_told()
        daemon.stop()
    return Exit.FAILED if any(problems.values()) else Exit.OK


def _configure(folder: Path, url: str) -> Config:
    """Write the configuration, for people to go on with, and read it.

    Raises:
      UsageError: *url* is no server's.

    """
    server: dict[str, Any] = {"name": "demo", "url": url}
    if url.lower().startswith("http:") and not is_loopback(urlsplit(url).hostname or ""):
        server |= {"insecure": True}
    path = folder / "comfyd.yaml"
    lines = [
        "# Made by comfyd demo; see: comfyd -c comfyd.yaml status",
        f"servers: [{json.dumps(server)}]",
        "metrics: {listen: '127.0.0.1:0'}  # a free port, told in comfyd.log",
        "outputs: {min_free_bytes: 16MiB}",
    ]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    try:
        return config.load(path)
    except ConfigError as error:
        raise UsageError(f"--server {url}: {error.problem}") from None


def _submit(spool: Spool, sample: Sample) -> str:
    return drop(spool, f"{sample.name}.json", json.dumps(sample.document).encode())


async def _follow(follower: Follower, daemon: app.Daemon, *, json: bool) -> str:
    """Show the jobs to their end; a sentence if they were not waited for that long."""
    began_s = trio.current_time()
    up = False
    with shown(sys.stderr if json else sys.stdout, changes=True) as show:
        while True:
            status = (await daemon.snapshot()).to_dict()
            await trio.to_thread.run_sync(follower.look)
            follower.hear(status)
            show.update(follower)
            if not follower.open:
                return ""
            waited_s = trio.current_time() - began_s
            server = status["servers"][0]
            up = up or server["state"] == "up"
            if not up and waited_s > SERVER_S:
                return f"{server['url']} is {server['state']}: {server['reason'] or 'no answer'}"
            if waited_s > JOB_S * len(follower.jobs):
                return f"gave up after {waited_s:.0f} s; {len(follower.open)} jobs have not ended"
            await trio.sleep(TICK_S)


def _verify(follower: Follower, submitted: Mapping[str, Sample]) -> dict[str, list[str]]:
    """What is wrong, by job; an empty list for each that is as it should be."""
    found = {}
    for job, each in follower.jobs.items():
        if each.state == "done" and each.folder is not None:
            found[job] = problems_of(submitted[job], each.folder)
        else:
            found[job] = [f"{each.state}: {each.message}" if each.message else each.state]
    return found


async def _metrics_of(url: str) -> str:
    """The daemon's metrics as they are now."""
    with trio.fail_after(METRICS_S):
        return await trio.to_thread.run_sync(_get_metrics, url, abandon_on_cancel=True)


def _get_metrics(url: str) -> str:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=METRICS_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


async def _until_told() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


def _tell(
    follower: Follower, problems: Mapping[str, list[str]], folder: Path, took_s: float
) -> None:
    good = sum(not found for found in problems.values())
    files = sum(each.outputs for each in follower.jobs.values())
    for job, found in problems.items():
        for problem in found:
            put(f"{job}: {problem}")
    of_what = f"size, SHA-256 and PNG signature of {counted(files, 'file')}"
    put(
        f"{good} of {len(problems)} results verified in {took_s:.1f} s: {of_what}",
        f"results  {folder / 'spool' / 'done'}",
        f"metrics  {folder / 'metrics.txt'}",
        f"more     {_me()} -c {folder / 'comfyd.yaml'} jobs",
    )


def _me() -> str:
    """How this program is called from where the user is: the virtual environment may be no place
    that their shell looks in."""
    return "comfyd" if shutil.which("comfyd") else f"{shlex.quote(sys.executable)} -m comfyd"


def _report(
    follower: Follower, problems: Mapping[str, list[str]], folder: Path, took_s: float
) -> dict[str, Any]:
    jobs = [
        {
            "job": each.job,
            "state": each.state,
            "verified": not problems[each.job],
            "problems": problems[each.job],
            "folder": None if each.folder is None else str(each.folder),
        }
        for each in follower.jobs.values()
    ]
    return {
        "verified": sum(not found for found in problems.values()),
        "jobs": jobs,
        "took_s": round(took_s, 3),
        "results": str(folder / "spool" / "done"),
        "metrics": str(folder / "metrics.txt"),
        "config": str(folder / "comfyd.yaml"),
    }
