"""Batches to commit, and a process that commits them until it is killed.

``python -m tests.journal.writer JOURNAL`` prints, after each commit, the number of the batch that
is now promised to be durable.
"""

import random
import sys
from itertools import count
from pathlib import Path
from typing import Any

from comfyd.core.model import JobId, Row, State, prompt_id_of
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Batch, Event, Insert, Update

JOBS_A_BATCH = 3


def jobs_of(number: int) -> list[JobId]:
    return [JobId(f"job-{number}-{index}.01K") for index in range(JOBS_A_BATCH)]


def batch(number: int) -> Batch:
    """Some jobs that arrive and are submitted in one transaction, with their stories."""
    changes: list[Insert | Update] = []
    for index, job in enumerate(jobs_of(number)):
        seq = number * JOBS_A_BATCH + index + 1
        prompt_id = prompt_id_of(job, 1)
        changes.append(Insert(row=Row(job=job, seq=seq, metadata={"pad": "x" * 500})))
        submitted = Row(
            job=job, seq=seq, version=1, state=State.SUBMITTED, attempt=1, prompt_id=prompt_id
        )
        changes.append(Update(row=submitted, expected=0))
    events = tuple(Event(job=job, at=1.0, kind="submitted") for job in jobs_of(number))
    return Batch(changes=tuple(changes), events=events)


def insert(job: str = "fox.01A", seq: int = 1, **fields: Any) -> Batch:
    return Batch(changes=(Insert(row=Row(job=JobId(job), seq=seq, **fields)),))


def big(seq: int) -> Batch:
    """A batch that needs some pages of its own."""
    return insert(f"big.{seq}", seq, metadata={"pad": random.Random(seq).randbytes(6000).hex()})


if __name__ == "__main__":
    store = SqliteStore.open(Path(sys.argv[1]))
    for number in count(store.last_seq() // JOBS_A_BATCH):
        if not all(store.commit(batch(number))):
            sys.exit(f"batch {number} did not apply")
        print(number, flush=True)
