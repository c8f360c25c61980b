"""Rules for a job that is being handed to a server: from the intent to certainty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from comfyd.core import letdown, submitted, verdicts
from comfyd.core.facts import (
    Accepted,
    Hint,
    NotSent,
    Presence,
    Probed,
    Rejected,
    SubmitUnknown,
    Unsendable,
)
from comfyd.core.job import (
    Ask,
    Assigned,
    Context,
    Expired,
    Job,
    NoServerLeft,
    Step,
)
from comfyd.core.model import (
    PromptId,
    Reason,
    State,
    prompt_id_of,
)
from comfyd.core.moves import (
    collect_as,
    failure,
    issue,
    move,
    noted,
    plan,
    requeue,
    then,
    try_elsewhere,
    with_live,
    with_row,
)
from comfyd.core.notes import Note
from comfyd.core.submitted import (
    audit_note,
    begun,
    heard,
    next_audit_s,
)


def assigned(job: Job, fact: Assigned, ctx: Context) -> Step:
    """A place was found: a new identity, written down before the first byte is sent."""
    attempt = job.row.attempt + 1
    prompt_id: PromptId = prompt_id_of(job.row.job, attempt)
    # With no connection nobody hears this prompt's events; it still needs a client id, or the
    # server keeps no outputs of cached nodes (ComfyUI pull request 14939). Its own id is free.
    return move(
        with_live(job, orphan="" if fact.client_id else "disconnected"),
        State.SUBMITTING,
        ctx,
        attempt=attempt,
        server=fact.server,
        origin=fact.origin,
        prompt_id=prompt_id,
        client_id=fact.client_id or prompt_id,
    )


def accepted(job: Job, fact: Accepted, ctx: Context) -> Step:
    """The server has it; if only in part, the rest is stopped unless the job accepts that."""
    note = noted(job, "accepted", number=fact.number)
    job = with_row(job, number=fact.number, unconfirmed=0)
    if not fact.node_errors:
        return on_server(job, ctx, note)
    if job.row.accept_partial:
        dropped = ", ".join(sorted(fact.node_errors))
        warning = f"The server dropped some outputs; nodes {dropped} did not pass its checks."
        return on_server(with_row(job, warnings=(*job.row.warnings, warning)), ctx, note)
    job = with_row(job, unconfirmed=1)
    why = job.row.why or failure(
        Reason.PARTIAL,
        "The server would run only part of the workflow: nodes"
        f" {', '.join(sorted(fact.node_errors))} did not pass its checks; correct them.",
        node_errors=fact.node_errors,
    )
    if job.row.why is None and ctx.elsewhere:  # which may have what is missing here
        why = msgspec.structs.replace(why, state=State.QUEUED)
    return move(job, State.STOPPING, ctx, note, why=why, submitted_at=ctx.now_s)


def on_server(job: Job, ctx: Context, *notes: Note) -> Step:
    """The server has the prompt: wait for its end, unless the end was heard already."""
    job = letdown.taken(job, ctx)
    if job.row.why is not None:
        return move(job, State.STOPPING, ctx, *notes, submitted_at=ctx.now_s)
    done = move(job, State.SUBMITTED, ctx, *notes, submitted_at=ctx.now_s)
    if done.job.live.ended:
        return then(done, issue(done.job, Ask.FETCH))
    return replace(done, job=plan(done.job, Ask.PROBE, next_audit_s(done.job, ctx)))


def rejected(job: Job, fact: Rejected, ctx: Context) -> Step:
    """The server refused it for good; another one may have what this one lacks."""
    if job.row.why is not None:
        return collect_as(job, job.row.why, ctx)
    verdict = failure(Reason.REJECTED, fact.message, **fact.detail)
    if ctx.elsewhere:
        return try_elsewhere(job, verdict, ctx)
    return collect_as(job, verdicts.final(job.row, verdict), ctx)


def no_server_left(job: Job, fact: NoServerLeft, ctx: Context) -> Step:
    """All that could be asked have said no: the last word stands."""
    said = job.row.verdicts[-1]
    return collect_as(job, verdicts.last(job.row), ctx, server=said.server, origin=said.origin)


def expired(job: Job, fact: Expired, ctx: Context) -> Step:
    """It waited in our own queue for too long."""
    return collect_as(job, submitted.waited_too_long(job.row), ctx)


def unsendable(job: Job, fact: Unsendable, ctx: Context) -> Step:
    """The claimed file no longer gives anything to send."""
    return collect_as(job, job.row.why or failure(Reason.INVALID_JOB, fact.message), ctx)


def not_sent(job: Job, fact: NotSent, ctx: Context) -> Step:
    """Back to the queue: no prompt is there. At its old place, if nobody was met at all."""
    retry = _retry(job, fact.operation, fact)
    if fact.reached:
        its_fault = letdown.is_its_fault(fact.status, ctx)
        return letdown.turned_away(job, fact.said, ctx, retry, its_fault=its_fault)
    # No prompt of that identity was ever anywhere, so it may be used again.
    return requeue(job, ctx, retry, attempt=job.row.attempt - 1)


def submit_unknown(job: Job, fact: SubmitUnknown, ctx: Context) -> Step:
    """It may be there, now or later: look after the grace, do not send again."""
    retry = _retry(job, "submit", fact)
    grace = Ask.PROBE, ctx.now_s + ctx.policy.lost_grace_s
    # Whose fault it is depends on what was known when it failed, not when that is certain.
    its_fault = letdown.is_its_fault(fact.status, ctx)
    job = with_live(job, unheard=fact.said, its_fault=its_fault)
    return Step(plan(job, *grace), notes=(retry,), urgent=False)


def _retry(job: Job, operation: str, fact: NotSent | SubmitUnknown) -> Note:
    data: dict[str, Any] = {"operation": operation, "reason": fact.reason}
    return noted(job, "retry", **(data | {"said": fact.said} if fact.said else data))


def hinted(job: Job, fact: Hint, ctx: Context) -> Step:
    """A hint before the POST's answer: remembered; acted on if no answer comes."""
    job = heard(job, fact, ctx)
    if job.live.order is None:
        return issue(job, Ask.PROBE)
    return Step(job, urgent=False)


def probed(job: Job, fact: Probed, ctx: Context) -> Step:
    """A look at a prompt whose POST had no answer."""
    if fact.presence in {Presence.PENDING, Presence.RUNNING, Presence.FINISHED}:
        job = with_row(job, unconfirmed=job.row.unconfirmed + 1)
    match fact.presence:
        case Presence.PENDING:
            return on_server(job, ctx, audit_note(job, fact))
        case Presence.RUNNING:
            return on_server(begun(job, ctx), ctx, audit_note(job, fact))
        case _:
            return submitted.probed(job, fact, ctx)
