"""How long jobs take, and so when those that wait will be ready: for people, nothing decides by it.

The pace of a server is the median of its last runs; a forecast lets every server that takes jobs
work through its prompts one after the other, and gives the queue to whichever is ready first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

RUNS: Final = 15
"""Runs of each server that count: enough to outlive an odd one, few enough to be recent."""
SHORTEST_S: Final = 0.05  # sending and fetching take as much, even if all was in the server's cache


class Pace:
    """How long successful runs took lately, by server."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[float]] = {}

    def ran(self, server: str, run_s: float) -> None:
        """A job succeeded on *server* after running for *run_s* seconds."""
        self._runs.setdefault(server, deque(maxlen=RUNS)).append(run_s)

    def run_s(self, server: str) -> float | None:
        """Seconds that a job takes on *server*; None while nothing has run there."""
        return _middle(self._runs.get(server, ()))

    def expected_s(self, server: str) -> float | None:
        """The same; as elsewhere while nothing has run there, None while nothing has run at all."""
        everywhere = [run_s for runs in self._runs.values() for run_s in runs]
        return self.run_s(server) or _middle(everywhere)


def _middle(runs: Collection[float]) -> float | None:
    return max(SHORTEST_S, median(runs)) if runs else None


@dataclass(frozen=True, slots=True)
class Lane:
    """One server that takes jobs.

    Attributes:
      run_s: Its pace.
      ran_s: How long each prompt of ours there has run, in the order in which they run.
      others: Prompts of other people there.

    """

    run_s: float
    ran_s: tuple[float, ...] = ()
    others: int = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until something is ready.

    Attributes:
      there: For each lane, each of its prompts.
      queued: The first jobs of the queue; empty if no server takes any.
      all_s: Everything; None if no server takes any.

    """

    there: tuple[tuple[float, ...], ...] = ()
    queued: tuple[float, ...] = ()
    all_s: float | None = None


def forecast(lanes: Sequence[Lane], *, waiting: int, first: int) -> Forecast:
    """When things will be ready.

    Args:
      waiting: Jobs in the queue, 0 or more.
      first: Of those, tell of so many.

    """
    if not lanes:
        return Forecast()
    there = tuple(tuple(_ends(lane)) for lane in lanes)
    free_s = [
        ends[-1] if ends else lane.others * lane.run_s
        for lane, ends in zip(lanes, there, strict=True)
    ]
    # A heap of (when a job given to it next would be ready, which lane).
    heap = [(free_s[i] + lane.run_s, i) for i, lane in enumerate(lanes)]
    heapq.heapify(heap)
    queued = []
    for _ in range(min(waiting, first)):
        ready_s, i = heap[0]
        queued.append(ready_s)
        heapq.heapreplace(heap, (ready_s + lanes[i].run_s, i))
    # Together they end one job every 1 / per_s seconds: when the last one, near enough.
    per_s = sum(1 / lane.run_s for lane in lanes)
    ahead = sum(free / lane.run_s for free, lane in zip(free_s, lanes, strict=True))
    last_s = (waiting + ahead) / per_s if waiting else 0.0
    return Forecast(there, tuple(queued), max([last_s, *free_s, *queued]))


def _ends(lane: Lane) -> list[float]:
    ends: list[float] = []
    at_s = lane.others * lane.run_s
    for ran_s in lane.ran_s:
        # One that takes longer than usual may take a good deal longer: a quarter more, so far.
        at_s += max(lane.run_s - ran_s, ran_s / 4)
        ends.append(at_s)
    return ends
