"""A job's whole life: the state table, ``step`` and ``load``. Nothing else decides about a job.

``step(job, fact, ctx) -> Step`` is pure. Which (state, fact) pairs exist is `TABLE`; a hint or a
wish without a row is ignored and counted, an answer without a row is a bug.

The order of things: a changed row is committed first, then the orders it led to are released. So
whatever a row says before an action is at least an intention, and after it at least a doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from comfyd.core import finishing, stopping, submitted, submitting
from comfyd.core.facts import (
    Accepted,
    Answer,
    CancelAsked,
    CheckAsked,
    Collected,
    CollectFailed,
    Fetched,
    Hint,
    HoldAsked,
    LateSuccess,
    NotSent,
    Probed,
    PublishConflict,
    PublishDelayed,
    Published,
    Rejected,
    ReleaseAsked,
    Retired,
    SubmitUnknown,
    Unsendable,
)
from comfyd.core.job import (
    Ask,
    Assigned,
    Context,
    Doubted,
    Due,
    Expired,
    GivenUp,
    Job,
    JobFact,
    Live,
    NoServerLeft,
    Orphaned,
    Recalled,
    Step,
)
from comfyd.core.model import (
    FINAL,
    IN_FLIGHT,
    Row,
    State,
)
from comfyd.core.moves import (
    ON_ENTRY,
    crash_sentence,
    dropped,
    hold_as,
    issue,
    then,
    token_of,
    with_live,
)
from comfyd.errors import ProtocolViolation

# And when it is found in the journal at start. A submission may still be on its way (a server goes
# on with a request whose client is gone), so that one is looked at only after lost_grace.
AT_LOAD: Final[Mapping[State, Ask]] = MappingProxyType(
    {**ON_ENTRY, State.SUBMITTING: Ask.PROBE, State.SUBMITTED: Ask.PROBE}
)


# The answers that each order can bring.
ANSWERS_TO: Final[Mapping[Ask, tuple[type[Answer], ...]]] = MappingProxyType(
    {
        Ask.SUBMIT: (Accepted, Rejected, NotSent, SubmitUnknown, Unsendable),
        Ask.PROBE: (Probed,),
        Ask.STOP: (Probed,),
        Ask.FETCH: (Fetched,),
        Ask.COLLECT: (Collected, CollectFailed),
        Ask.PUBLISH: (Published, PublishConflict, PublishDelayed),
        Ask.RETIRE: (Retired,),
    }
)

Rule = Callable[[Job, Any, Context], Step]
_S = State
_FINAL_ROWS: dict[tuple[State, type], Rule] = {
    (state, Retired): finishing.retired for state in FINAL
}

# What may happen in each state. Every answer that an order can bring in that state has a row here.
TABLE: Final[Mapping[tuple[State, type], Rule]] = MappingProxyType(
    {
        (_S.QUEUED, Assigned): submitting.assigned,
        (_S.QUEUED, NoServerLeft): submitting.no_server_left,
        (_S.QUEUED, Expired): submitting.expired,
        (_S.QUEUED, LateSuccess): submitted.late_success,
        (_S.QUEUED, CancelAsked): stopping.stop,
        (_S.QUEUED, HoldAsked): finishing.held,
        (_S.HELD, ReleaseAsked): finishing.released,
        (_S.HELD, CancelAsked): stopping.stop,
        (_S.SUBMITTING, Accepted): submitting.accepted,
        (_S.SUBMITTING, Rejected): submitting.rejected,
        (_S.SUBMITTING, NotSent): submitting.not_sent,
        (_S.SUBMITTING, SubmitUnknown): submitting.submit_unknown,
        (_S.SUBMITTING, Unsendable): submitting.unsendable,
        (_S.SUBMITTING, Probed): submitting.probed,
        (_S.SUBMITTING, Hint): submitting.hinted,
        (_S.SUBMITTING, Orphaned): submitted.orphaned,
        (_S.SUBMITTING, CancelAsked): stopping.stop,
        (_S.SUBMITTING, CheckAsked): submitted.look,
        (_S.SUBMITTING, Due): submitted.look,
        (_S.SUBMITTING, GivenUp): submitted.given_up_on,
        (_S.SUBMITTED, Hint): submitted.hinted,
        (_S.SUBMITTED, Fetched): submitted.fetched,
        (_S.SUBMITTED, Probed): submitted.probed,
        (_S.SUBMITTED, Orphaned): submitted.orphaned,
        (_S.SUBMITTED, Doubted): submitted.doubted,
        (_S.SUBMITTED, CancelAsked): stopping.stop,
        (_S.SUBMITTED, CheckAsked): submitted.look,
        (_S.SUBMITTED, Due): submitted.due,
        (_S.SUBMITTED, Recalled): submitted.recalled,
        (_S.SUBMITTED, LateSuccess): submitted.late_success,
        (_S.SUBMITTED, GivenUp): submitted.given_up_on,
        (_S.STOPPING, Probed): stopping.stopped,
        (_S.STOPPING, Fetched): stopping.fetched,
        (_S.STOPPING, Hint): stopping.hinted,
        (_S.STOPPING, Orphaned): stopping.orphaned,
        (_S.STOPPING, CancelAsked): stopping.stop,
        (_S.STOPPING, CheckAsked): submitted.look,
        (_S.STOPPING, Due): submitted.look,
        (_S.STOPPING, LateSuccess): stopping.late_success,
        (_S.STOPPING, GivenUp): submitted.given_up_on,
        (_S.COLLECTING, Collected): finishing.collected,
        (_S.COLLECTING, CollectFailed): finishing.collect_failed,
        (_S.COLLECTING, CancelAsked): stopping.stop,
        (_S.COLLECTING, Due): submitted.look,
        (_S.COLLECTING, Doubted): finishing.at_once,
        (_S.COLLECTING, GivenUp): finishing.given_up_on,
        (_S.PUBLISHING, Published): finishing.published,
        (_S.PUBLISHING, PublishConflict): finishing.publish_conflict,
        (_S.PUBLISHING, PublishDelayed): finishing.publish_delayed,
        (_S.PUBLISHING, Due): submitted.look,
        (_S.PUBLISHING, Doubted): finishing.at_once,
        **_FINAL_ROWS,
    }
)


def step(job: Job, fact: JobFact, ctx: Context) -> Step:
    """Apply *fact* to *job*.

    Raises:
      ProtocolViolation: a current answer that the table has no row for. Nothing changed.

    """
    before = job
    if isinstance(fact, Answer):
        if job.live.order is None or fact.token != token_of(job):
            return Step(job, notes=(dropped(job, "stale_answer"),), urgent=False)
        if not isinstance(fact, ANSWERS_TO[job.live.order]):
            raise ProtocolViolation(
                f"job {job.row.job}: {type(fact).__name__} does not answer {job.live.order.name}"
            )
        job = with_live(job, order=None)
    rule = TABLE.get((job.row.state, type(fact)))
    if rule is None:
        if isinstance(fact, Answer):
            raise ProtocolViolation(
                f"job {job.row.job}: {type(fact).__name__} is not allowed in {job.row.state.value}"
            )
        kind = "late_hint" if isinstance(fact, Hint) else "no_effect"
        return Step(before, notes=(dropped(job, kind),), urgent=False)
    done = rule(job, fact, ctx)
    live = done.job.live
    if live.order is None and live.want is not None:
        done = then(done, issue(with_live(done.job, want=None), live.want))
    return done


def load(row: Row, ctx: Context, *, crashed: bool, alone: bool = False) -> Step:
    """The job as found in the journal at start: the same states, the AT_LOAD orders.

    Args:
      crashed: The previous daemon did not stop cleanly: whatever it was collecting was at hand.
      alone: No other prompt of ours was on its server.

    """
    if crashed and row.state is State.COLLECTING:
        row = msgspec.structs.replace(row, crashes=row.crashes + 1)
    in_flight = row.state in IN_FLIGHT
    live = Live(
        since_s=ctx.now_s, heard_s=ctx.now_s, recovered=in_flight, alone=alone and in_flight
    )
    job = Job(row, live)
    if row.state in {State.QUEUED, State.COLLECTING} and row.crashes >= ctx.policy.max_crashes:
        return hold_as(job, crash_sentence(row), ctx)
    if row.state is State.SUBMITTING:
        return Step(with_live(job, look=Ask.PROBE, look_s=ctx.now_s + ctx.policy.lost_grace_s))
    ask = AT_LOAD.get(row.state)
    return Step(job) if ask is None else issue(job, ask)
