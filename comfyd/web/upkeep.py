"""Upkeep that people ask for: retention at once, and snapshots of the journal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from comfyd.core.present import rfc3339
from comfyd.errors import JournalError
from comfyd.journal.copy import SNAPSHOTS, new_snapshot
from comfyd.journal.thread import Journal
from comfyd.services.retention import Removed, Retention

Verb = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

RESULTS_MAX: Final = 10_000  # named in one answer, which then has about a megabyte

_log: Any = structlog.get_logger("comfyd.upkeep")


class Upkeep:
    """The verbs ``gc`` and ``snapshot``.

    Args:
      state: The folder in which copies are made: the daemon may not be allowed to write where the
        person who asks is.

    """

    def __init__(self, journal: Journal, retention: Retention, state: Path) -> None:
        self._journal = journal
        self._retention = retention
        self._state = state
        self._copying = trio.Lock()

    def verbs(self) -> dict[str, Verb]:
        return {"gc": self._gc, "snapshot": self._snapshot}

    async def _gc(self, request: Mapping[str, Any]) -> dict[str, Any]:
        dry = request.get("dry_run") is True
        report = await self._retention.now(dry=dry, limit=RESULTS_MAX)
        return {
            "results": [_shown(removed) for removed in report.results],
            "more": report.more,
            "bytes": report.bytes,
            "events": report.events,
            "rows": report.rows,
            "problems": report.problems,
        }

    async def _snapshot(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the journal to a new file in ``state/``, for whoever asks to take away."""
        async with self._copying:
            clear(self._state)  # a copy that nobody took
            path = new_snapshot(self._state)
            await self._journal.copy_to(path)
        size = (await trio.Path(path).stat()).st_size
        _log.info("snapshot", bytes=size)
        return {"path": str(path), "bytes": size}


def clear(state: Path) -> None:
    """Remove copies that were left in ``state/``. Blocking, for a moment.

    Raises:
      JournalError: One cannot be removed.

    """
    try:
        for left in state.glob(f"{SNAPSHOTS}*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        msg = f"{state}: a snapshot that was left there cannot be removed: {error.strerror}"
        raise JournalError(msg) from error


def _shown(removed: Removed) -> dict[str, Any]:
    kept = removed.kept
    return {
        "job": kept.job,
        "folder": f"{kept.place.value}/{kept.job}",
        "published": rfc3339(kept.at),
        "bytes": kept.bytes,
        "bound": removed.why,
    }
