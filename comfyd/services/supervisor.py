"""Restart policy, in one place: what fails as servers fail is started again; a bug is not."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import structlog
import trio

from comfyd.core.policy import exponential_s
from comfyd.errors import ServerError

FIRST_S: Final = 0.5
MAX_S: Final = 30.0
# A run this long was a healthy one: the next failure starts from the first delay again.
HEALTHY_S: Final = 60.0

_log = structlog.get_logger("comfyd.supervisor")


async def supervise(
    name: str,
    run: Callable[[], Awaitable[object]],
    *,
    on_restart: Callable[[str, Exception], None],
    draw: Callable[[], float] = random.random,
) -> NoReturn:
    """Call *run* again and again.

    Only ServerError is survived, with capped exponential backoff; returning is a bug.

    Args:
      name: For the log and the ``task`` label.
      on_restart: Told the name and the error before each delay.

    Raises:
      Anything else that *run* raises: it ends the process, and the journal carries on.

    Cancellation: in *run* and in each delay.

    """
    failures = 0
    while True:
        began_s = trio.current_time()
        error: ServerError | None = None
        try:
            await run()
        except* ServerError as group:
            error = _first(group)
        if error is None:
            raise RuntimeError(f"task {name} ended by itself")
        if trio.current_time() - began_s >= HEALTHY_S:
            failures = 0
        failures += 1
        delay_s = exponential_s(failures, FIRST_S, MAX_S, u=draw())
        _log.warning("task_restarts", task=name, error=str(error), delay_s=round(delay_s, 1))
        on_restart(name, error)
        await trio.sleep(delay_s)


def _first(group: BaseExceptionGroup[ServerError]) -> ServerError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
