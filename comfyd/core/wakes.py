"""When each job at hand wants to be told that its time has come."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping

from comfyd.core.job import Job, wake_s
from comfyd.core.model import JobId
from comfyd.core.policy import Policy


class Wakes:
    """A heap with at least one entry for each job that wants to be woken, and that not too late:
    a plan that is put off leaves its entry there, until it is found to come too early.

    Attributes:
      policy: After a change of it, each job is to be kept anew.

    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._due: list[tuple[float, JobId]] = []
        self._earliest: dict[JobId, float] = {}  # entry of each job there; others are outdated

    def fork(self) -> Wakes:
        """An independent copy."""
        new = copy.copy(self)
        new._due, new._earliest = self._due[:], dict(self._earliest)
        return new

    def keep(self, job: Job) -> None:
        """See to it that the job is told when its time has come."""
        wanted_s = wake_s(job, self.policy)
        if wanted_s < self._earliest.get(job.row.job, math.inf):
            self._earliest[job.row.job] = wanted_s
            heapq.heappush(self._due, (wanted_s, job.row.job))

    def first_s(self, jobs: Mapping[JobId, Job]) -> float:
        """When the first of *jobs* wants to be told; entries that come too early are put right."""
        while self._due:
            due_s, job_id = self._due[0]
            job = jobs.get(job_id)
            current = self._earliest.get(job_id) == due_s
            if job is not None and current and wake_s(job, self.policy) == due_s:
                return due_s
            heapq.heappop(self._due)
            if current:
                del self._earliest[job_id]
                if job is not None:
                    self.keep(job)
        return math.inf

    def take(self, now_s: float) -> list[JobId]:
        """Jobs that may want to be told by now; each is to be kept again afterwards."""
        due = []
        while self._due and self._due[0][0] <= now_s:
            due_s, job_id = heapq.heappop(self._due)
            if self._earliest.get(job_id) == due_s:
                del self._earliest[job_id]
                due.append(job_id)
        return due

    def is_due(self, job: Job, now_s: float) -> bool:
        """Whether it is not woken too early."""
        return wake_s(job, self.policy) <= now_s
