"""One job's life: the state table and ``step``, the only code that decides about a job.

``step(job, fact, ctx) -> Step`` is pure. Which (state, fact) pairs exist is `TABLE`; a hint or a
wish without a row is ignored and counted, an answer without a row is a bug. A job's row is what the
journal holds; its `Live` part is forgotten in a crash and made anew by `load`.

The order of things: a changed row is committed first, then the orders it led to are released. So
whatever a row says before an action is at least an intention, and after it at least a doubt.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import msgspec

from comfyd.core import completion, orders
from comfyd.core.facts import (
    Accepted,
    Answer,
    CancelAsked,
    CheckAsked,
    Collected,
    CollectFailed,
    Fetched,
    FetchResult,
    Hint,
    HoldAsked,
    NotSent,
    Presence,
    Probed,
    PublishConflict,
    PublishDelayed,
    Published,
    Rejected,
    ReleaseAsked,
    Retired,
    Sign,
    SubmitUnknown,
    Token,
    Uncollected,
    Unsendable,
)
from comfyd.core.model import (
    FINAL,
    IN_FLIGHT,
    JobId,
    Outcome,
    PromptId,
    Reason,
    Record,
    Row,
    ServerName,
    Source,
    State,
    prompt_id_of,
)
from comfyd.core.notes import Kind, Note
from comfyd.core.policy import Policy, exponential_s, linear_s
from comfyd.errors import ProtocolViolation


class Ask(enum.IntEnum):
    """The orders a job can have outstanding; of two that are wanted, the higher one wins."""

    PROBE = 1
    FETCH = 2
    STOP = 3
    SUBMIT = 4
    COLLECT = 5
    PUBLISH = 6
    RETIRE = 7


_ORDER_OF: Final[Mapping[Ask, type[orders.JobOrder]]] = MappingProxyType(
    {
        Ask.PROBE: orders.Probe,
        Ask.FETCH: orders.Fetch,
        Ask.STOP: orders.Stop,
        Ask.SUBMIT: orders.Submit,
        Ask.COLLECT: orders.Collect,
        Ask.PUBLISH: orders.Publish,
        Ask.RETIRE: orders.Retire,
    }
)

# What each state orders when it is entered; the others wait for a fact.
ON_ENTRY: Final[Mapping[State, Ask]] = MappingProxyType(
    {
        State.SUBMITTING: Ask.SUBMIT,
        State.STOPPING: Ask.STOP,
        State.COLLECTING: Ask.COLLECT,
        State.PUBLISHING: Ask.PUBLISH,
        State.DONE: Ask.RETIRE,
        State.FAILED: Ask.RETIRE,
        State.CANCELLED: Ask.RETIRE,
    }
)

# And when it is found in the journal at start. A submission may still be on its way (a server goes
# on with a request whose client is gone), so that one is looked at only after lost_grace.
AT_LOAD: Final[Mapping[State, Ask]] = MappingProxyType(
    {**ON_ENTRY, State.SUBMITTING: Ask.PROBE, State.SUBMITTED: Ask.PROBE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """The part of a job that a crash forgets.

    Attributes:
      seq: Number of the last order given.
      order: The outstanding order; there is at most one.
      want: The order to give as soon as the outstanding one is answered.
      look, look_s: The order to give next, and when, if nothing happens before.
      since_s: When the present state was entered (or loaded).
      heard_s: The last sign of life of the prompt.
      ended, signal_s: The end signal came, and when.
      tries: Failures in a row of what is being tried.
      absent_s, unsure_s, unreadable_s: Since when each answer has been given without a break.
      refused: The server refused connections since *absent_s*: its memory is gone.
      orphan: Why no live connection of ours hears this prompt: disconnected, deaf, or "".
      recovered: Found in the journal at start: its signals went to a process that is gone.

    """

    seq: int = 0
    order: Ask | None = None
    want: Ask | None = None
    look: Ask = Ask.PROBE
    look_s: float = math.inf
    since_s: float = 0.0
    heard_s: float = 0.0
    ended: bool = False
    signal_s: float | None = None
    tries: int = 0
    absent_s: float | None = None
    unsure_s: float | None = None
    unreadable_s: float | None = None
    refused: bool = False
    orphan: str = ""
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    row: Row
    live: Live = Live()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a decision may depend on besides the job and the fact.

    Attributes:
      now_s: The time.
      u: A uniform sample from [0, 1).
      culprit: If this job's server lost its memory, whether this job is the one to charge although
        nobody saw it run: the oldest there, when none is known to have been running.

    """

    now_s: float
    u: float
    policy: Policy
    culprit: bool = False


@dataclass(frozen=True, slots=True)
class Assigned:
    """The engine found a place: this server, this identity."""

    server: ServerName
    origin: str
    client_id: str | None


@dataclass(frozen=True, slots=True)
class Orphaned:
    """The connection that this prompt's events go to has ended. *cause*: disconnected or deaf."""

    cause: str


@dataclass(frozen=True, slots=True)
class Doubted:
    """The prompt may have ended unnoticed: look, within *within_s* seconds."""

    within_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Due:
    """``live.look_s`` has come."""


JobFact = (
    Answer
    | Hint
    | CheckAsked
    | CancelAsked
    | ReleaseAsked
    | HoldAsked
    | Assigned
    | Orphaned
    | Doubted
    | Due
)


@dataclass(frozen=True, slots=True)
class Step:
    """Attributes: *urgent* is False for a changed row that may ride with the next commit."""

    job: Job
    orders: tuple[orders.JobOrder, ...] = ()
    notes: tuple[Note, ...] = ()
    urgent: bool = True


def step(job: Job, fact: JobFact, ctx: Context) -> Step:
    """Apply *fact* to *job*.

    Raises:
      ProtocolViolation: a current answer that the table has no row for. Nothing changed.

    """
    before = job
    if isinstance(fact, Answer):
        if job.live.order is None or fact.token != _token(job):
            return Step(job, notes=(_dropped(job, "stale_answer"),), urgent=False)
        job = _live(job, order=None)
    rule = TABLE.get((job.row.state, type(fact)))
    if rule is None:
        if isinstance(fact, Answer):
            raise ProtocolViolation(
                f"job {job.row.job}: {type(fact).__name__} is not allowed in {job.row.state.value}"
            )
        kind = "late_hint" if isinstance(fact, Hint) else "no_effect"
        return Step(before, notes=(_dropped(job, kind),), urgent=False)
    done = rule(job, fact, ctx)
    live = done.job.live
    if live.order is None and live.want is not None:
        done = _then(done, _issue(_live(done.job, want=None), live.want))
    return done


def load(row: Row, ctx: Context, *, crashed: bool) -> Step:
    """The job as found in the journal at start: the same states, the AT_LOAD orders.

    Args:
      crashed: The previous daemon did not stop cleanly: whatever it was collecting was at hand.

    """
    if crashed and row.state is State.COLLECTING:
        row = msgspec.structs.replace(row, crashes=row.crashes + 1)
    live = Live(since_s=ctx.now_s, heard_s=ctx.now_s, recovered=row.state in IN_FLIGHT)
    job = Job(row, live)
    if row.state in {State.QUEUED, State.COLLECTING} and row.crashes >= ctx.policy.max_crashes:
        return _hold(job, _crash_sentence(row), ctx)
    if row.state is State.SUBMITTING:
        return Step(_live(job, look=Ask.PROBE, look_s=ctx.now_s + ctx.policy.lost_grace_s))
    ask = AT_LOAD.get(row.state)
    return Step(job) if ask is None else _issue(job, ask)


def is_stale(job: Job, policy: Policy, *, now_s: float) -> bool:
    """Whether a prompt on a server has been silent for longer than ``stale_after``."""
    return job.row.state in IN_FLIGHT and now_s - job.live.heard_s >= policy.stale_after_s


# --- small parts ---------------------------------------------------------------------------------


def _token(job: Job) -> Token:
    return Token(job.row.job, job.row.attempt, job.live.seq)


def _live(job: Job, **changes: Any) -> Job:
    return Job(job.row, replace(job.live, **changes))


def _row(job: Job, **changes: Any) -> Job:
    return Job(msgspec.structs.replace(job.row, **changes), job.live)


def _note(job: Job, kind: Kind, *, story: bool = True, **data: Any) -> Note:
    return Note(kind, job.row.job, job.row.server, data, story)


def _dropped(job: Job, reason: str) -> Note:
    return _note(job, "dropped", story=False, reason=reason)


def _issue(job: Job, ask: Ask) -> Step:
    """Give the order now, or as soon as the outstanding one is answered."""
    live = job.live
    if live.order is not None:
        return Step(_live(job, want=max(ask, live.want or ask), look_s=math.inf))
    job = _live(job, order=ask, seq=live.seq + 1, look_s=math.inf)
    return Step(job, (_ORDER_OF[ask](token=_token(job), row=job.row),))


def _then(first: Step, second: Step) -> Step:
    return Step(
        second.job,
        first.orders + second.orders,
        first.notes + second.notes,
        first.urgent or (second.urgent and second.job.row != first.job.row),
    )


def _wait(job: Job, ask: Ask, until_s: float) -> Job:
    """Look again at *until_s*, or earlier if that was planned already and for no weaker reason."""
    if job.live.look_s <= until_s and job.live.look >= ask:
        return job
    return _live(job, look=ask, look_s=until_s)


def _move(job: Job, state: State, ctx: Context, *notes: Note, **changes: Any) -> Step:
    """Enter *state*: the row, a fresh `Live`, the order on entry."""
    old = job.live
    live = Live(
        seq=old.seq,
        order=old.order,
        since_s=ctx.now_s,
        heard_s=ctx.now_s,
        ended=old.ended and state in IN_FLIGHT,
        signal_s=None if state in {State.QUEUED, State.HELD} else old.signal_s,
        orphan=old.orphan if state in IN_FLIGHT else "",
        recovered=old.recovered and state in IN_FLIGHT,
    )
    job = Job(msgspec.structs.replace(job.row, state=state, **changes), live)
    moved = Step(job, (), (*notes, _note(job, "moved", state=state.value)))
    ask = ON_ENTRY.get(state)
    return moved if ask is None else _then(moved, _issue(job, ask))


def _collect(job: Job, outcome: Outcome, ctx: Context, *notes: Note, **changes: Any) -> Step:
    return _move(job, State.COLLECTING, ctx, *notes, outcome=outcome, staged=None, **changes)


def _hold(job: Job, reason: str, ctx: Context, *notes: Note) -> Step:
    return _move(job, State.HELD, ctx, *notes, held=reason, **_NO_ATTEMPT)


def _crash_sentence(row: Row) -> str:
    return (
        f"The daemon crashed {row.crashes} times in a row with this job at hand;"
        " look at its log before releasing it."
    )


_NO_ATTEMPT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "server": None,
        "origin": None,
        "prompt_id": None,
        "client_id": None,
        "number": None,
        "record": None,
        "outcome": None,
        "staged": None,
        "completion": None,
        "submitted_at": None,
        "started_at": None,
        "ended_at": None,
    }
)


def _requeue(job: Job, ctx: Context, *notes: Note, **changes: Any) -> Step:
    """Back to the queue with no prompt anywhere; or to the end, if it was to be stopped anyway."""
    if job.row.why is not None:
        return _collect(job, job.row.why, ctx, *notes, **changes)
    if job.row.crashes >= ctx.policy.max_crashes:
        return _hold(_row(job, **changes), _crash_sentence(job.row), ctx, *notes)
    return _move(job, State.QUEUED, ctx, *notes, **{**_NO_ATTEMPT, **changes})


def _charged(job: Job, charged: int, ctx: Context) -> dict[str, Any]:
    """What changes when an attempt is held against the job: others go first for a while."""
    policy = ctx.policy
    delay_s = exponential_s(charged, policy.retry_first_s, policy.retry_max_s, u=ctx.u)
    more = charged > job.row.charged
    return {"charged": charged, "not_before": ctx.now_s + delay_s if more else 0.0}


def _failed(reason: Reason, message: str, **detail: Any) -> Outcome:
    return Outcome(state=State.FAILED, reason=reason, message=message, detail=detail)


# --- submitting ----------------------------------------------------------------------------------


def _assigned(job: Job, fact: Assigned, ctx: Context) -> Step:
    attempt = job.row.attempt + 1
    prompt_id: PromptId = prompt_id_of(job.row.job, attempt)
    # With no connection nobody hears this prompt's events; it still needs a client id, or the
    # server keeps no outputs of cached nodes (ComfyUI pull request 14939). Its own id is free.
    return _move(
        _live(job, orphan="" if fact.client_id else "disconnected"),
        State.SUBMITTING,
        ctx,
        attempt=attempt,
        server=fact.server,
        origin=fact.origin,
        prompt_id=prompt_id,
        client_id=fact.client_id or prompt_id,
    )


def _accepted(job: Job, fact: Accepted, ctx: Context) -> Step:
    note = _note(job, "accepted", number=fact.number)
    job = _row(job, number=fact.number)
    if not fact.node_errors:
        return _on_server(job, ctx, note)
    if job.row.accept_partial:
        dropped = ", ".join(sorted(fact.node_errors))
        warning = f"The server dropped some outputs; nodes {dropped} did not pass its checks."
        return _on_server(_row(job, warnings=(*job.row.warnings, warning)), ctx, note)
    why = job.row.why or _failed(
        Reason.PARTIAL,
        "The server would run only part of the workflow: nodes"
        f" {', '.join(sorted(fact.node_errors))} did not pass its checks; correct them.",
        node_errors=fact.node_errors,
    )
    return _move(job, State.STOPPING, ctx, note, why=why, submitted_at=ctx.now_s)


def _on_server(job: Job, ctx: Context, *notes: Note) -> Step:
    """The server has the prompt: wait for its end, unless the end was heard already."""
    if job.row.why is not None:
        return _move(job, State.STOPPING, ctx, *notes, submitted_at=ctx.now_s)
    done = _move(job, State.SUBMITTED, ctx, *notes, submitted_at=ctx.now_s)
    if done.job.live.ended:
        return _then(done, _issue(done.job, Ask.FETCH))
    return replace(done, job=_wait(done.job, Ask.PROBE, _next_audit_s(done.job, ctx)))


def _rejected(job: Job, fact: Rejected, ctx: Context) -> Step:
    return _collect(
        job, job.row.why or _failed(Reason.REJECTED, fact.message, **fact.detail), ctx
    )


def _unsendable(job: Job, fact: Unsendable, ctx: Context) -> Step:
    return _collect(job, job.row.why or _failed(Reason.INVALID_JOB, fact.message), ctx)


def _not_sent(job: Job, fact: NotSent, ctx: Context) -> Step:
    # Nothing reached the server, so the identity is unused and may be used again anywhere.
    retry = _note(job, "retry", operation="submit", reason=fact.reason)
    return _requeue(job, ctx, retry, attempt=job.row.attempt - 1)


def _submit_unknown(job: Job, fact: SubmitUnknown, ctx: Context) -> Step:
    retry = _note(job, "retry", operation="submit", reason=fact.reason)
    grace = Ask.PROBE, ctx.now_s + ctx.policy.lost_grace_s
    return Step(_wait(job, *grace), notes=(retry,), urgent=False)


def _early_hint(job: Job, fact: Hint, ctx: Context) -> Step:
    """A hint before the POST's answer: the prompt is there. Remembered; acted on if no answer comes."""
    job = _heard(job, fact, ctx)
    if job.live.order is None:
        return _issue(job, Ask.PROBE)
    return Step(job, urgent=False)


def _probed_submitting(job: Job, fact: Probed, ctx: Context) -> Step:
    match fact.presence:
        case Presence.PENDING:
            return _on_server(job, ctx, _audit(job, fact))
        case Presence.RUNNING:
            return _on_server(_row(job, started_at=_first(job, ctx)), ctx, _audit(job, fact))
        case _:
            return _probed(job, fact, ctx)


# --- submitted -----------------------------------------------------------------------------------


def _first(job: Job, ctx: Context) -> float:
    started: float | None = job.row.started_at
    return ctx.now_s if started is None else started


def _heard(job: Job, fact: Hint, ctx: Context) -> Job:
    job = _live(_row(job, started_at=_first(job, ctx)), heard_s=ctx.now_s)
    if fact.sign is Sign.ENDED and not job.live.ended:
        job = _live(job, ended=True, signal_s=ctx.now_s)
    return job


def _hinted(job: Job, fact: Hint, ctx: Context) -> Step:
    again = job.live.ended
    job = _heard(job, fact, ctx)
    match fact.sign:
        case Sign.ALIVE:
            return Step(job, urgent=False)
        case Sign.ENDING:
            job = _wait(job, Ask.PROBE, ctx.now_s + ctx.policy.ending_grace_s)
            return Step(job, notes=(_note(job, "signal", sign="ending"),), urgent=False)
        case Sign.ENDED:
            if again:
                return Step(job, notes=(_dropped(job, "late_hint"),), urgent=False)
            done = _issue(_live(job, tries=0), Ask.FETCH)
            return replace(done, notes=(_note(job, "signal", sign="ended"),), urgent=False)


def _fetched(job: Job, fact: Fetched, ctx: Context) -> Step:
    if fact.record is not None:
        return _recorded(job, fact.record, ctx)
    if fact.result is FetchResult.UNREADABLE:
        return _unreadable(job, fact.reason, ctx)
    tries = job.live.tries + 1
    retry = _note(job, "retry", operation="completion", reason=fact.result.value)
    job = _live(job, tries=tries)
    if tries < ctx.policy.completion_attempts:
        delay_s = linear_s(tries, ctx.policy.completion_backoff_s, u=ctx.u)
        return Step(_wait(job, Ask.FETCH, ctx.now_s + delay_s), notes=(retry,), urgent=False)
    # The auditor owns it from here: its Probe can tell "not yet" from "gone".
    until_s = ctx.now_s + min(ctx.policy.audit_interval_s, ctx.policy.lost_grace_s)
    return Step(_wait(job, Ask.PROBE, until_s), notes=(retry,), urgent=False)


def _probed(job: Job, fact: Probed, ctx: Context) -> Step:
    """An audit's verdict on a prompt that is submitting or submitted."""
    audit = _audit(job, fact)
    now_s, policy = ctx.now_s, ctx.policy
    match fact.presence:
        case Presence.FINISHED:
            assert fact.record is not None
            return _with(audit, _recorded(job, fact.record, ctx))
        case Presence.PENDING | Presence.RUNNING:
            job = _certain(job)
            if fact.presence is Presence.RUNNING:
                job = _row(job, started_at=_first(job, ctx))
            job = _wait(job, Ask.PROBE, _next_audit_s(job, ctx))
            return Step(job, notes=(audit,), urgent=False)
        case Presence.ABSENT | Presence.REFUSED:
            job = _absent(job, fact, ctx)
            since_s = job.live.absent_s
            assert since_s is not None
            if now_s - since_s >= policy.lost_grace_s:
                return _with(audit, _lost(job, ctx))
            return Step(
                _wait(job, Ask.PROBE, since_s + policy.lost_grace_s), notes=(audit,), urgent=False
            )
        case Presence.UNREADABLE:
            return _with(audit, _unreadable(job, fact.reason, ctx))
        case Presence.UNKNOWN:
            job = _unsure(job, ctx)
            if _is_abandoned(job, ctx):
                return _with(audit, _abandon(job, ctx))
            return Step(
                _wait(job, Ask.PROBE, now_s + _patience_s(job, ctx)), notes=(audit,), urgent=False
            )


def _audit(job: Job, fact: Probed) -> Note:
    return _note(job, "audit", verdict=fact.presence.value, reason=fact.reason)


def _with(note: Note, done: Step) -> Step:
    return replace(done, notes=(note, *done.notes))


def _certain(job: Job) -> Job:
    return _live(job, tries=0, absent_s=None, unsure_s=None, unreadable_s=None, refused=False)


def _absent(job: Job, fact: Probed, ctx: Context) -> Job:
    since_s = ctx.now_s if job.live.absent_s is None else job.live.absent_s
    refused = job.live.refused or fact.presence is Presence.REFUSED
    return _live(_certain(job), absent_s=since_s, refused=refused)


def _unsure(job: Job, ctx: Context) -> Job:
    since_s = ctx.now_s if job.live.unsure_s is None else job.live.unsure_s
    return _live(job, unsure_s=since_s, tries=job.live.tries + 1)


def _is_abandoned(job: Job, ctx: Context) -> bool:
    since_s = job.live.unsure_s
    return since_s is not None and ctx.now_s - since_s >= ctx.policy.abandon_after_s


def _patience_s(job: Job, ctx: Context) -> float:
    policy = ctx.policy
    most_s = policy.orphan_interval_s if job.live.orphan else policy.audit_interval_s
    return max(
        policy.orphan_interval_s,
        exponential_s(max(job.live.tries, 1), policy.retry_first_s, most_s, u=ctx.u),
    )


def _next_audit_s(job: Job, ctx: Context) -> float:
    """When to look at a prompt that was just seen alive, or just accepted."""
    policy = ctx.policy
    if job.live.orphan or job.live.recovered:
        return ctx.now_s + policy.orphan_interval_s
    submitted_s = ctx.now_s if job.row.submitted_at is None else job.row.submitted_at
    return max(submitted_s + policy.stale_after_s, ctx.now_s + policy.audit_interval_s)


def _recorded(job: Job, record: Record, ctx: Context) -> Step:
    """The history record is here: the attempt is over, and its verdict is ours."""
    if completion.is_foreign(job.row, record):
        return _unreadable(job, "the record carries another job's mark", ctx)
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
    ended = _note(job, "ended", source=source.value, missed=missed, end=record.end.value)
    submitted_at = ctx.now_s if row.submitted_at is None else row.submitted_at
    return _collect(
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


def _unreadable(job: Job, reason: str, ctx: Context) -> Step:
    """A record that cannot be read: the server's fault if it stays so, and then for good."""
    since_s = job.live.unreadable_s
    if since_s is not None and ctx.now_s - since_s >= ctx.policy.stale_after_s:
        message = f"Server {job.row.server} has a record of this prompt that cannot be read: {reason}."
        return _collect(job, job.row.why or _failed(Reason.SERVER_PROTOCOL, message), ctx)
    job = _live(job, unreadable_s=ctx.now_s if since_s is None else since_s, tries=job.live.tries + 1)
    ask = Ask.STOP if job.row.state is State.STOPPING else Ask.PROBE
    retry = _note(job, "retry", operation="completion", reason="unreadable")
    return Step(_wait(job, ask, ctx.now_s + _patience_s(job, ctx)), notes=(retry,), urgent=False)


def _lost(job: Job, ctx: Context) -> Step:
    """Proven absent. Charged is what was running when its server died, or vanished again and again."""
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
    lost = _note(job, "lost", cause=cause, charged=charge)
    charged = row.charged + charge
    if charged >= row.max_attempts and row.why is None:
        message = (
            f"The server lost this prompt {charged} times (last: {row.server});"
            " its workflow may be what brings the server down."
        )
        return _collect(
            job, _failed(Reason.LOST, message), ctx, lost, charged=charged, dropped=dropped
        )
    return _requeue(job, ctx, lost, dropped=dropped, **_charged(job, charged, ctx))


def _given_up(row: Row) -> tuple[tuple[str, str, str], ...]:
    assert row.server is not None
    assert row.origin is not None
    assert row.prompt_id is not None
    return (*row.abandoned, (row.server, row.origin, row.prompt_id))


def _abandon(job: Job, ctx: Context) -> Step:
    """Unreachable for too long: written down, so that it can be fenced when the server is back."""
    lost = _note(job, "lost", cause="abandoned", charged=False)
    return _requeue(job, ctx, lost, abandoned=_given_up(job.row))


def _orphaned(job: Job, fact: Orphaned, ctx: Context) -> Step:
    job = _live(job, orphan=fact.cause)
    if job.row.state is State.SUBMITTING:
        return Step(job, urgent=False)
    return replace(_issue(job, Ask.PROBE), urgent=False)


def _doubted(job: Job, fact: Doubted, ctx: Context) -> Step:
    if fact.within_s > 0:
        return Step(_wait(job, Ask.PROBE, ctx.now_s + fact.within_s), urgent=False)
    return replace(_issue(job, Ask.PROBE), urgent=False)


def _look(job: Job, fact: Due | CheckAsked, ctx: Context) -> Step:
    """A deadline, or a person, says look: give the planned order."""
    ask = job.live.look if isinstance(fact, Due) or job.live.look_s < math.inf else Ask.PROBE
    if job.row.state is State.STOPPING:
        ask = Ask.STOP
    return replace(_issue(job, ask), urgent=False)


# --- stopping ------------------------------------------------------------------------------------


def _stop(job: Job, fact: CancelAsked, ctx: Context) -> Step:
    why = Outcome(state=State.CANCELLED, reason=Reason.CANCELLED, message="Cancelled.")
    match job.row.state:
        case State.SUBMITTING:  # the POST is out: stop it as soon as its answer is known
            return Step(_row(job, why=why))
        case State.SUBMITTED:
            return _move(job, State.STOPPING, ctx, why=why)
        case _:
            return _collect(job, why, ctx)


def _stopped(job: Job, fact: Probed, ctx: Context) -> Step:
    """What became of a prompt after it was deleted or interrupted. 200 proved nothing; this does."""
    audit = _audit(job, fact)
    why, policy, now_s = job.row.why, ctx.policy, ctx.now_s
    assert why is not None
    match fact.presence:
        case Presence.FINISHED:
            assert fact.record is not None
            return _with(audit, _recorded(job, fact.record, ctx))
        case Presence.ABSENT | Presence.REFUSED:
            job = _absent(job, fact, ctx)
            since_s = job.live.absent_s
            assert since_s is not None
            if now_s - since_s >= policy.lost_grace_s:
                return _with(audit, _collect(job, why, ctx))
            until_s = since_s + policy.lost_grace_s
            return Step(_wait(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.PENDING | Presence.RUNNING:
            job = _certain(job)
            if now_s - job.live.since_s < policy.stop_grace_s:
                until_s = now_s + policy.stop_retry_s
                return Step(_wait(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
        case Presence.UNREADABLE:
            return _with(audit, _unreadable(job, fact.reason, ctx))
        case Presence.UNKNOWN:
            job = _unsure(job, ctx)
            if not _is_abandoned(job, ctx):
                until_s = now_s + _patience_s(job, ctx)
                return Step(_wait(job, Ask.STOP, until_s), notes=(audit,), urgent=False)
    lost = _note(job, "lost", cause="abandoned", charged=False)
    return _with(audit, _collect(job, why, ctx, lost, abandoned=_given_up(job.row)))


def _fetched_stopping(job: Job, fact: Fetched, ctx: Context) -> Step:
    if fact.record is not None:
        return _recorded(job, fact.record, ctx)
    return Step(job, urgent=False)  # STOP is wanted already; it looks for itself


def _hinted_stopping(job: Job, fact: Hint, ctx: Context) -> Step:
    job = _heard(job, fact, ctx)
    if fact.sign is Sign.ALIVE:
        return Step(job, urgent=False)
    return replace(_issue(job, Ask.STOP), urgent=False)


# --- collecting, publishing, final ---------------------------------------------------------------


def _collected(job: Job, fact: Collected, ctx: Context) -> Step:
    note = _note(job, "fetched", outputs=fact.staged.outputs, bytes=fact.staged.bytes)
    return _move(job, State.PUBLISHING, ctx, note, staged=fact.staged, crashes=0)


def _collect_failed(job: Job, fact: CollectFailed, ctx: Context) -> Step:
    row, policy = job.row, ctx.policy
    assert row.outcome is not None
    retry = _note(job, "retry", operation="download", reason=fact.cause.value)
    if fact.cause in {Uncollected.MISSING, Uncollected.INVALID} and row.outcome.state is State.DONE:
        charged = row.charged + 1
        lost = _note(job, "lost", cause="outputs", charged=True)
        if charged < row.max_attempts:
            return _requeue(job, ctx, retry, lost, **_charged(job, charged, ctx))
        missing = fact.cause is Uncollected.MISSING
        reason = Reason.OUTPUT_MISSING if missing else Reason.OUTPUT_INVALID
        outcome = _failed(reason, fact.message)
        return _collect(job, outcome, ctx, retry, lost, charged=charged, record=_bare(row))
    job = _live(job, tries=job.live.tries + 1)
    if fact.cause is not Uncollected.DISK:
        if row.outcome.state is not State.DONE and job.live.tries >= policy.completion_attempts:
            # It failed anyway: what it produced is a courtesy, not worth waiting for.
            warning = f"Its outputs could not be fetched: {fact.message}"
            return _collect(
                job, row.outcome, ctx, retry, record=_bare(row), warnings=(*row.warnings, warning)
            )
        job = _live(job, unsure_s=job.live.unsure_s or ctx.now_s)
        if row.outcome.state is State.DONE and _is_abandoned(job, ctx):
            lost = _note(job, "lost", cause="abandoned", charged=False)
            return _requeue(job, ctx, retry, lost)
    delay_s = exponential_s(job.live.tries, policy.retry_first_s, policy.retry_max_s, u=ctx.u)
    return Step(_wait(job, Ask.COLLECT, ctx.now_s + delay_s), notes=(retry,), urgent=False)


def _bare(row: Row) -> Record | None:
    """The record without its files: nothing left to download."""
    return None if row.record is None else msgspec.structs.replace(row.record, files=())


def _published(job: Job, fact: Published, ctx: Context) -> Step:
    row = job.row
    assert row.outcome is not None
    row = msgspec.structs.replace(row, published_at=ctx.now_s)
    signal_s = job.live.signal_s
    finished = _note(
        Job(row, job.live),
        "finished",
        outcome=row.outcome.state.value,
        reason=row.outcome.reason.value if row.outcome.reason else None,
        durations_s=durations_s(row),
        latency_s=None if signal_s is None else ctx.now_s - signal_s,
    )
    return _move(Job(row, job.live), row.outcome.state, ctx, finished)


def durations_s(row: Row, *, published_at: float | None = None) -> dict[str, float]:
    """Seconds spent in each phase; a phase that never was takes 0."""
    published = row.published_at if published_at is None else published_at
    marks = [row.claimed_at, row.submitted_at, row.started_at, row.ended_at, published]
    known: list[float] = []
    for mark in marks:
        last = known[-1] if known else row.claimed_at
        known.append(last if mark is None else max(mark, last))
    phases = ("wait", "queue", "run", "collect")
    spans = {name: known[i + 1] - known[i] for i, name in enumerate(phases)}
    return {**spans, "total": known[-1] - known[0]}


def _publish_conflict(job: Job, fact: PublishConflict, ctx: Context) -> Step:
    outcome = job.row.outcome
    assert outcome is not None
    if outcome.state is State.DONE:
        return _collect(job, _failed(Reason.CONFLICT, fact.message), ctx, record=_bare(job.row))
    return _publish_again(job, "conflict", ctx)  # failed/ is taken too: a person must look


def _publish_delayed(job: Job, fact: PublishDelayed, ctx: Context) -> Step:
    return _publish_again(job, "disk", ctx)


def _publish_again(job: Job, reason: str, ctx: Context) -> Step:
    job = _live(job, tries=job.live.tries + 1)
    delay_s = exponential_s(
        job.live.tries, ctx.policy.retry_first_s, ctx.policy.retry_max_s, u=ctx.u
    )
    retry = _note(job, "retry", operation="completion", reason=reason)
    return Step(_wait(job, Ask.PUBLISH, ctx.now_s + delay_s), notes=(retry,), urgent=False)


def _retired(job: Job, fact: Retired, ctx: Context) -> Step:
    return Step(_row(job, retired=True), urgent=False)


# --- held ----------------------------------------------------------------------------------------


def _held(job: Job, fact: HoldAsked, ctx: Context) -> Step:
    return _hold(job, fact.reason, ctx)


def _released(job: Job, fact: ReleaseAsked, ctx: Context) -> Step:
    return _move(job, State.QUEUED, ctx, held="", crashes=0)


Rule = Callable[[Job, Any, Context], Step]
_S = State
_final_rows: dict[tuple[State, type], Rule] = {(state, Retired): _retired for state in FINAL}

# What may happen in each state. Every answer that an order can bring in that state has a row here.
TABLE: Final[Mapping[tuple[State, type], Rule]] = MappingProxyType(
    {
        (_S.QUEUED, Assigned): _assigned,
        (_S.QUEUED, CancelAsked): _stop,
        (_S.QUEUED, HoldAsked): _held,
        (_S.HELD, ReleaseAsked): _released,
        (_S.HELD, CancelAsked): _stop,
        (_S.SUBMITTING, Accepted): _accepted,
        (_S.SUBMITTING, Rejected): _rejected,
        (_S.SUBMITTING, NotSent): _not_sent,
        (_S.SUBMITTING, SubmitUnknown): _submit_unknown,
        (_S.SUBMITTING, Unsendable): _unsendable,
        (_S.SUBMITTING, Probed): _probed_submitting,
        (_S.SUBMITTING, Hint): _early_hint,
        (_S.SUBMITTING, Orphaned): _orphaned,
        (_S.SUBMITTING, CancelAsked): _stop,
        (_S.SUBMITTING, CheckAsked): _look,
        (_S.SUBMITTING, Due): _look,
        (_S.SUBMITTED, Hint): _hinted,
        (_S.SUBMITTED, Fetched): _fetched,
        (_S.SUBMITTED, Probed): _probed,
        (_S.SUBMITTED, Orphaned): _orphaned,
        (_S.SUBMITTED, Doubted): _doubted,
        (_S.SUBMITTED, CancelAsked): _stop,
        (_S.SUBMITTED, CheckAsked): _look,
        (_S.SUBMITTED, Due): _look,
        (_S.STOPPING, Probed): _stopped,
        (_S.STOPPING, Fetched): _fetched_stopping,
        (_S.STOPPING, Hint): _hinted_stopping,
        (_S.STOPPING, Orphaned): lambda job, fact, ctx: Step(
            _live(job, orphan=fact.cause), urgent=False
        ),
        (_S.STOPPING, CheckAsked): _look,
        (_S.STOPPING, Due): _look,
        (_S.COLLECTING, Collected): _collected,
        (_S.COLLECTING, CollectFailed): _collect_failed,
        (_S.COLLECTING, Due): _look,
        (_S.PUBLISHING, Published): _published,
        (_S.PUBLISHING, PublishConflict): _publish_conflict,
        (_S.PUBLISHING, PublishDelayed): _publish_delayed,
        (_S.PUBLISHING, Due): _look,
        **_final_rows,
    }
)


def job_of(fact: JobFact) -> JobId | None:
    """The job a fact names; None for a hint, which names a prompt."""
    if isinstance(fact, Answer):
        return fact.token.job
    return getattr(fact, "job", None)
