"""Idempotency keys: whether a drop is a job of its own, or one that is known already."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from comfyd.core.model import JobId, Outcome, Reason, Row, State


@dataclass(frozen=True, slots=True)
class Absorbed:
    """A drop that is another job already: *row* never becomes a job, its id leads to *into*."""

    row: Row
    into: JobId


def judge(row: Row, holder: Row | None) -> Row | Absorbed:
    """What becomes of a drop with the key of *holder*, the newest job that has it.

    Same bytes: it is absorbed, whatever became of the holder. Other bytes: it fails, and the key
    stays with the holder. A retry takes the key over, so it is a job of its own.

    Returns:
      The row to begin with, or what it is absorbed by. Asked again, the same: of one's own row too.

    """
    own = row.key is None or row.retry_of is not None or holder is None or holder.job == row.job
    if own:
        return row
    assert holder is not None
    if holder.sha256 == row.sha256:
        return Absorbed(row, holder.job)
    message = (
        f"Job {holder.job} has the same key and other content; give this one a key of its own."
    )
    return msgspec.structs.replace(
        row,
        state=State.COLLECTING,
        key=None,
        queue_by=None,
        outcome=Outcome(
            state=State.FAILED,
            reason=Reason.CONFLICT,
            message=message,
            detail={"key": row.key, "job": holder.job},
        ),
    )


def holder_told(row: Row) -> str:
    """The job that *row* failed for, because it has the key of both; "" if it did not."""
    outcome = row.outcome
    if outcome is None or outcome.reason is not Reason.CONFLICT or "key" not in outcome.detail:
        return ""  # a conflict of folders names no key
    return str(outcome.detail["job"])
