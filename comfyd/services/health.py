"""Health: is a server there, may it be used, how long is its queue, what cards does it have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import structlog
import trio

from comfyd.comfyui.client import Client
from comfyd.core.facts import Fact, Health, QueueLooked, QueueSeen
from comfyd.core.model import ServerName
from comfyd.core.snapshot import NOT_ASKED
from comfyd.core.wire.stats import SystemStats, version_verdict
from comfyd.errors import ServerError

_log: Any = structlog.get_logger("comfyd.health")


class HealthProbe:
    """Asks one server how it is, every *interval_s* and whenever it is poked.

    Args:
      silent_s: For how long its WebSocket has said nothing. One that says nothing and has prompts
        is asked whether any of them runs.

    Attributes:
      stats: Its last answer; None before the first.
      reason: Why it is not usable, as a sentence; "" if it is.
      interval_s: May be replaced; it holds from the next question on.

    """

    def __init__(
        self,
        name: ServerName,
        client: Client,
        *,
        interval_s: float,
        tell: Callable[[Fact], None],
        on_stats: Callable[[SystemStats], None],
        on_health: Callable[[bool], None],
        silent_s: Callable[[], float],
    ) -> None:
        self._name = name
        self._client = client
        self.interval_s = interval_s
        self._tell = tell
        self._on_stats = on_stats
        self._on_health = on_health
        self._silent_s = silent_s
        self._poked = trio.Event()
        self._warned = ""
        self.stats: SystemStats | None = None
        self.reason = NOT_ASKED

    def poke(self) -> None:
        """Ask soon: something happened there."""
        self._poked.set()

    async def run(self) -> NoReturn:
        while True:
            self._poked = trio.Event()
            await self._ask()
            with trio.move_on_after(self.interval_s):
                await self._poked.wait()

    async def _ask(self) -> None:
        try:
            stats = await self._client.system_stats()
            remaining = await self._client.remaining()
            if remaining and self._silent_s() >= self.interval_s:
                queue = await self._client.queue()
                running, pending = len(queue.running), len(queue.pending)
                self._tell(QueueLooked(server=self._name, running=running, pending=pending))
        except ServerError as error:
            self.reason = str(error)
            self._on_health(False)
            self._tell(Health(server=self._name, ok=False))
            return
        verdict = version_verdict(stats.version)
        said = verdict.refusal or verdict.warning
        if said and said != self._warned:
            _log.warning("server_version", server=self._name, problem=said)
        self._warned = said
        self.stats = stats
        self.reason = verdict.refusal
        self._on_stats(stats)
        self._on_health(True)
        self._tell(QueueSeen(server=self._name, remaining=remaining))
        self._tell(Health(server=self._name, ok=True, refusal=verdict.refusal))
