"""Rules for a prompt that a server has, or had: hints, fetches, audits, and when it is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec

from comfyd.core import completion, letdown, verdicts
from comfyd.core.facts import (
    CheckAsked,
    Fetched,
    FetchResult,
    Hint,
    LateSuccess,
    Presence,
    Probed,
    Sign,
)
from comfyd.core.job import (
    Ask,
    Context,
    Doubted,
    Due,
    GivenUp,
    Job,
    Orphaned,
    Recalled,
    Step,
    deadline,
)
from comfyd.core.model import (
    End,
    Outcome,
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
    final_why,
    is_abandoned,
    issue,
    may_run,
    noted,
    plan,
    requeue,
    stop_as,
    try_elsewhere,
    with_live,
    with_row,
)
from comfyd.core.notes import Note
from comfyd.core.policy import exponential_s, has_lasted, linear_s


def begun(job: Job, ctx: Context) -> Job:
    """It runs, or ran: since now, if that was not known; it has met its queue deadline."""
    if job.row.started_at is not None:
        return job
    return with_row(job, started_at=ctx.now_s, queue_by=None)


def ran(job: Job) -> Job:
    """It ran, whether that was heard or not: its wait is over, and why it was to end with that."""
    return with_row(job, why=None if may_run(job.row) else job.row.why, queue_by=None)


def heard(job: Job, fact: Hint, ctx: Context) -> Job:
    job = with_live(begun(job, ctx), heard_s=ctx.now_s, stalling=False)
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
                if job.live.stalling:
                    return after(audit, stalled(job, ctx))
                job = begun(job, ctx)
            job = with_live(job, stalling=False)
            job = plan(job, Ask.PROBE, next_audit_s(job, ctx))
            return Step(job, notes=(audit,), urgent=False)
        case Presence.ABSENT | Presence.REFUSED:
            job = absent(job, fact, ctx)
            since_s = job.live.absent_s
            assert since_s is not None
            if has_lasted(since_s, policy.lost_grace_s, now_s=now_s):
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
    if completion.is_foreign(job.row.job, job.row.attempt, record):
        return unreadable(job, "the record carries another job's mark", ctx)
    source, missed = _source(job)
    job = ran(job)
    row, why = job.row, job.row.why
    ended = noted(job, "ended", source=source.value, missed=missed, end=record.end.value)
    partial = why is not None and why.reason is Reason.PARTIAL
    again = why is not None and why.state is State.QUEUED
    if why is None or (again and not partial and record.end is not End.INTERRUPTED):
        outcome = completion.judge(row, record)
    elif again:
        return after(ended, settled(job, ctx))  # by us: it is to be made again
    else:
        outcome = completion.judge_stopped(row, record, why)
    notes = (ended, *blamed(job, outcome, record, ctx))
    if outcome.state is State.DONE and completion.may_be_partial(row, record):
        if row.unconfirmed < row.max_attempts:  # its next answer will tell; caches make that cheap
            retry = noted(job, "retry", operation="attempt", reason="unconfirmed")
            return requeue(job, ctx, *notes, retry)
        outcome = failure(Reason.PARTIAL, completion.perhaps_partial(row, record))
    if final_why(row) is None and ctx.elsewhere and verdicts.asks_elsewhere(row, outcome):
        return try_elsewhere(job, outcome, ctx, *notes)
    return collect_as(
        job,
        verdicts.final(row, outcome),
        ctx,
        *notes,
        **collected_of(row, outcome, record, source, ctx),
    )


def collected_of(
    row: Row, outcome: Outcome, record: Record, source: Source, ctx: Context
) -> dict[str, Any]:
    """What a row keeps of its prompt's record."""
    warnings = row.warnings + record.warnings + completion.mixed_up(row.job, record)
    if outcome.state is State.DONE:
        warnings += completion.success_warnings(record) + verdicts.warnings(row)
        if record.unrun and row.unconfirmed:
            warnings += (completion.perhaps_partial(row, record),)
    return {
        "why": final_why(row),
        "record": msgspec.structs.replace(record, warnings=()),
        "completion": source,
        "warnings": tuple(dict.fromkeys(warnings)),
        "submitted_at": ctx.now_s if row.submitted_at is None else row.submitted_at,
        "ended_at": ctx.now_s,
    }


def blamed(job: Job, outcome: Outcome, record: Record, ctx: Context) -> tuple[Note, ...]:
    """Whose fault a failure is, as far as can be told: the server's, the job's, or unknown."""
    if outcome.reason is not Reason.EXECUTION_ERROR:
        return ()
    if verdicts.raised_before(job.row):
        return (noted(job, "blamed", story=False, blame="job"),)
    if verdicts.blames_the_card(record.failure):
        return (noted(job, "blamed", story=False, blame="card"),)
    if ctx.elsewhere:
        return (noted(job, "blamed", story=False, blame="server"),)
    return ()


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
    if has_lasted(since_s, ctx.policy.stale_after_s, now_s=ctx.now_s):
        message = (
            f"Server {job.row.server} has a record of this prompt that cannot be read: {reason}."
        )
        outcome = failure(Reason.SERVER_PROTOCOL, message)
        if final_why(job.row) is None and ctx.elsewhere:  # it has ended here, whatever came of it
            return try_elsewhere(job, outcome, ctx)
        outcome = final_why(job.row) or verdicts.final(job.row, outcome)
        return collect_as(job, outcome, ctx, why=final_why(job.row))
    job = with_live(
        job, unreadable_s=ctx.now_s if since_s is None else since_s, tries=job.live.tries + 1
    )
    ask = Ask.STOP if job.row.state is State.STOPPING else Ask.PROBE
    retry = noted(job, "retry", operation="completion", reason="unreadable")
    return Step(plan(job, ask, ctx.now_s + patience_s(job, ctx)), notes=(retry,), urgent=False)


def lose(job: Job, ctx: Context) -> Step:
    """Proven absent. Charged is what brought its server down, or vanished again and again.

    A server that dies with several prompts does not say which of them it was. None is charged, but
    from now on each is sent alone: then the next death is proof, of the one before as well.
    """
    row = job.row
    died = job.live.refused or bool(job.live.orphan) or job.live.recovered
    cause = "restart" if died else "absent"
    dropped, deaths, charged = row.dropped, row.deaths, row.charged
    if row.started_at is None and row.state is State.SUBMITTING:  # it was never known to be there
        lost = noted(job, "lost", cause=cause, charged=0)
        unheard = job.live.unheard
        if unheard is None:
            return requeue(job, ctx, lost)
        its_fault = job.live.its_fault and not died
        return letdown.turned_away(job, unheard, ctx, lost, its_fault=its_fault)
    if died:
        deaths += 1
        if row.deaths or job.live.alone:
            charged = min(max(charged + 1, deaths), row.max_attempts)
    else:
        charged += row.dropped > 0
        dropped += 1
    lost = noted(job, "lost", cause=cause, charged=charged - row.charged)
    changes = {"dropped": dropped, "deaths": deaths}
    if charged >= row.max_attempts and row.why is None:
        message = (
            f"The server lost this prompt {charged} times (last: {row.server});"
            " its workflow may be what brings the server down."
        )
        return collect_as(job, failure(Reason.LOST, message), ctx, lost, charged=charged, **changes)
    return requeue(job, ctx, lost, **changes, **charge_to(job, charged, ctx))


def given_up(row: Row) -> tuple[tuple[str, str, str], ...]:
    assert row.server is not None
    assert row.origin is not None
    assert row.prompt_id is not None
    return (*row.abandoned, (row.server, row.origin, row.prompt_id))


def abandon(job: Job, ctx: Context) -> Step:
    """Unreachable for too long: written down, so that it can be fenced when the server is back."""
    lost = noted(job, "lost", cause="abandoned", charged=0)
    return requeue(job, ctx, lost, abandoned=given_up(job.row))


def orphaned(job: Job, fact: Orphaned, ctx: Context) -> Step:
    """Nobody hears it any more: look at once, then every orphan_interval."""
    job = with_live(job, orphan=fact.cause, alone=fact.alone, stalling=False)
    if job.row.state is State.SUBMITTING:
        return Step(job, urgent=False)
    return replace(issue(job, Ask.PROBE), urgent=False)


def doubted(job: Job, fact: Doubted, ctx: Context) -> Step:
    """Something else suggests that it has ended: look."""
    if fact.within_s > 0:
        return Step(plan(job, Ask.PROBE, ctx.now_s + fact.within_s), urgent=False)
    return replace(issue(job, Ask.PROBE), urgent=False)


def due(job: Job, fact: Due, ctx: Context) -> Step:
    """Its deadline, or its next look, has come."""
    ends = deadline(job, ctx.policy)
    if ends is None or ctx.now_s < ends[0]:
        return look(job, fact, ctx)
    match ends[1]:
        case Reason.STALLED:
            # What it said may still lie unread here, after a pause of the whole machine.
            return replace(issue(with_live(job, stalling=True), Ask.PROBE), urgent=False)
        case Reason.QUEUE_TIMEOUT:
            return stop_as(job, waited_too_long(job.row), ctx)
        case _:
            run_s = ctx.policy.run_timeout_s
            own_s = job.row.timeouts.run_s
            message = (
                f"It ran on {job.row.server} for longer than its run timeout allows"
                f" ({run_s if own_s is None else own_s:g} s)."
            )
            return stop_as(job, failure(Reason.RUN_TIMEOUT, message), ctx)


def waited_too_long(row: Row) -> Outcome:
    message = f"It did not start within its queue timeout ({row.queue_s or 0:g} s)."
    return failure(Reason.QUEUE_TIMEOUT, message)


def stalled(job: Job, ctx: Context) -> Step:
    """It runs and is silent past its stall deadline: end it there, and make it again."""
    silent_s = ctx.now_s - max(job.live.heard_s, job.row.started_at or 0.0)
    message = f"It ran on {job.row.server} without any sign of progress for {silent_s:.0f} s."
    why = Outcome(state=State.QUEUED, reason=Reason.STALLED, message=message)
    return stop_as(job, why, ctx)


def settled(job: Job, ctx: Context, *notes: Note, **changes: Any) -> Step:
    """The prompt is over, as it was to be: what follows from why it was stopped."""
    row, why = job.row, job.row.why
    assert why is not None
    if why.state is not State.QUEUED:
        return collect_as(job, verdicts.final(row, why), ctx, *notes, **changes)
    if why.reason is Reason.PARTIAL:
        verdict = msgspec.structs.replace(why, state=State.FAILED)
        return try_elsewhere(with_row(job, **changes), verdict, ctx, *notes)
    retry = noted(job, "retry", operation="attempt", reason="recalled")
    if why.reason is None:
        return requeue(job, ctx, *notes, retry, **changes)
    charged = row.charged + 1
    charge = noted(job, "charged", charged=1, reason=why.reason.value)
    if charged >= row.max_attempts:
        outcome = failure(why.reason, why.message)
        return collect_as(job, outcome, ctx, *notes, charge, charged=charged, why=None, **changes)
    retry = noted(job, "retry", operation="attempt", reason=why.reason.value)
    return requeue(job, ctx, *notes, charge, retry, **changes, **charge_to(job, charged, ctx))


def recalled(job: Job, fact: Recalled, ctx: Context) -> Step:
    """Fetch it back from the server's queue, unless it runs by now."""
    return stop_as(job, Outcome(state=State.QUEUED, message="It waited there."), ctx)


def given_up_on(job: Job, fact: GivenUp, ctx: Context) -> Step:
    """Its server is gone, a person says: whatever is still to be heard from it comes too late.

    But for a submission that is on its way: nothing is sent anew before that has ended.
    """
    if job.live.order is Ask.SUBMIT:
        return replace(issue(with_live(job, unsure_s=-math.inf), Ask.PROBE), urgent=False)
    job = with_live(job, order=None, want=None, seq=job.live.seq + 1)
    if job.row.state is not State.STOPPING:
        return abandon(job, ctx)
    lost = noted(job, "lost", cause="abandoned", charged=0)
    return settled(job, ctx, lost, abandoned=given_up(job.row))


def late_success(job: Job, fact: LateSuccess, ctx: Context) -> Step:
    """An attempt that was given up succeeded: it is the result, and the present one is given up."""
    row, fence = job.row, fact.fence
    abandoned = row.abandoned if row.prompt_id is None else given_up(row)
    attempt = completion.attempt_of(row, fence.prompt_id)
    if attempt is None or completion.is_foreign(row.job, attempt, fact.record):
        return Step(job, notes=(dropped(job, "no_effect"),), urgent=False)
    if fact.record.unrun and not row.accept_partial:  # how that one was accepted is not known now
        return Step(job, notes=(dropped(job, "no_effect"),), urgent=False)
    outcome = completion.judge(row, fact.record)
    job = with_row(ran(job), server=fence.server, origin=fence.origin, prompt_id=fence.prompt_id)
    source = Source.RECONNECT
    ended = noted(job, "ended", source=source.value, missed="disconnected", end="success")
    kept = collected_of(job.row, outcome, fact.record, source, ctx)
    return collect_as(job, outcome, ctx, ended, abandoned=abandoned, started_at=None, **kept)


def look(job: Job, fact: Due | CheckAsked, ctx: Context) -> Step:
    """A planned look, or a person, says look: give the planned order."""
    if isinstance(fact, Due) and ctx.now_s < job.live.look_s:
        return Step(job, urgent=False)  # the plan has changed since
    ask = job.live.look if job.live.look_s < math.inf else Ask.PROBE
    if job.row.state is State.STOPPING:
        ask = Ask.STOP
    return replace(issue(job, ask), urgent=False)
