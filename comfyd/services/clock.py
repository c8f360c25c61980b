"""The one clock: monotonic while the process lives, and set to UTC when it started.

Rows, deadlines and results all speak its seconds, so nothing is converted on the way to the
journal, and a wall clock that jumps moves no deadline. A restart sets it anew.
"""

from __future__ import annotations

import time

import trio


class Clock:
    """Attributes: *wall_s* is the UTC time at which it is set; tests give their own."""

    def __init__(self, wall_s: float | None = None) -> None:
        self._offset_s = (time.time() if wall_s is None else wall_s) - trio.current_time()

    def now_s(self) -> float:
        """Seconds since the Unix epoch."""
        return self._offset_s + trio.current_time()

    def trio_s(self, at_s: float) -> float:
        """The same moment on trio's clock, for a deadline."""
        return at_s - self._offset_s
