"""Waiting for what another process does: there is nothing to wait for but a look, again and again.

Nothing here ends by itself: it stands inside the deadline of a test.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from tests.endtoend.daemon import Daemon

LOOK_S = 0.02


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - see the module
        await trio.sleep(LOOK_S)


async def counted(daemon: Daemon, sample: str, count: float) -> dict[str, float]:
    """The metrics, once *sample* is *count* or more. A result is seen before it is counted."""
    while True:
        metrics = await daemon.metrics()
        if metrics[sample] >= count:
            return metrics
        await trio.sleep(LOOK_S)
