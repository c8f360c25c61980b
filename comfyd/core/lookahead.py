"""The part of the queue that is in memory: the best of it, bounded. The journal has all of it."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.fleet import Fleet
from comfyd.core.job import Job
from comfyd.core.model import JobId, Row, ServerName, State
from comfyd.core.orders import Expire, Refill

# Enough to keep 16 servers with full windows busy for two rounds between reads of the journal.
LOOK_AHEAD = 512


class LookAhead:
    """Queued jobs in memory, best first, and what is known of those that are not.

    Args:
      jobs: All jobs in memory; the engine's own.

    Attributes:
      queued: How many of them are queued.
      picky: Those of them that servers have refused.

    """

    def __init__(self, jobs: Mapping[JobId, Job]) -> None:
        self._jobs = jobs
        self.queued = 0
        self.picky: dict[JobId, None] = {}
        self._hopeful = frozenset[ServerName]()  # each picky job was found to wait for one of these
        self._judged = True  # but for those that came since
        self._heap: list[tuple[int, int, JobId]] = []  # entries may be outdated
        self._more = True  # the journal may hold due rows that are not in memory
        self._next_delayed_s = math.inf  # when the first delayed row in the journal comes due
        self._overdue_s = 0.0  # when the first queued row is past its deadline
        self._refilling = self._expiring = False

    def fork(self, jobs: Mapping[JobId, Job]) -> LookAhead:
        """An independent copy, of *jobs*."""
        new = copy.copy(self)
        new._jobs, new.picky, new._heap = jobs, dict(self.picky), self._heap[:]
        return new

    @property
    def exhausted(self) -> bool:
        """Whether nobody is queued but those who are delayed."""
        return not self.queued and not self._more

    @property
    def next_s(self) -> float:
        """When the journal has to be read again, if nothing happens before."""
        return min(self._next_delayed_s, self._overdue_s)

    # --- in and out of memory --------------------------------------------------------------------

    def index(self, old: Row | None, row: Row) -> None:
        """Keep in step with a row that changed in memory, or came there."""
        if old is not None and old.state is State.QUEUED:
            self.queued -= 1
            self.picky.pop(row.job, None)
        if row.state is not State.QUEUED:
            return
        self.queued += 1
        if old is None or old.state is not State.QUEUED:
            heapq.heappush(self._heap, (-row.priority, row.seq, row.job))
        if row.verdicts:
            self.picky[row.job] = None
            self._judged = False
        if row.queue_by is not None:
            self._overdue_s = min(self._overdue_s, row.queue_by)

    def leave(self, row: Row) -> None:
        """It is no longer in memory."""
        self.picky.pop(row.job, None)
        if row.state is State.QUEUED:
            self.queued -= 1

    def sleeps(self, row: Row, now_s: float) -> bool:
        """Whether a committed row is delayed: the journal gives it back in time."""
        if row.state is not State.QUEUED or row.not_before <= now_s:
            return False
        self._next_delayed_s = min(self._next_delayed_s, row.not_before)
        return True

    def missed(self) -> None:
        """One that is in the journal has left memory."""
        self._more = True

    def overflow(self, now_s: float) -> list[JobId]:
        """Those that there is no room for."""
        # The heap keeps entries of jobs that were held or cancelled until it is made anew.
        if self.queued <= LOOK_AHEAD and len(self._heap) <= 2 * LOOK_AHEAD:
            return []
        queue = sorted({entry for entry in self._heap if self._is_due(entry, now_s)})
        self._more |= len(queue) > LOOK_AHEAD
        self._heap = queue[:LOOK_AHEAD]
        return [job_id for _, _, job_id in queue[LOOK_AHEAD:]]

    # --- choosing --------------------------------------------------------------------------------

    def pop(self, now_s: float) -> Job | None:
        """Take out the best that may be sent now; None if there is none."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._is_due(entry, now_s):
                return self._jobs[entry[2]]
        return None

    def put_back(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            heapq.heappush(self._heap, (-job.row.priority, job.row.seq, job.row.job))

    def first(self, count: int, now_s: float) -> list[Row]:
        """The best *count* that may be sent now, best first; they stay."""
        due = {entry for entry in self._heap if self._is_due(entry, now_s)}
        return [self._jobs[job_id].row for _, _, job_id in heapq.nsmallest(count, due)]

    def hopeless(self, fleet: Fleet, now_s: float) -> list[Job]:
        """Those that servers have refused, and that no other is left to try."""
        hopeful = fleet.hopeful(now_s)
        judged = self._judged and hopeful == self._hopeful
        self._hopeful, self._judged = hopeful, True
        picky = [] if judged else [self._jobs[job_id] for job_id in self.picky]
        return [job for job in picky if not fleet.elsewhere(job.row, now_s)]

    def _is_due(self, entry: tuple[int, int, JobId], now_s: float) -> bool:
        """Whether this entry of the heap is a job that may be sent now."""
        job = self._jobs.get(entry[2])
        return job is not None and job.row.state is State.QUEUED and job.row.not_before <= now_s

    # --- reading the journal ---------------------------------------------------------------------

    def reads(self, now_s: float) -> Iterator[Refill | Expire]:
        """What to read from the journal now."""
        if now_s >= self._next_delayed_s:
            self._more, self._next_delayed_s = True, math.inf
        if self._more and self.queued < LOOK_AHEAD // 2 and not self._refilling:
            self._refilling = True
            yield Refill(count=LOOK_AHEAD)
        if now_s >= self._overdue_s and not self._expiring:
            self._expiring, self._overdue_s = True, math.inf
            yield Expire(count=LOOK_AHEAD)

    def refilled(self, fact: Candidates) -> None:
        self._refilling = False
        self._more = len(fact.rows) >= LOOK_AHEAD
        self._next_delayed_s = math.inf if fact.next_due_s is None else fact.next_due_s

    def expired(self, fact: Overdue, now_s: float) -> None:
        self._expiring = False
        self._overdue_s = math.inf if fact.next_s is None else fact.next_s
        if len(fact.rows) >= LOOK_AHEAD:
            self._overdue_s = now_s
