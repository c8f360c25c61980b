"""Rules for a prompt that we want gone: deleted or interrupted, and then seen to be so."""

from __future__ import annotations

from dataclasses import replace

from comfyd.core import submitted
from comfyd.core.facts import (
    CancelAsked,
    Fetched,
    Hint,
    LateSuccess,
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
    dropped,
    final_why,
    is_abandoned,
    is_recalled,
    issue,
    may_run,
    move,
    noted,
    plan,
    stop_as,
    with_live,
    with_row,
)
from comfyd.core.policy import has_lasted
from comfyd.core.submitted import (
    absent,
    after,
    audit_note,
    begun,
    certain,
    given_up,
    heard,
    next_audit_s,
    patience_s,
    recorded,
    settled,
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
            return stop_as(job, why, ctx)
        case State.STOPPING:  # for good now, not only to be made again
            if final_why(job.row) is not None and not may_run(job.row):
                return Step(job, urgent=False)
            return issue(with_row(job, why=why), Ask.STOP)
        case State.COLLECTING:  # too late, unless its outputs are lost: it is not made again then
            return Step(with_row(job, why=job.row.why or why))
        case _:  # and what it did to the daemon before is over with it
            return collect_as(job, why, ctx, crashes=0)


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
            if has_lasted(since_s, policy.lost_grace_s, now_s=now_s):
                return after(audit, settled(job, ctx))
            until_s = since_s + policy.lost_grace_s
            return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.PENDING | Presence.RUNNING:
            job = certain(job)
            running = fact.presence is Presence.RUNNING
            late = has_lasted(job.live.since_s, policy.stop_grace_s, now_s=now_s)
            if (may_run(job.row) and running) or (is_recalled(job.row) and late):
                return after(audit, let_go_on(job, ctx, running=running))
            if not late:
                until_s = now_s + policy.stop_retry_s
                return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.UNREADABLE:
            return after(audit, unreadable(job, fact.reason, ctx))
        case Presence.UNKNOWN:
            job = unsure(job, ctx)
            if not is_abandoned(job, ctx):
                until_s = now_s + patience_s(job, ctx)
                return Step(plan(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
    lost = noted(job, "lost", cause="abandoned", charged=0)
    return after(audit, settled(job, ctx, lost, abandoned=given_up(job.row)))


def let_go_on(job: Job, ctx: Context, *, running: bool) -> Step:
    """It was to be taken out of the queue, and runs by now: nothing was lost."""
    done = move(job, State.SUBMITTED, ctx, why=None)
    job = begun(done.job, ctx) if running else done.job
    return replace(done, job=plan(job, Ask.PROBE, next_audit_s(job, ctx)))


def fetched(job: Job, fact: Fetched, ctx: Context) -> Step:
    """A fetch that was under way when stopping began."""
    if fact.record is not None:
        return recorded(job, fact.record, ctx)
    return Step(job, urgent=False)  # STOP is wanted already; it looks for itself


def hinted(job: Job, fact: Hint, ctx: Context) -> Step:
    """A message about a prompt that is being stopped: look again."""
    job = heard(job, fact, ctx)
    if may_run(job.row):
        return (
            let_go_on(job, ctx, running=True) if fact.sign is Sign.ALIVE else issue(job, Ask.STOP)
        )
    if fact.sign is Sign.ALIVE:
        return Step(job, urgent=False)
    return replace(issue(job, Ask.STOP), urgent=False)


def orphaned(job: Job, fact: Orphaned, ctx: Context) -> Step:
    """Nobody hears it any more; it is being looked at anyway."""
    return Step(with_live(job, orphan=fact.cause, alone=fact.alone), urgent=False)


def late_success(job: Job, fact: LateSuccess, ctx: Context) -> Step:
    """An attempt that was given up succeeded: taken, unless the job is wanted gone."""
    if final_why(job.row) is not None and not may_run(job.row):
        return Step(job, notes=(dropped(job, "no_effect"),), urgent=False)
    return submitted.late_success(job, fact, ctx)
