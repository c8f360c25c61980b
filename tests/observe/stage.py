"""A stage: one daemon and its server under one name in Prometheus, and what is done to them."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

import trio

from comfyd.simulator import Simulator
from tests.endtoend import graphs
from tests.endtoend.daemon import ROOT, Daemon
from tests.observe.monitor import Alert, Monitor

FIRES_S: Final = 500.0
RESOLVES_S: Final = 240.0
STARTS_S: Final = 60.0


@dataclass
class Seen:
    """One alert at Alertmanager: how long after its fault it came, and went after the end of it."""

    alert: str
    stage: str
    fault: str
    fired_s: float | None = None
    resolved_s: float | None = None


@dataclass
class Fault:
    """Something that was done to a stage, and the alerts that tell of it."""

    stage: Stage
    what: str
    began_s: float
    ended_s: float = 0.0
    seen: list[Seen] = field(default_factory=list)

    async def fires(self, *alerts: str) -> None:
        """Until each of *alerts* is active; what does not come is told in the end."""
        async with trio.open_nursery() as nursery:
            for alert in alerts:
                one = Seen(alert, self.stage.name, self.what)
                self.seen.append(one)
                self.stage.seen.append(one)
                nursery.start_soon(self._fires, one)

    async def _fires(self, one: Seen) -> None:
        if await self.stage.until(one.alert, active=True, within_s=FIRES_S):
            one.fired_s = trio.current_time() - self.began_s

    def ends(self) -> None:
        """From now on it is being undone."""
        self.ended_s = trio.current_time()

    async def resolves(self) -> None:
        """Until all that fired are over."""
        async with trio.open_nursery() as nursery:
            for one in self.seen:
                if one.fired_s is not None:
                    nursery.start_soon(self._resolves, one)

    async def _resolves(self, one: Seen) -> None:
        if await self.stage.until(one.alert, active=False, within_s=RESOLVES_S):
            one.resolved_s = trio.current_time() - self.ended_s


@dataclass
class Stage:
    """See the module.

    Attributes:
      seen: What was looked for here.
      broken: Why its scene broke off, as a sentence; "" if it did not.

    """

    name: str
    daemon: Daemon
    simulator: Simulator
    monitor: Monitor
    seen: list[Seen] = field(default_factory=list)
    broken: str = ""
    _numbers: count[int] = field(default_factory=count)

    def begins(self, what: str) -> Fault:
        """A fault is about to be injected: *what*, in words."""
        return Fault(self, what, trio.current_time())

    async def until(self, alert: str, *, active: bool, within_s: float) -> bool:
        """Whether *alert* of this stage became *active* (or ceased to be) in time."""
        wanted = Alert(alert, self.name)
        return await self.monitor.until(
            lambda: (wanted in self.monitor.active) is active, within_s=within_s
        )

    def drop(self, graph: Callable[[int], Any], jobs: int = 1) -> None:
        """Put so many different jobs into new/."""
        for _ in range(jobs):
            number = next(self._numbers)
            self.daemon.drop(f"job-{number}.json", graph(number))

    @asynccontextmanager
    async def feeding(
        self, every_s: float, graph: Callable[[int], Any] = graphs.picture
    ) -> AsyncIterator[None]:
        """A job every now and then, as long as the block lasts."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed, every_s, graph)
            yield
            nursery.cancel_scope.cancel()

    async def _feed(self, every_s: float, graph: Callable[[int], Any]) -> None:
        while True:
            self.drop(graph)
            await trio.sleep(every_s)

    async def comfyd(self, *words: str) -> None:
        """Run a command as a person would."""
        command = [sys.executable, "-m", "comfyd", *words, "-c", str(self.daemon.config)]
        done = await trio.run_process(
            command, cwd=ROOT, capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
        assert done.returncode == 0, (words, done.stdout.decode())

    async def queued(self, jobs: int) -> None:
        """Until so many jobs wait for a server."""
        while (await self.daemon.metrics())['comfyd_jobs{state="queued"}'] < jobs:  # noqa: ASYNC110
            await trio.sleep(0.2)

    async def start_again(self) -> None:
        await self.daemon.start()
        with trio.fail_after(STARTS_S):  # beside all the others, on a busy machine
            while True:
                with contextlib.suppress(trio.TooSlowError):
                    await self.daemon.ready()
                    return

    def make_older(self, by_s: float) -> None:
        """Let every queued job have been claimed *by_s* earlier. The daemon must not run."""
        journal = sqlite3.connect(self.daemon.state / "comfyd.db")
        try:
            with journal:
                changed = journal.execute(
                    "UPDATE jobs SET claimed_at = claimed_at - ? WHERE state = 'queued'", (by_s,)
                )
            assert changed.rowcount, "nothing is queued"
        finally:
            journal.close()
