"""The one clock: monotonic while the process lives, and set to UTC when it started.

Rows, deadlines and results all speak its seconds, so nothing is converted on the way to the
journal, and a wall clock that jumps moves no deadline. A restart sets it anew.
"""

from __future__ import annotations

import time

import trio


class Clock:
    """Made inside ``trio.run``; may be read from any thread.

    Args:
      wall_s: The UTC time at which it is set; None for the wall clock's.

    """

    def __init__(self, wall_s: float | None = None) -> None:
        self._clock = trio.lowlevel.current_clock()
        self._offset_s = (time.time() if wall_s is None else wall_s) - self._clock.current_time()

    def now_s(self) -> float:
        """Seconds since the Unix epoch."""
        return self._offset_s + self._clock.current_time()

    def trio_s(self, at_s: float) -> float:
        """The same moment on trio's clock, for a deadline."""
        return at_s - self._offset_s
