"""The watchdog: tells systemd that jobs can move on, not only that the loop turns.

A daemon whose loop, dispatcher, journal or tracker hangs looks alive from outside, and works no
more. So systemd is told that all is well only after each of these has just proved it; when it has
heard nothing for ``WatchdogSec``, it starts the daemon again, and the journal carries on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import structlog
import trio

TOKEN_S: Final = 10.0  # to answer in
AGAIN_S: Final = 1.0  # what was only slow is asked again before systemd's patience ends

_log: Any = structlog.get_logger("comfyd.watchdog")


class Watchdog:
    """Says *alive* every *interval_s*, while it is so.

    Args:
      interval_s: Half of what systemd waits for.
      tokens: What must come round, by name: each returns once it has.
      late: Names the tasks that are not where they should be by now.
      alive: Tells systemd.

    """

    def __init__(
        self,
        interval_s: float,
        *,
        tokens: dict[str, Callable[[], Awaitable[object]]],
        late: Callable[[], list[str]],
        alive: Callable[[], None],
    ) -> None:
        self._interval_s = interval_s
        self._tokens = tokens
        self._late = late
        self._alive = alive

    async def run(self) -> NoReturn:
        """Check for ever. Cancellation: at any time."""
        withheld = False
        while True:
            hanging = await self._hanging()
            if hanging:
                if not withheld:
                    _log.error("watchdog_withheld", hanging=", ".join(hanging))
                withheld = True
                await trio.sleep(AGAIN_S)
                continue
            if withheld:
                _log.info("watchdog_resumed")
            withheld = False
            self._alive()
            await trio.sleep(self._interval_s)

    async def _hanging(self) -> list[str]:
        """Who did not answer in time, by name."""
        waiting = set(self._tokens)

        async def ask(name: str) -> None:
            await self._tokens[name]()
            waiting.discard(name)

        with trio.move_on_after(min(TOKEN_S, self._interval_s)):
            async with trio.open_nursery() as nursery:
                for name in self._tokens:
                    nursery.start_soon(ask, name)
        return sorted(waiting) + self._late()
