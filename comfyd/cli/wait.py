"""``comfyd submit --wait``: until every job has ended, daemon or not."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from comfyd.cli.exits import Exit, Refused, Unreachable
from comfyd.cli.follow import Follower
from comfyd.cli.progress import shown
from comfyd.cli.reading import ANSWER_S, ask_daemon, opened
from comfyd.cli.screen import put_json, say
from comfyd.config import Config
from comfyd.errors import ComfydError
from comfyd.spool.layout import Spool
from comfyd.web.control_client import DaemonUnreachable

TICK_S: Final = 0.25
ASK_AGAIN_S: Final = 5.0  # after a daemon did not answer
ASK_MAX: Final = 10  # stories in one round: each is a query of the journal


def wait(config: Config, jobs: Sequence[str], *, timeout_s: float | None, json: bool) -> int:
    """Show *jobs* on stderr until they have ended; FAILED if one did not end well, or in time."""
    follower = Follower.of(Spool(config.spool), jobs)
    asker = _Asker(config)
    deadline_s = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    with shown(sys.stderr, changes=False) as show:
        while True:
            follower.look()
            if follower.open:
                asker.ask(follower)
            show.update(follower)
            if not follower.open or time.monotonic() >= deadline_s:
                break
            time.sleep(min(TICK_S, max(0.0, deadline_s - time.monotonic())))
    if follower.open:
        say(f"comfyd: {len(follower.open)} of {len(jobs)} jobs have not ended yet; they go on")
    if json:
        put_json({"jobs": [_ended(each.job, follower) for each in follower.jobs.values()]})
    good = all(each.state == "done" for each in follower.jobs.values())
    return Exit.OK if good else Exit.FAILED


def _ended(job: str, follower: Follower) -> dict[str, Any]:
    each = follower.jobs[job]
    return {
        "job": job,
        "known_as": each.known_as,
        "state": each.state,
        "message": each.message,
        "folder": None if each.folder is None else str(each.folder),
    }


class _Asker:
    """Asks the daemon, or its journal, for what the folders do not show."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._next_s = 0.0
        self._told = False

    def ask(self, follower: Follower) -> None:
        if time.monotonic() < self._next_s:
            return
        try:
            follower.hear(ask_daemon(self._config, {"verb": "status"}, ANSWER_S)["status"])
            for each in follower.missing(ASK_MAX):
                request = {"verb": "show", "job": each.job}
                try:
                    follower.told(each, ask_daemon(self._config, request, ANSWER_S)["story"])
                except Refused:
                    continue  # not claimed yet
        except DaemonUnreachable as error:
            self._next_s = time.monotonic() + ASK_AGAIN_S
            self._without_daemon(follower, str(error))

    def _without_daemon(self, follower: Follower, why: str) -> None:
        try:
            with opened(self._config) as source:
                if source.notice and not self._told:
                    self._told = True
                    say("comfyd: no daemon is running; the jobs wait for one")
                follower.hear(source.status())
                for each in follower.missing(ASK_MAX):
                    try:
                        follower.told(each, source.story(each.job))
                    except Refused:
                        continue
        except Unreachable:
            return  # it runs, and this user may only watch the folders
        except ComfydError as error:
            if not self._told:
                self._told = True
                say(f"comfyd: only the folders are watched: {why} {error}")
