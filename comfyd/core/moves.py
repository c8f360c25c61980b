"""The moves that every rule about a job is made of: give an order, plan a look, enter a state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec

from comfyd.core import orders
from comfyd.core.facts import (
    Token,
)
from comfyd.core.job import (
    Ask,
    Context,
    Job,
    Live,
    Step,
)
from comfyd.core.model import (
    IN_FLIGHT,
    Outcome,
    Reason,
    Row,
    State,
    Verdict,
)
from comfyd.core.notes import Kind, Note
from comfyd.core.policy import exponential_s, has_lasted

T = TypeVar("T")

_ORDER_OF: Final[Mapping[Ask, type[orders.JobOrder]]] = MappingProxyType(
    {
        Ask.PROBE: orders.Probe,
        Ask.FETCH: orders.Fetch,
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


def final_why(row: Row) -> Outcome | None:
    """The end that the job is being stopped for; None if it is not, or only to be made again."""
    return row.why if row.why is not None and row.why.state is not State.QUEUED else None


def is_recalled(row: Row) -> bool:
    """Whether its prompt is being fetched back from a server's queue, and nothing worse."""
    return row.why is not None and row.why.state is State.QUEUED and row.why.reason is None


def may_run(row: Row) -> bool:
    """Whether its prompt is only to be taken out of a server's queue: if it runs by now, it has
    what it waited for, and goes on."""
    late = row.why is not None and row.why.reason is Reason.QUEUE_TIMEOUT
    return late or is_recalled(row)


def token_of(job: Job) -> Token:
    return Token(job.row.job, job.row.attempt, job.live.seq)


def with_live(job: Job, **changes: Any) -> Job:
    return Job(job.row, replace(job.live, **changes))


def with_row(job: Job, **changes: Any) -> Job:
    return Job(msgspec.structs.replace(job.row, **changes), job.live)


def noted(job: Job, kind: Kind, *, story: bool = True, **data: Any) -> Note:
    return Note(kind, job.row.job, job.row.server, data, story, job.row.prompt_id)


def dropped(job: Job, reason: str) -> Note:
    return noted(job, "dropped", story=False, reason=reason)


def issue(job: Job, ask: Ask) -> Step:
    """Give the order now, or as soon as the outstanding one is answered."""
    live = job.live
    if live.order is not None:
        return Step(with_live(job, want=max(ask, live.want or ask), look_s=math.inf))
    job = with_live(job, order=ask, seq=live.seq + 1, look_s=math.inf)
    if ask is Ask.STOP:
        stop = orders.Stop(token=token_of(job), row=job.row, interrupt=not may_run(job.row))
        return Step(job, (stop,))
    return Step(job, (_ORDER_OF[ask](token=token_of(job), row=job.row),))


def then(first: Step, second: Step) -> Step:
    return Step(
        second.job,
        first.orders + second.orders,
        first.notes + second.notes,
        first.urgent or (second.urgent and second.job.row != first.job.row),
    )


def plan(job: Job, ask: Ask, until_s: float) -> Job:
    """Look again at *until_s*, or earlier if that was planned already and for no weaker reason."""
    if job.live.look_s <= until_s and job.live.look >= ask:
        return job
    return with_live(job, look=ask, look_s=until_s)


def move(job: Job, state: State, ctx: Context, *notes: Note, **changes: Any) -> Step:
    """Enter *state*: the row, a fresh `Live`, the order on entry."""
    old, before = job.live, job.row.state
    live = Live(
        seq=old.seq,
        order=old.order,
        since_s=ctx.now_s,
        heard_s=ctx.now_s,
        ended=old.ended and state in IN_FLIGHT,
        signal_s=None if state in {State.QUEUED, State.HELD} else old.signal_s,
        orphan=old.orphan if state in IN_FLIGHT else "",
        alone=old.alone and state in IN_FLIGHT,
        recovered=old.recovered and state in IN_FLIGHT,
    )
    job = Job(msgspec.structs.replace(job.row, state=state, **changes), live)
    moved = Step(job, (), (*notes, noted(job, "moved", state=state.value, **_why(before, job.row))))
    ask = ON_ENTRY.get(state)
    return moved if ask is None else then(moved, issue(job, ask))


def _why(before: State, row: Row) -> dict[str, Any]:
    """What a person wants to know at once of a state that is not the next one on the way."""
    match row:
        case Row(state=State.SUBMITTED) if before is State.STOPPING:
            return {"reason": "it runs by now"}
        case Row(state=State.HELD):
            return {"reason": row.held}
        case Row(state=State.STOPPING, why=Outcome(reason=Reason() as reason)):
            return {"reason": reason.value}
        case _:
            return {}


def collect_as(job: Job, outcome: Outcome, ctx: Context, *notes: Note, **changes: Any) -> Step:
    row = job.row
    if row.submitted_at is not None and row.ended_at is None:  # it was seen to be over just now
        changes.setdefault("ended_at", ctx.now_s)
    return move(job, State.COLLECTING, ctx, *notes, outcome=outcome, staged=None, **changes)


def hold_as(job: Job, reason: str, ctx: Context, *notes: Note) -> Step:
    return move(job, State.HELD, ctx, *notes, held=reason, **NO_ATTEMPT)


def crash_sentence(row: Row) -> str:
    return (
        f"The daemon crashed {row.crashes} times in a row with this job at hand;"
        " look at its log before releasing it."
    )


NO_ATTEMPT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "why": None,
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


def requeue(job: Job, ctx: Context, *notes: Note, **changes: Any) -> Step:
    """Back to the queue with no prompt anywhere; or to the end, if it was to be stopped anyway."""
    if (why := final_why(job.row)) is not None:
        return collect_as(job, why, ctx, *notes, **changes)
    if job.row.crashes >= ctx.policy.max_crashes:
        return hold_as(with_row(job, **changes), crash_sentence(job.row), ctx, *notes)
    return move(job, State.QUEUED, ctx, *notes, **{**NO_ATTEMPT, **changes})


def stop_as(job: Job, why: Outcome, ctx: Context, *notes: Note) -> Step:
    """Begin to end the prompt; what becomes of the job then is *why*."""
    return move(job, State.STOPPING, ctx, *notes, why=why)


def try_elsewhere(job: Job, verdict: Outcome, ctx: Context, *notes: Note) -> Step:
    """Back to the queue, for servers that have not said anything yet; charged to nobody."""
    reason = "error" if verdict.reason is Reason.EXECUTION_ERROR else "rejected"
    retry = noted(job, "retry", operation="attempt", reason=reason)
    said = Verdict(server=_set(job.row.server), origin=_set(job.row.origin), outcome=verdict)
    return requeue(job, ctx, *notes, retry, verdicts=(*job.row.verdicts, said), deaths=0)


def _set(value: T | None) -> T:
    assert value is not None
    return value


def charge_to(job: Job, charged: int, ctx: Context) -> dict[str, Any]:
    """What changes when an attempt is held against the job: others go first for a while."""
    policy = ctx.policy
    delay_s = exponential_s(charged, policy.retry_first_s, policy.retry_max_s, u=ctx.u)
    more = charged > job.row.charged
    return {"charged": charged, "not_before": ctx.now_s + delay_s if more else 0.0}


def failure(reason: Reason, message: str, **detail: Any) -> Outcome:
    return Outcome(state=State.FAILED, reason=reason, message=message, detail=detail)


def is_abandoned(job: Job, ctx: Context) -> bool:
    """Whether nothing certain has been heard for so long that the attempt is given up."""
    return has_lasted(job.live.unsure_s, ctx.policy.abandon_after_s, now_s=ctx.now_s)
