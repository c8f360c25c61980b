"""What really happened, as the simulator counted it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from comfyd.core.model import JobId, prompt_id_of
from comfyd.simulator import Simulator

ATTEMPTS_SEEN: Final = 100  # far more than a job can have had


def runs_by_job(simulator: Simulator, jobs: Iterable[str]) -> Counter[str]:
    """How often each of *jobs* was executed, over all of its attempts.

    Checks that nothing else was executed there.
    """
    runs: Counter[str] = Counter()
    for job in jobs:
        for attempt in range(1, ATTEMPTS_SEEN):
            runs[job] += simulator.executions[prompt_id_of(JobId(job), attempt)]
    assert runs.total() == simulator.executions.total(), "somebody else's prompt was executed"
    return runs
