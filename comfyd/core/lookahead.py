"""The part of the queue that is in memory: the best of it, bounded. The journal has all of it.

Jobs that some server has refused are kept apart: however many wait for the one server that is left
to them, what any other server can run is seen behind them. So are those that were let down, for
some of them may have nothing to hope for.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.fleet import Fleet
from comfyd.core.job import Job
from comfyd.core.model import JobId, Row, ServerName, Shelf, State
from comfyd.core.orders import Expire, Refill

# Enough to keep 16 servers with full windows busy for two rounds between reads of the journal.
LOOK_AHEAD = 512
# The same for one round: all of them may be looked at in vain each time that a server has room.
OTHERS_AHEAD = 128


class _Shelf:
    """Queued jobs of one *kind*, best first, of which *room* are kept in memory."""

    def __init__(self, kind: Shelf) -> None:
        self.kind = kind
        self.room = LOOK_AHEAD if kind is Shelf.FRESH else OTHERS_AHEAD
        self.queued = 0
        self.heap: list[tuple[int, int, JobId]] = []  # entries may be outdated
        self.more = True  # the journal may hold due rows that are not in memory
        self.reading = False

    def fork(self) -> _Shelf:
        new = copy.copy(self)
        new.heap = self.heap[:]
        return new


class LookAhead:
    """Queued jobs in memory, best first, and what is known of those that are not.

    Args:
      jobs: All jobs in memory; the engine's own.

    Attributes:
      picky: Those of them that servers have refused.

    """

    def __init__(self, jobs: Mapping[JobId, Job]) -> None:
        self._jobs = jobs
        self.picky: dict[JobId, None] = {}
        self._hopeful = frozenset[ServerName]()  # each picky job was found to wait for one of these
        self._judged = True  # but for those that came since
        self._shelves = tuple(_Shelf(kind) for kind in Shelf)  # by their number
        self._next_delayed_s = math.inf  # when the first delayed row in the journal comes due
        self._overdue_s = 0.0  # when the first queued row is past its deadline
        self._expiring = False

    def fork(self, jobs: Mapping[JobId, Job]) -> LookAhead:
        """An independent copy, of *jobs*."""
        new = copy.copy(self)
        new._jobs, new.picky = jobs, dict(self.picky)
        new._shelves = tuple(shelf.fork() for shelf in self._shelves)
        return new

    @property
    def queued(self) -> int:
        """How many in memory are queued."""
        return sum(shelf.queued for shelf in self._shelves)

    @property
    def exhausted(self) -> bool:
        """Whether nobody is queued but those who are delayed."""
        return not any(shelf.queued or shelf.more for shelf in self._shelves)

    @property
    def next_s(self) -> float:
        """When the journal has to be read again, if nothing happens before."""
        return min(self._next_delayed_s, self._overdue_s)

    # --- in and out of memory --------------------------------------------------------------------

    def index(self, old: Row | None, row: Row) -> None:
        """Keep in step with a row that changed in memory, or came there."""
        if old is not None and old.state is State.QUEUED:
            self._shelf(old).queued -= 1
            self.picky.pop(row.job, None)
        if row.state is not State.QUEUED:
            return
        shelf = self._shelf(row)
        shelf.queued += 1
        if old is None or old.state is not State.QUEUED or old.shelf is not row.shelf:
            heapq.heappush(shelf.heap, _entry(row))
        if row.verdicts:
            self.picky[row.job] = None
            self._judged = False
        if row.queue_by is not None:
            self._overdue_s = min(self._overdue_s, row.queue_by)

    def leave(self, row: Row) -> None:
        """It is no longer in memory."""
        self.picky.pop(row.job, None)
        if row.state is State.QUEUED:
            self._shelf(row).queued -= 1

    def sleeps(self, row: Row, now_s: float) -> bool:
        """Whether a committed row is delayed: the journal gives it back in time."""
        if row.state is not State.QUEUED or row.not_before <= now_s:
            return False
        self._next_delayed_s = min(self._next_delayed_s, row.not_before)
        return True

    def missed(self, row: Row) -> None:
        """This one is in the journal and has left memory."""
        self._shelf(row).more = True

    def overflow(self, now_s: float) -> list[JobId]:
        """Those that there is no room for."""
        excess = []
        for shelf in self._shelves:
            # A heap keeps entries of jobs that were held or cancelled until it is made anew.
            if shelf.queued > shelf.room or len(shelf.heap) > 2 * shelf.room:
                queue = self._due(shelf, now_s)
                if shelf.kind is Shelf.LET_DOWN:  # in the order in which the journal gives them
                    queue.sort(key=lambda entry: self._jobs[entry[2]].row.not_before)
                shelf.more |= len(queue) > shelf.room
                shelf.heap = sorted(queue[: shelf.room])
                excess += [job_id for _, _, job_id in queue[shelf.room :]]
        return excess

    # --- choosing --------------------------------------------------------------------------------

    def pop(self, now_s: float) -> Job | None:
        """Take out the best that may be sent now; None if there is none."""
        for shelf in self._shelves:
            while shelf.heap and not self._is_due(shelf, shelf.heap[0], now_s):
                heapq.heappop(shelf.heap)
        heaps = [shelf.heap for shelf in self._shelves if shelf.heap]
        best = min(heaps, key=lambda heap: heap[0], default=None)
        return None if best is None else self._jobs[heapq.heappop(best)[2]]

    def by_wait(self, now_s: float) -> list[Job]:
        """Those that may be sent now, first who could have been for longest; they stay."""
        due = (entry for shelf in self._shelves for entry in self._due(shelf, now_s))
        return sorted((self._jobs[job_id] for _, _, job_id in due), key=_waits_since)

    def put_back(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            heapq.heappush(self._shelf(job.row).heap, _entry(job.row))

    def first(self, count: int, now_s: float) -> list[Row]:
        """The best *count* that may be sent now, best first; they stay."""
        due = heapq.merge(*(self._due(shelf, now_s) for shelf in self._shelves))
        return [self._jobs[job_id].row for _, _, job_id in itertools.islice(due, count)]

    def hopeless(self, fleet: Fleet, now_s: float) -> list[Job]:
        """Those that servers have refused, and that no other is left to try."""
        hopeful = fleet.hopeful(now_s)
        judged = self._judged and hopeful == self._hopeful
        self._hopeful, self._judged = hopeful, True
        picky = [] if judged else [self._jobs[job_id] for job_id in self.picky]
        return [job for job in picky if not fleet.elsewhere(job.row, now_s)]

    def _shelf(self, row: Row) -> _Shelf:
        return self._shelves[row.shelf]

    def _due(self, shelf: _Shelf, now_s: float) -> list[tuple[int, int, JobId]]:
        """Its entries that may be sent now, best first, each once."""
        return sorted({entry for entry in shelf.heap if self._is_due(shelf, entry, now_s)})

    def _is_due(self, shelf: _Shelf, entry: tuple[int, int, JobId], now_s: float) -> bool:
        """Whether this entry of its heap is a job that may be sent now."""
        job = self._jobs.get(entry[2])
        if job is None or job.row.state is not State.QUEUED:
            return False
        return self._shelf(job.row) is shelf and job.row.not_before <= now_s

    # --- reading the journal ---------------------------------------------------------------------

    def reads(self, now_s: float) -> Iterator[Refill | Expire]:
        """What to read from the journal now."""
        if now_s >= self._next_delayed_s:
            self._next_delayed_s = math.inf
            for shelf in self._shelves:
                shelf.more = True
        for shelf in self._shelves:
            if shelf.more and shelf.queued < shelf.room // 2 and not shelf.reading:
                shelf.reading = True
                yield Refill(count=shelf.room, shelf=shelf.kind)
        if now_s >= self._overdue_s and not self._expiring:
            self._expiring, self._overdue_s = True, math.inf
            yield Expire(count=LOOK_AHEAD)

    def refilled(self, fact: Candidates) -> None:
        shelf = self._shelves[fact.shelf]
        shelf.reading = False
        shelf.more = len(fact.rows) >= shelf.room
        self._next_delayed_s = math.inf if fact.next_due_s is None else fact.next_due_s

    def expired(self, fact: Overdue, now_s: float) -> None:
        self._expiring = False
        self._overdue_s = math.inf if fact.next_s is None else fact.next_s
        if len(fact.rows) >= LOOK_AHEAD:
            self._overdue_s = now_s


def _waits_since(job: Job) -> tuple[float, int, int]:
    return max(job.row.claimed_at, job.row.not_before), -job.row.priority, job.row.seq


def _entry(row: Row) -> tuple[int, int, JobId]:
    return -row.priority, row.seq, row.job
