"""When a server that is there takes no submission of a job, or keeps what it made of it.

That may be the server's trouble or the job's. Nobody is charged for a server's, so it counts
against the job only where others were accepted there meanwhile. Until that is known the job waits,
longer each time, and then for its turn behind those that could have been sent before.
"""

from __future__ import annotations

from typing import Final

import msgspec

from comfyd.core import verdicts
from comfyd.core.job import Context, Job, Step
from comfyd.core.model import LetDown, Reason, Row
from comfyd.core.moves import (
    collect_as,
    failure,
    final_why,
    noted,
    requeue,
    try_elsewhere,
    with_row,
)
from comfyd.core.notes import Note
from comfyd.core.policy import exponential_s
from comfyd.core.server import Server

# What an overloaded server or a limiting proxy says to anybody: "later".
BUSY: Final = frozenset({429, 503})


def mark(job: Job, said: str, ctx: Context) -> LetDown:
    """That its server has let *job* down, once more."""
    before = job.row.let_down
    assert job.row.server is not None
    assert job.row.origin is not None
    return LetDown(
        server=job.row.server,
        origin=job.row.origin,
        times=1 if before is None else before.times + 1,
        since_s=ctx.now_s,
        said=said,
    )


def taken(job: Job, ctx: Context) -> Job:
    """A server has its prompt: what counts from now on is how others fare after this."""
    sign = job.row.let_down
    if sign is None:
        return job
    return with_row(job, let_down=msgspec.structs.replace(sign, times=0, since_s=ctx.now_s))


def is_by(row: Row, server: Server) -> bool:
    """Whether that server was the last to let this job down."""
    sign = row.let_down
    return sign is not None and (sign.server, sign.origin) == (server.name, server.origin)


def is_likely(row: Row, server: Server) -> bool:
    """Whether it was let down there, or anywhere while that server takes nothing either."""
    return is_by(row, server) or (row.let_down is not None and server.failures > 0)


def is_its_fault(status: int | None, ctx: Context) -> bool:
    """Whether a failure with that status, now, counts against the job."""
    return status not in BUSY and ctx.takes_others


def turned_away(job: Job, said: str, ctx: Context, *notes: Note, its_fault: bool) -> Step:
    """Its server was reached, and its prompt is not there: back to the queue, or to the end.

    Its identity is not used again: as it waits, nothing in memory tells old answers from new ones.

    Args:
      said: What came instead of success.
      its_fault: That counts against the job.

    """
    row, policy = job.row, ctx.policy
    if final_why(row) is not None:
        return requeue(job, ctx, *notes)
    sign = mark(job, said, ctx)
    delay_s = exponential_s(sign.times, policy.retry_first_s, policy.retry_max_s, u=ctx.u)
    job = with_row(job, let_down=sign, not_before=ctx.now_s + delay_s)
    if not its_fault:
        return requeue(job, ctx, *notes)
    charged = row.charged + 1
    if charged < row.max_attempts:
        charge = noted(job, "charged", charged=1, reason="turned_away")
        return requeue(job, ctx, *notes, charge, charged=charged)
    verdict = failure(
        Reason.REJECTED,
        f"Server {row.server} did not take this job ({said}), and took others meanwhile;"
        " look for the reason in the server's log.",
    )
    if ctx.elsewhere:
        return try_elsewhere(with_row(job, not_before=0.0), verdict, ctx, *notes)
    charge = noted(job, "charged", charged=1, reason="turned_away")
    return collect_as(job, verdicts.final(row, verdict), ctx, *notes, charge, charged=charged)
