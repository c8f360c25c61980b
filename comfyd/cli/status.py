"""``comfyd status``: servers, counts, the oldest job and the jobs at hand."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any, Final

from comfyd.cli.exits import Exit
from comfyd.cli.place import configured
from comfyd.cli.reading import opened
from comfyd.cli.screen import (
    Table,
    console,
    counted,
    is_terminal,
    put,
    put_json,
    rendered,
    say,
    size,
    span,
)
from comfyd.config import Config

WATCH_S: Final = 1.0
AT_HAND_MAX: Final = 20  # more would push the servers off the screen

# What a state means to a person, where the server itself gave no reason.
_WORDS: Final = {
    "down": "does not answer",
    "deaf": "works, but sends no events: it is polled",
    "wedged": "answers, but prompts do not move: nothing more is sent",
    "draining": "gets nothing more",
}


def main(args: argparse.Namespace) -> int:
    """Show it once, or until Ctrl-C."""
    config, _ = configured(args)
    if not args.watch:
        status, notice = _read(config)
        if notice:
            say(f"comfyd: {notice}")
        put_json(status) if args.json else put(*parts(status))
        return Exit.OK
    with contextlib.suppress(KeyboardInterrupt):
        if args.json or not is_terminal(sys.stdout):
            _watch_lines(config, json=args.json)
        else:
            _watch_screen(config)
    return Exit.OK


def _read(config: Config) -> tuple[dict[str, Any], str]:
    with opened(config) as source:
        return source.status(), source.notice


def _watch_lines(config: Config, *, json: bool) -> None:
    noticed = ""
    while True:
        status, notice = _read(config)
        if notice and notice != noticed:
            say(f"comfyd: {notice}")
        noticed = notice
        put_json(status) if json else put(*parts(status), "")
        time.sleep(WATCH_S)


def _watch_screen(config: Config) -> None:
    from rich.console import Group
    from rich.live import Live

    made = console(sys.stdout)
    with Live(console=made, auto_refresh=False, screen=True) as live:
        while True:
            status, notice = _read(config)
            shown = [notice] if notice else []
            drawn = [rendered(part, made.width) for part in [*shown, *parts(status)]]
            live.update(Group(*drawn), refresh=True)
            time.sleep(WATCH_S)


def parts(status: dict[str, Any]) -> list[str | Table]:
    """*status*, as ``Snapshot.to_dict`` makes it, for people."""
    made: list[str | Table] = [_head(status)]
    if status["servers"]:
        made.append(_servers(status["servers"]))
    counts = status["jobs"]
    told = [f"{count} {state}" for state, count in counts.items() if count]
    made.append("jobs: " + (", ".join(told) or "none yet"))
    made += [
        f"oldest {state} job: {span(status['oldest_age_s'][state])}"
        for state in ("queued", "submitted")
        if status["oldest_age_s"].get(state)
    ]
    stale = status["stale"]
    if stale:
        made.append(f"stale: {counted(stale, 'job')} silent for too long")
    if status["paused"]:
        made.append("intake is paused: files stay in new/ until comfyd resume")
    if status["waiting"]:
        made.append(status["waiting"])
    at_hand = status["at_hand"]
    if at_hand:
        made.append(_at_hand(at_hand[:AT_HAND_MAX]))
        more = status["more"] + len(at_hand[AT_HAND_MAX:])
        if more:
            made.append(f"and {more} more at hand")
    return made


def _head(status: dict[str, Any]) -> str:
    words = [f"comfyd {status['version']}"]
    if status["uptime_s"] is not None:
        words.append(f"up {span(status['uptime_s'])}")
    if status["free_bytes"] is not None:
        words.append(f"{size(status['free_bytes'])} free")
    return ", ".join(words)


def _servers(servers: list[dict[str, Any]]) -> Table:
    rows = [
        (
            server["name"],
            server["state"],
            server["tracker"],
            f"{server['in_flight']} of {server['window']}",
            "?" if server["queue_remaining"] is None else str(server["queue_remaining"]),
            str(server["stale"]),
            server["version"] or "?",
            server["url"],
            server["reason"] or _WORDS.get(server["state"], ""),
        )
        for server in servers
    ]
    heads = ("SERVER", "STATE", "TRACKER", "OURS", "QUEUE", "STALE", "COMFYUI", "URL", "")
    return Table(heads, rows, spare=("URL", "COMFYUI", "STALE"))


def _at_hand(jobs: list[dict[str, Any]]) -> Table:
    rows = [
        (
            job["job"],
            job["state"],
            job["server"] or "",
            str(job["attempt"]),
            span(job["for_s"]),
            span(job["silent_s"]) + (" stale" if job["stale"] else ""),
        )
        for job in jobs
    ]
    return Table(
        ("JOB", "STATE", "SERVER", "ATTEMPT", "FOR", "SILENT"), rows, spare=("ATTEMPT", "SERVER")
    )
