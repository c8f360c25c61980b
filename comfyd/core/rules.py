"""What must hold of every row, always: asserted in production, where each has a name.

The rules about files and servers (a claimed file outlives its job, one no-clobber rename, no POST
before its commit) cannot be seen in a row; the shells assert those, and the explorer all of them.
"""

from __future__ import annotations

import math

import msgspec

from comfyd.core.job import Job
from comfyd.core.model import Row, State, prompt_id_of
from comfyd.errors import ProtocolViolation

_PLACED = frozenset({State.SUBMITTING, State.SUBMITTED, State.STOPPING})


def check(before: Row | None, job: Job) -> None:
    """Raises ProtocolViolation, with the rule's name, if *job* breaks one."""
    row, live = job.row, job.live
    broken = None
    if before is not None and before.state.final and _frozen(before) != _frozen(row):
        broken = "final_row_changed"
    elif before is not None and row.attempt > before.attempt and before.state is not State.QUEUED:
        broken = "attempt_without_proof"
    elif row.state in _PLACED and row.prompt_id != prompt_id_of(row.job, row.attempt):
        broken = "foreign_identity"
    elif row.state in {State.QUEUED, State.HELD} and row.prompt_id is not None:
        broken = "queued_with_prompt"
    elif row.state in {State.COLLECTING, State.PUBLISHING} and row.outcome is None:
        broken = "no_outcome"
    elif (row.state is State.PUBLISHING or row.state.final) and row.staged is None:
        broken = "published_without_stage"
    elif row.charged > row.attempt or row.charged > row.max_attempts:
        broken = "overcharged"
    elif _is_stuck(job) and not row.retired:
        broken = "stuck"
    if broken is not None:
        raise ProtocolViolation(f"rule {broken}: job {row.job} in {row.state.value} ({live.order})")


def _is_stuck(job: Job) -> bool:
    """Nothing outstanding, nothing planned, and not waiting for a place or a person."""
    waits = job.row.state in {State.QUEUED, State.HELD}
    return not waits and job.live.order is None and job.live.look_s == math.inf


def _frozen(row: Row) -> Row:
    return msgspec.structs.replace(row, retired=False, version=0)
