"""Taking up a new configuration while everything runs: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import structlog
import trio

from comfyd import sdnotify
from comfyd.config import Config
from comfyd.core.facts import Reconfigured
from comfyd.errors import ConfigError
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.dispatcher import Dispatcher
from comfyd.services.inbox import Inbox
from comfyd.services.links import Links
from comfyd.services.settings import Settings, policy_of, servers_of

# What is opened once, at the start.
NEED_A_RESTART: Final = ("spool", "state", "metrics.listen")
WRITTEN_S: Final = 25.0  # for the journal to know which servers there are; a full disk takes longer

_log: Any = structlog.get_logger("comfyd.reload")


class Reload:
    """Reads the configuration again, and lets it hold.

    Args:
      reread: Reads it; blocking. The new configuration, or None and all its problems.
      hand_over: Hands new values to what keeps some of its own. Does not wait. Raises ConfigError
        if one cannot be used; then nothing may have changed.

    """

    def __init__(
        self,
        settings: Settings,
        links: Links,
        inbox: Inbox,
        dispatcher: Dispatcher,
        metrics: Metrics,
        clock: Clock,
        *,
        reread: Callable[[], tuple[Config | None, list[ConfigError]]],
        hand_over: Callable[[Config], None],
    ) -> None:
        self._settings = settings
        self._links = links
        self._inbox = inbox
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._clock = clock
        self._reread = reread
        self._hand_over = hand_over
        self._one_at_a_time = trio.Lock()

    async def verb(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``reload``, for the control socket."""
        problems = await self.reload()
        servers = ", ".join(server.name for server in self._settings.now.servers)
        what = "Nothing was changed." if problems else f"Reloaded; servers: {servers}."
        return {"result": {"ok": not problems, "what": what, "problems": problems}}

    async def reload(self) -> list[str]:
        """Read the configuration and let it hold, or keep the old one.

        Returns:
          Its problems, each with its place; empty if it holds.

        Cancellation: while reading, nothing is changed; later, it holds all the same.

        """
        async with self._one_at_a_time:
            sdnotify.notify(RELOADING="1")
            try:
                problems = await self._reloaded()
            finally:
                sdnotify.notify(READY="1")
            self._metrics.config_read(ok=not problems, at=self._clock.now_s())
            for problem in problems:
                _log.error("reload_refused", problem=problem)
            return problems

    async def _reloaded(self) -> list[str]:
        # A file on a file system that hangs must not keep the daemon from stopping.
        new, problems = await trio.to_thread.run_sync(self._reread, abandon_on_cancel=True)
        if new is None:
            return [str(problem) for problem in problems]
        changed = list(changes(self._settings.now, new))
        if fixed := [key for key in changed if key in NEED_A_RESTART]:
            return [f"{key}: a change of it needs a restart" for key in fixed]
        try:
            prepared = self._links.prepare(new)
            self._hand_over(new)
        except ConfigError as error:
            return [str(error)]
        # From here to the inbox without a wait: it holds everywhere at once.
        self._settings.now = new
        self._links.take_up(new, prepared)
        fact = Reconfigured(servers=servers_of(new), policy=policy_of(new))
        number = self._inbox.leave(fact)
        _log.info("reloaded", changed=changed, servers=len(new.servers))
        with trio.move_on_after(WRITTEN_S):
            await self._dispatcher.settled(number)
        return []


def changes(old: Config, new: Config) -> Iterator[str]:
    """The settings that differ, dotted; of servers only that they do."""
    for part in fields(old):
        was, now = getattr(old, part.name), getattr(new, part.name)
        if not is_dataclass(was):
            if was != now:
                yield part.name
            continue
        for each in fields(was):
            if getattr(was, each.name) != getattr(now, each.name):
                yield f"{part.name}.{each.name.removesuffix('_s')}"
