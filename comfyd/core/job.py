"""One job, as the core sees it: its row, its live part, and what a step of it may yield.

The row is what the journal holds. The live part is forgotten in a crash and made anew at load.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from comfyd.core import orders
from comfyd.core.facts import (
    Answer,
    Hint,
    LateSuccess,
    Wish,
)
from comfyd.core.model import (
    IN_FLIGHT,
    JobId,
    Reason,
    Row,
    ServerName,
    State,
)
from comfyd.core.notes import Note
from comfyd.core.policy import Policy


class Ask(enum.IntEnum):
    """The orders a job can have outstanding; of two that are wanted, the higher one wins."""

    PROBE = 1
    FETCH = 2
    STOP = 3
    SUBMIT = 4
    COLLECT = 5
    PUBLISH = 6
    RETIRE = 7


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
      alone: No other prompt of ours was on its server when the connection ended.
      stalling: Silent past its stall deadline: the next look decides.
      recovered: Found in the journal at start: its signals went to a process that is gone.
      unheard: What came of its POST in a few words, if that was no usable answer.
      its_fault: That counts against the job, if its prompt is found nowhere.
      away_s: Since when its outputs wait for the disk, or for its server to be there.

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
    alone: bool = False
    stalling: bool = False
    recovered: bool = False
    unheard: str | None = None
    its_fault: bool = False
    away_s: float | None = None


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
      elsewhere: There is another server that has not said anything against this job, and that works
        or may do so again soon.
      takes_others: Its server has accepted another job since this one was last let down.
      answers: Its server answers health probes.

    """

    now_s: float
    u: float
    policy: Policy
    elsewhere: bool = False
    takes_others: bool = False
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Assigned:
    """The engine found a place: this server, this identity."""

    server: ServerName
    origin: str
    client_id: str | None


@dataclass(frozen=True, slots=True)
class Orphaned:
    """The connection that this prompt's events go to has ended. *cause*: disconnected or deaf.

    *alone*: if its server died, nothing else of ours can have brought it down.
    """

    cause: str
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Doubted:
    """The prompt may have ended unnoticed: look, within *within_s* seconds."""

    within_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Due:
    """`wake_s` has come."""


@dataclass(frozen=True, slots=True)
class Expired:
    """It waited for its start for longer than it may."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """It waits on a server while another one could run it: fetch it back, unless it runs by now."""


@dataclass(frozen=True, slots=True)
class NoServerLeft:
    """Every server that could still have taken it has said no, or is gone."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A person says that its server is gone for good."""


JobFact = (
    Answer
    | Hint
    | Wish
    | LateSuccess
    | Assigned
    | Orphaned
    | Doubted
    | Due
    | Expired
    | Recalled
    | NoServerLeft
    | GivenUp
)


@dataclass(frozen=True, slots=True)
class Step:
    """Attributes: *urgent* is False for a changed row that may ride with the next commit."""

    job: Job
    orders: tuple[orders.JobOrder, ...] = ()
    notes: tuple[Note, ...] = ()
    urgent: bool = True


def is_stale(job: Job, policy: Policy, *, now_s: float, server_heard_s: float) -> bool:
    """Whether a prompt on a server has been silent for longer than ``stale_after``.

    Args:
      server_heard_s: When any prompt of ours there was heard last: one that waits is not silent
        as long as those before it are not.

    """
    heard_s = job.live.heard_s
    if job.row.started_at is None:
        heard_s = max(heard_s, server_heard_s)
    return job.row.state in IN_FLIGHT and now_s - heard_s >= policy.stale_after_s


def deadline(job: Job, policy: Policy) -> tuple[float, Reason] | None:
    """When a submitted prompt is to be stopped, and why; None if nothing ends it."""
    row, live = job.row, job.live
    if row.state is not State.SUBMITTED or live.ended:
        return None
    if row.started_at is None:
        return None if row.queue_by is None else (row.queue_by, Reason.QUEUE_TIMEOUT)
    run_s = policy.run_timeout_s if row.timeouts.run_s is None else row.timeouts.run_s
    run = row.started_at + run_s, Reason.RUN_TIMEOUT
    if live.orphan or live.recovered or live.stalling:
        return run  # nobody would hear its progress; or that is being looked into
    stall_s = policy.stall_timeout_s if row.timeouts.stall_s is None else row.timeouts.stall_s
    stall = max(live.heard_s, row.started_at) + stall_s, Reason.STALLED
    return min(run, stall, key=lambda each: each[0])


def wake_s(job: Job, policy: Policy) -> float:
    """When the job wants a `Due`; infinity for never."""
    ends = deadline(job, policy)
    return job.live.look_s if ends is None else min(job.live.look_s, ends[0])


def durations_s(row: Row, *, published_at: float | None = None) -> dict[str, float]:
    """Seconds spent in each phase; a phase that never was takes 0."""
    published = row.published_at if published_at is None else published_at
    submitted = row.submitted_at
    if submitted is None:  # it waited to its end
        submitted = row.ended_at if row.ended_at is not None else published
    marks = [row.claimed_at, submitted, row.started_at, row.ended_at, published]
    known: list[float] = []
    for mark in marks:
        last = known[-1] if known else row.claimed_at
        known.append(last if mark is None else max(mark, last))
    phases = ("wait", "queue", "run", "collect")
    spans = {name: known[i + 1] - known[i] for i, name in enumerate(phases)}
    return {**spans, "total": known[-1] - known[0]}


def job_of(fact: JobFact) -> JobId | None:
    """The job a fact names; None for a hint, which names a prompt."""
    if isinstance(fact, Answer):
        return fact.token.job
    return getattr(fact, "job", None)
