"""Rules for the end of a job: collecting, publishing, retiring; and for one that is held."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec

from comfyd.core import letdown
from comfyd.core.facts import (
    Collected,
    CollectFailed,
    HoldAsked,
    PublishConflict,
    PublishDelayed,
    Published,
    ReleaseAsked,
    Retired,
    Uncollected,
)
from comfyd.core.job import (
    Ask,
    Context,
    Doubted,
    GivenUp,
    Job,
    Step,
    durations_s,
)
from comfyd.core.model import (
    Reason,
    Record,
    Row,
    State,
)
from comfyd.core.moves import (
    charge_to,
    collect_as,
    failure,
    hold_as,
    is_abandoned,
    issue,
    move,
    noted,
    plan,
    requeue,
    with_live,
    with_row,
)
from comfyd.core.notes import Note
from comfyd.core.policy import exponential_s


def collected(job: Job, fact: Collected, ctx: Context) -> Step:
    """The result is complete in stage/: its manifest's hash is committed before the rename."""
    staged = fact.staged
    came = job.row.server is not None  # of a job that was never sent there is only its own file
    notes = [noted(job, "fetched", outputs=staged.outputs, bytes=staged.bytes)] if came else []
    return move(job, State.PUBLISHING, ctx, *notes, staged=staged, crashes=0)


def collect_failed(job: Job, fact: CollectFailed, ctx: Context) -> Step:
    """An output that is gone is made again; a server or a disk is waited for."""
    row, policy = job.row, ctx.policy
    assert row.outcome is not None
    on_disk = fact.cause is Uncollected.DISK  # which is no place for telling it again and again
    retry = noted(job, "retry", story=not on_disk, operation="download", reason=fact.cause.value)
    if fact.cause in {Uncollected.MISSING, Uncollected.INVALID} and row.outcome.state is State.DONE:
        return _outputs_lost(job, fact, ctx, retry)
    job = with_live(job, tries=job.live.tries + 1)
    job = _timed(job, ctx, away=on_disk or not ctx.answers)
    if not on_disk:
        if row.outcome.state is not State.DONE and job.live.tries >= policy.completion_attempts:
            # It failed anyway: what it produced is a courtesy, not worth waiting for.
            warning = f"Its outputs could not be fetched: {fact.message}"
            return collect_as(
                job, row.outcome, ctx, retry, record=_bare(row), warnings=(*row.warnings, warning)
            )
        job = with_live(job, unsure_s=ctx.now_s if job.live.unsure_s is None else job.live.unsure_s)
        if row.outcome.state is State.DONE and is_abandoned(job, ctx):
            if ctx.answers:  # but not with what it made: that is no outage
                return _outputs_lost(job, fact, ctx, retry)
            lost = noted(job, "lost", cause="abandoned", charged=0)
            return requeue(job, ctx, retry, lost)
    delay_s = exponential_s(job.live.tries, policy.retry_first_s, policy.retry_max_s, u=ctx.u)
    return Step(plan(job, Ask.COLLECT, ctx.now_s + delay_s), notes=(retry,), urgent=False)


def _timed(job: Job, ctx: Context, *, away: bool) -> Job:
    """What the disk or an outage takes is no part of the time that its server keeps its outputs."""
    since_s, away_s = job.live.unsure_s, job.live.away_s
    if away:
        return job if away_s is not None else with_live(job, away_s=ctx.now_s)
    if since_s is not None and away_s is not None:
        since_s += ctx.now_s - away_s
    return with_live(job, unsure_s=since_s, away_s=None)


def _outputs_lost(job: Job, fact: CollectFailed, ctx: Context, retry: Note) -> Step:
    """What the prompt made cannot be had: it is made again, while the job may have attempts."""
    charged = job.row.charged + 1
    lost = noted(job, "lost", cause="outputs", charged=1)
    if fact.again and charged < job.row.max_attempts:
        job = with_row(job, let_down=letdown.mark(job, fact.message, ctx))
        return requeue(job, ctx, retry, lost, deaths=0, **charge_to(job, charged, ctx))
    invalid = fact.cause is Uncollected.INVALID
    reason = Reason.OUTPUT_INVALID if invalid else Reason.OUTPUT_MISSING
    # What can be had of the rest is put beside the error.
    return collect_as(job, failure(reason, fact.message), ctx, retry, lost, charged=charged)


def at_once(job: Job, fact: Doubted, ctx: Context) -> Step:
    """What it waited for may be there by now: do what was planned for later."""
    if job.live.order is not None:
        return Step(job, urgent=False)
    return replace(issue(job, job.live.look), urgent=False)


def given_up_on(job: Job, fact: GivenUp, ctx: Context) -> Step:
    """Its server is gone, a person says: the next try that fails is the last one."""
    return replace(issue(with_live(job, unsure_s=-math.inf), Ask.COLLECT), urgent=False)


def _bare(row: Row) -> Record | None:
    """The record without its files: nothing left to download."""
    return None if row.record is None else msgspec.structs.replace(row.record, files=())


def published(job: Job, fact: Published, ctx: Context) -> Step:
    """It is visible, or was: the end."""
    row = job.row
    assert row.outcome is not None
    outcome = row.outcome
    row = msgspec.structs.replace(row, published_at=ctx.now_s)
    signal_s = job.live.signal_s
    finished = noted(
        Job(row, job.live),
        "finished",
        outcome=outcome.state.value,
        reason=outcome.reason.value if outcome.reason else None,
        durations_s=durations_s(row),
        latency_s=None if signal_s is None else ctx.now_s - signal_s,
    )
    return move(Job(row, job.live), outcome.state, ctx, finished)


def publish_conflict(job: Job, fact: PublishConflict, ctx: Context) -> Step:
    """Its place in done/ is taken by something else: it fails, visibly."""
    outcome = job.row.outcome
    assert outcome is not None
    if outcome.state is State.DONE:
        return collect_as(job, failure(Reason.CONFLICT, fact.message), ctx, record=_bare(job.row))
    return _publish_again(job, "conflict", ctx)  # failed/ is taken too: a person must look


def publish_delayed(job: Job, fact: PublishDelayed, ctx: Context) -> Step:
    """No space for the rename: later."""
    return _publish_again(job, "disk", ctx)


def _publish_again(job: Job, reason: str, ctx: Context) -> Step:
    job = with_live(job, tries=job.live.tries + 1)
    delay_s = exponential_s(
        job.live.tries, ctx.policy.retry_first_s, ctx.policy.retry_max_s, u=ctx.u
    )
    story = reason != "disk"
    retry = noted(job, "retry", story=story, operation="completion", reason=reason)
    return Step(plan(job, Ask.PUBLISH, ctx.now_s + delay_s), notes=(retry,), urgent=False)


def retired(job: Job, fact: Retired, ctx: Context) -> Step:
    """The claimed file is gone."""
    return Step(with_row(job, retired=True), urgent=False)


def held(job: Job, fact: HoldAsked, ctx: Context) -> Step:
    """Out of the queue until a person releases it; meanwhile no deadline runs."""
    return hold_as(with_row(job, queue_by=None), fact.reason, ctx)


def released(job: Job, fact: ReleaseAsked, ctx: Context) -> Step:
    """Back into the queue, with all the time to start that it had at first."""
    queue_s = job.row.queue_s
    queue_by = None if queue_s is None else ctx.now_s + queue_s
    return move(job, State.QUEUED, ctx, held="", crashes=0, queue_by=queue_by)
