"""Rules for a prompt that we want gone: deleted or interrupted, and then seen to be so."""

from __future__ import annotations

from dataclasses import replace

from comfyd.core.facts import (
    CancelAsked,
    Fetched,
    Hint,
    Presence,
    Probed,
    Sign,
)
from comfyd.core.job import (
    Ask,
    Context,
    Job,
    Orphaned,
    Step,
)
from comfyd.core.model import (
    Outcome,
    Reason,
    State,
)
from comfyd.core.moves import (
    collect_as,
    is_abandoned,
    issue,
    move,
    noted,
    plan,
    with_live,
    with_row,
)
from comfyd.core.submitted import (
    absent,
    after,
    audit_note,
    certain,
    given_up,
    heard,
    patience_s,
    recorded,
    unreadable,
    unsure,
)


def stop(job: Job, fact: CancelAsked, ctx: Context) -> Step:
    """A person wants it gone: at once where no prompt is, else by stopping the prompt."""
    why = Outcome(state=State.CANCELLED, reason=Reason.CANCELLED, message="Cancelled.")
    match job.row.state:
        case State.SUBMITTING:  # the POST is out: stop it as soon as its answer is known
            return Step(with_row(job, why=why))
        case State.SUBMITTED:
            return move(job, State.STOPPING, ctx, why=why)
        case _:
            return collect_as(job, why, ctx)


def stopped(job: Job, fact: Probed, ctx: Context) -> Step:
    """What became of a prompt that was deleted or interrupted. 200 proved nothing; this does."""
    audit = audit_note(job, fact)
    why, policy, now_s = job.row.why, ctx.policy, ctx.now_s
    assert why is not None
    match fact.presence:
        case Presence.FINISHED:
            assert fact.record is not None
            return after(audit, recorded(job, fact.record, ctx))
        case Presence.ABSENT | Presence.REFUSED:
            job = absent(job, fact, ctx)
            since_s = job.live.absent_s
            assert since_s is not None
            if now_s - since_s >= policy.lost_grace_s:
                return after(audit, collect_as(job, why, ctx))
            until_s = since_s + policy.lost_grace_s
            return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.PENDING | Presence.RUNNING:
            job = certain(job)
            if now_s - job.live.since_s < policy.stop_grace_s:
                until_s = now_s + policy.stop_retry_s
                return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.UNREADABLE:
            return after(audit, unreadable(job, fact.reason, ctx))
        case Presence.UNKNOWN:
            job = unsure(job, ctx)
            if not is_abandoned(job, ctx):
                until_s = now_s + patience_s(job, ctx)
                return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
    lost = noted(job, "lost", cause="abandoned", charged=False)
    return after(audit, collect_as(job, why, ctx, lost, abandoned=given_up(job.row)))


def fetched(job: Job, fact: Fetched, ctx: Context) -> Step:
    """A fetch that was under way when stopping began."""
    if fact.record is not None:
        return recorded(job, fact.record, ctx)
    return Step(job, urgent=False)  # STOP is wanted already; it looks for itself


def hinted(job: Job, fact: Hint, ctx: Context) -> Step:
    """A message about a prompt that is being stopped: look again."""
    job = heard(job, fact, ctx)
    if fact.sign is Sign.ALIVE:
        return Step(job, urgent=False)
    return replace(issue(job, Ask.STOP), urgent=False)


def orphaned(job: Job, fact: Orphaned, ctx: Context) -> Step:
    """Nobody hears it any more; it is being looked at anyway."""
    return Step(with_live(job, orphan=fact.cause), urgent=False)
