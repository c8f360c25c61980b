"""The commands that change something: cancel, retry, hold, release; pause, resume, drain, forget;
reload.

The running daemon does it, and says what really happened; here it is asked in portions, so that no
request is long and what happened to a hundred thousand jobs is told as it happens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from comfyd.cli.exits import Exit, Unreachable
from comfyd.cli.place import configured
from comfyd.cli.reading import ANSWER_S, ask_at, ask_daemon
from comfyd.cli.screen import counted, put, put_json, say
from comfyd.config import Config, find_config, state_of
from comfyd.errors import UsageError
from comfyd.web.control_client import DaemonUnreachable

WISH_S: Final = 60.0  # the daemon itself waits 25 s for a prompt to be seen gone
PORTION: Final = 100  # jobs in one request: a line every second or so


def jobs(args: argparse.Namespace) -> int:
    """``comfyd cancel``, ``retry``, ``hold`` and ``release``."""
    chosen = args.state is not None or args.match is not None
    if bool(args.jobs) == chosen:
        problem = "name jobs or choose them with --state or --match, not both"
        raise UsageError(problem if chosen else f"say which jobs: {problem}")
    config, _ = configured(args)
    request = {"verb": args.command, "state": args.state}
    outcomes: Counter[str] = Counter()
    good = True
    try:
        for portion in _chosen(config, args) if chosen else _portions(iter(args.jobs)):
            for result in _ask(config, {**request, "jobs": portion}, WISH_S)["results"]:
                outcomes[result["outcome"]] += 1
                good &= result["ok"]
                put_json(result) if args.json else put(f"{result['job']}  {result['what']}")
    finally:  # also when Ctrl-C ends it
        if outcomes.total() > 1:
            told = [f"{count} {word.replace('_', ' ')}" for word, count in outcomes.items()]
            say(f"comfyd: {counted(outcomes.total(), 'job')}: {', '.join(told)}")
    if not outcomes:
        spared = ", apart from those retried before" if args.command == "retry" else ""
        say(f"comfyd: no job to {args.command} was found{spared}")
    return Exit.OK if good else Exit.FAILED


def servers(args: argparse.Namespace) -> int:
    """``comfyd pause``, ``resume``, ``drain`` and ``forget``."""
    config, _ = configured(args)
    name = getattr(args, "server", None)
    name = name[0] if isinstance(name, list) else name
    result = _ask(config, {"verb": args.command, "server": name}, WISH_S)["result"]
    if args.json:
        put_json(result)
    elif result["ok"]:
        put(result["what"])
    else:
        say(f"comfyd: {result['what']}")
    return Exit.OK if result["ok"] else Exit.FAILED


def reload(args: argparse.Namespace) -> int:
    """``comfyd reload``. The file may be a bad one: what is wrong with it, the daemon will say."""
    path = find_config(args.config, os.environ)
    state = Path.cwd() / "state" if path is None else state_of(path)
    try:
        result = ask_at(state, {"verb": "reload"}, WISH_S)["result"]
    except DaemonUnreachable as error:
        if not error.absent:
            hint = "" if error.sent else " To reload needs the running daemon."
            raise Unreachable(f"{error}{hint}") from None
        moved = "if the file names another state folder than at its start, that needs a restart"
        if not _hung_up(os.environ.get("MAINPID", "")):  # systemd says so to ExecReload=
            raise Unreachable(f"{error} To reload needs the running daemon; {moved}.") from None
        say(f"comfyd: nobody answers in {state}: {moved}")
        return Exit.CONFIG
    if args.json:
        put_json(result)
    elif result["ok"]:
        put(result["what"])
    else:
        for problem in result["problems"]:
            say(f"comfyd: {problem}")
        say(f"comfyd: {result['what']}")
    return Exit.OK if result["ok"] else Exit.CONFIG


def _hung_up(main_pid: str) -> bool:
    """Tell that process to reload; if it must not, it says so in its log and its metrics.

    Returns:
      Whether it could be told: False too if it is gone, or not ours, or none was named.

    """
    if not main_pid.isdecimal() or int(main_pid) == 0:  # 0: our own process group
        return False
    try:
        os.kill(int(main_pid), signal.SIGHUP)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _chosen(config: Config, args: argparse.Namespace) -> Iterator[list[str]]:
    """Portions of the jobs that --state and --match choose, newest first: the last in line are not
    being sent while we are on our way to them."""
    request = {"verb": "select", "for": args.command, "state": args.state, "match": args.match}
    after = None
    while True:
        page = _ask(config, {**request, "after": after}, ANSWER_S)
        yield from _portions(iter(page["jobs"]))
        after = page["after"]
        if after is None:
            return


def _portions(texts: Iterator[str]) -> Iterator[list[str]]:
    while portion := list(islice(texts, PORTION)):
        yield portion


def _ask(config: Config, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    with _told_that_it_takes_a_daemon(request):
        return ask_daemon(config, request, timeout_s)


@contextlib.contextmanager
def _told_that_it_takes_a_daemon(request: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except DaemonUnreachable as error:
        hint = "" if error.sent else f" To {request['verb']} needs the running daemon."
        raise Unreachable(f"{error}{hint}") from None
