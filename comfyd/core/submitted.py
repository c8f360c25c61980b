"""Rules for a prompt that a server has, or had: hints, fetches, audits, and when it is lost."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec

from comfyd.core import completion
from comfyd.core.facts import (
    CheckAsked,
    Fetched,
    FetchResult,
    Hint,
    Presence,
    Probed,
    Sign,
)
from comfyd.core.job import (
    Ask,
    Context,
    Doubted,
    Due,
    Job,
    Orphaned,
    Step,
)
from comfyd.core.model import (
    Reason,
    Record,
    Row,
    Source,
    State,
)
from comfyd.core.moves import (
    charge_to,
    collect_as,
    dropped,
    failure,
    is_abandoned,
    issue,
    noted,
    plan,
    requeue,
    with_live,
    with_row,
)
from comfyd.core.notes import Note
from comfyd.core.policy import exponential_s, linear_s


def first_seen(job: Job, ctx: Context) -> float:
    started: float | None = job.row.started_at
    return ctx.now_s if started is None else started


def heard(job: Job, fact: Hint, ctx: Context) -> Job:
    job = with_live(with_row(job, started_at=first_seen(job, ctx)), heard_s=ctx.now_s)
    if fact.sign is Sign.ENDED and not job.live.ended:
        job = with_live(job, ended=True, signal_s=ctx.now_s)
    return job


def hinted(job: Job, fact: Hint, ctx: Context) -> Step:
    """A message about it: only the end signal makes us fetch at once."""
    again = job.live.ended
    job = heard(job, fact, ctx)
    match fact.sign:
        case Sign.ALIVE:
            return Step(job, urgent=False)
        case Sign.ENDING:
            job = plan(job, Ask.PROBE, ctx.now_s + ctx.policy.ending_grace_s)
            return Step(job, notes=(noted(job, "signal", sign="ending"),), urgent=False)
        case Sign.ENDED:
            if again:
                return Step(job, notes=(dropped(job, "late_hint"),), urgent=False)
            done = issue(with_live(job, tries=0), Ask.FETCH)
            return replace(done, notes=(noted(job, "signal", sign="ended"),), urgent=False)


def fetched(job: Job, fact: Fetched, ctx: Context) -> Step:
    """The history was fetched: the record, or another try, or the auditor's turn."""
    if fact.record is not None:
        return recorded(job, fact.record, ctx)
    if fact.result is FetchResult.UNREADABLE:
        return unreadable(job, fact.reason, ctx)
    tries = job.live.tries + 1
    retry = noted(job, "retry", operation="completion", reason=fact.result.value)
    job = with_live(job, tries=tries)
    if tries < ctx.policy.completion_attempts:
        delay_s = linear_s(tries, ctx.policy.completion_backoff_s, u=ctx.u)
        return Step(plan(job, Ask.FETCH, ctx.now_s + delay_s), notes=(retry,), urgent=False)
    # The auditor owns it from here: its Probe can tell "not yet" from "gone".
    until_s = ctx.now_s + min(ctx.policy.audit_interval_s, ctx.policy.lost_grace_s)
    return Step(plan(job, Ask.PROBE, until_s), notes=(retry,), urgent=False)


def probed(job: Job, fact: Probed, ctx: Context) -> Step:
    """An audit's verdict on a prompt that is submitting or submitted."""
    audit = audit_note(job, fact)
    now_s, policy = ctx.now_s, ctx.policy
    match fact.presence:
        case Presence.FINISHED:
            assert fact.record is not None
            return after(audit, recorded(job, fact.record, ctx))
        case Presence.PENDING | Presence.RUNNING:
            job = certain(job)
            if fact.presence is Presence.RUNNING:
                job = with_row(job, started_at=first_seen(job, ctx))
            job = plan(job, Ask.PROBE, next_audit_s(job, ctx))
            return Step(job, notes=(audit,), urgent=False)
        case Presence.ABSENT | Presence.REFUSED:
            job = absent(job, fact, ctx)
            since_s = job.live.absent_s
            assert since_s is not None
            if now_s - since_s >= policy.lost_grace_s:
                return after(audit, lose(job, ctx))
            return Step(
                plan(job, Ask.PROBE, since_s + policy.lost_grace_s), notes=(audit,), urgent=False
            )
        case Presence.UNREADABLE:
            return after(audit, unreadable(job, fact.reason, ctx))
        case Presence.UNKNOWN:
            job = unsure(job, ctx)
            if is_abandoned(job, ctx):
                return after(audit, abandon(job, ctx))
            return Step(
                plan(job, Ask.PROBE, now_s + patience_s(job, ctx)), notes=(audit,), urgent=False
            )


def audit_note(job: Job, fact: Probed) -> Note:
    return noted(job, "audit", verdict=fact.presence.value, reason=fact.reason)


def after(note: Note, done: Step) -> Step:
    return replace(done, notes=(note, *done.notes))


def certain(job: Job) -> Job:
    return with_live(job, tries=0, absent_s=None, unsure_s=None, unreadable_s=None, refused=False)


def absent(job: Job, fact: Probed, ctx: Context) -> Job:
    since_s = ctx.now_s if job.live.absent_s is None else job.live.absent_s
    refused = job.live.refused or fact.presence is Presence.REFUSED
    return with_live(certain(job), absent_s=since_s, refused=refused)


def unsure(job: Job, ctx: Context) -> Job:
    since_s = ctx.now_s if job.live.unsure_s is None else job.live.unsure_s
    return with_live(job, unsure_s=since_s, tries=job.live.tries + 1)


def patience_s(job: Job, ctx: Context) -> float:
    policy = ctx.policy
    most_s = policy.orphan_interval_s if job.live.orphan else policy.audit_interval_s
    return max(
        policy.orphan_interval_s,
        exponential_s(max(job.live.tries, 1), policy.retry_first_s, most_s, u=ctx.u),
    )


def next_audit_s(job: Job, ctx: Context) -> float:
    """When to look at a prompt that was just seen alive, or just accepted."""
    policy = ctx.policy
    if job.live.orphan or job.live.recovered:
        return ctx.now_s + policy.orphan_interval_s
    submitted_s = ctx.now_s if job.row.submitted_at is None else job.row.submitted_at
    return max(submitted_s + policy.stale_after_s, ctx.now_s + policy.audit_interval_s)


def recorded(job: Job, record: Record, ctx: Context) -> Step:
    """The history record is here: the attempt is over, and its verdict is ours."""
    if completion.is_foreign(job.row, record):
        return unreadable(job, "the record carries another job's mark", ctx)
    source, missed = _source(job)
    row = job.row
    if row.state is State.STOPPING or row.why is not None:
        assert row.why is not None
        outcome = completion.judge_stopped(row, record, row.why)
    else:
        outcome = completion.judge(row, record)
    warnings = row.warnings + record.warnings
    if outcome.state is State.DONE:
        warnings += completion.success_warnings(record)
    ended = noted(job, "ended", source=source.value, missed=missed, end=record.end.value)
    submitted_at = ctx.now_s if row.submitted_at is None else row.submitted_at
    return collect_as(
        job,
        outcome,
        ctx,
        ended,
        record=msgspec.structs.replace(record, warnings=()),
        completion=source,
        warnings=tuple(dict.fromkeys(warnings)),
        submitted_at=submitted_at,
        ended_at=ctx.now_s,
    )


def _source(job: Job) -> tuple[Source, str | None]:
    """How the end was learnt, and why its signal was missed, if it was."""
    if job.live.ended:
        return Source.SIGNAL, None
    if job.live.recovered:
        return Source.RECOVERY, None
    match job.live.orphan:
        case "":
            return Source.AUDIT, "silent"
        case "deaf":
            return Source.AUDIT, "deaf"
        case _:
            return Source.RECONNECT, "disconnected"


def unreadable(job: Job, reason: str, ctx: Context) -> Step:
    """A record that cannot be read: the server's fault if it stays so, and then for good."""
    since_s = job.live.unreadable_s
    if since_s is not None and ctx.now_s - since_s >= ctx.policy.stale_after_s:
        message = (
            f"Server {job.row.server} has a record of this prompt that cannot be read: {reason}."
        )
        return collect_as(job, job.row.why or failure(Reason.SERVER_PROTOCOL, message), ctx)
    job = with_live(
        job, unreadable_s=ctx.now_s if since_s is None else since_s, tries=job.live.tries + 1
    )
    ask = Ask.STOP if job.row.state is State.STOPPING else Ask.PROBE
    retry = noted(job, "retry", operation="completion", reason="unreadable")
    return Step(plan(job, ask, ctx.now_s + patience_s(job, ctx)), notes=(retry,), urgent=False)


def lose(job: Job, ctx: Context) -> Step:
    """Proven absent. Charged is what ran when its server died, or vanished again and again."""
    row = job.row
    died = job.live.refused or bool(job.live.orphan) or job.live.recovered
    cause = "restart" if died else "absent"
    dropped = row.dropped
    if row.started_at is None and row.state is State.SUBMITTING:
        charge = False
    elif died:
        charge = row.started_at is not None or ctx.culprit
    else:
        charge = row.dropped > 0
        dropped += 1
    lost = noted(job, "lost", cause=cause, charged=charge)
    charged = row.charged + charge
    if charged >= row.max_attempts and row.why is None:
        message = (
            f"The server lost this prompt {charged} times (last: {row.server});"
            " its workflow may be what brings the server down."
        )
        return collect_as(
            job, failure(Reason.LOST, message), ctx, lost, charged=charged, dropped=dropped
        )
    return requeue(job, ctx, lost, dropped=dropped, **charge_to(job, charged, ctx))


def given_up(row: Row) -> tuple[tuple[str, str, str], ...]:
    assert row.server is not None
    assert row.origin is not None
    assert row.prompt_id is not None
    return (*row.abandoned, (row.server, row.origin, row.prompt_id))


def abandon(job: Job, ctx: Context) -> Step:
    """Unreachable for too long: written down, so that it can be fenced when the server is back."""
    lost = noted(job, "lost", cause="abandoned", charged=False)
    return requeue(job, ctx, lost, abandoned=given_up(job.row))


def orphaned(job: Job, fact: Orphaned, ctx: Context) -> Step:
    """Nobody hears it any more: look at once, then every orphan_interval."""
    job = with_live(job, orphan=fact.cause)
    if job.row.state is State.SUBMITTING:
        return Step(job, urgent=False)
    return replace(issue(job, Ask.PROBE), urgent=False)


def doubted(job: Job, fact: Doubted, ctx: Context) -> Step:
    """Something else suggests that it has ended: look."""
    if fact.within_s > 0:
        return Step(plan(job, Ask.PROBE, ctx.now_s + fact.within_s), urgent=False)
    return replace(issue(job, Ask.PROBE), urgent=False)


def look(job: Job, fact: Due | CheckAsked, ctx: Context) -> Step:
    """A deadline, or a person, says look: give the planned order."""
    if isinstance(fact, Due) and ctx.now_s < job.live.look_s:
        return Step(job, urgent=False)  # the plan has changed since
    ask = job.live.look if job.live.look_s < math.inf else Ask.PROBE
    if job.row.state is State.STOPPING:
        ask = Ask.STOP
    return replace(issue(job, ask), urgent=False)
