"""Makes docs/job-states.md from the code: ``python docs/make_job_states.py``.

What may happen is read from the state table; where it leads is found by trying: every rule is
given every sort of fact, in rows and moments that bring out each of its branches. A test holds the
committed page to this.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from comfyd.core import facts, job, lifecycle, moves, orders
from comfyd.core.job import Context, Job, Live
from comfyd.core.model import (
    End,
    JobId,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    Staged,
    State,
    prompt_id_of,
)
from comfyd.core.policy import Policy

PAGE: Final = Path(__file__).with_name("job-states.md")

MEANING: Final[Mapping[State, str]] = {
    State.QUEUED: "The claimed file and the row exist; no prompt does. The job waits for a place.",
    State.HELD: "As queued, but a person must look first: `held` says why.",
    State.SUBMITTING: "The intent to send this prompt, to this server, under this prompt id."
    " Committed before the first byte is sent.",
    State.SUBMITTED: "The server has the prompt, or had it. Shown as *running* once seen to run.",
    State.STOPPING: "The prompt is to be ended; `why` is the outcome to take then.",
    State.COLLECTING: "The outcome is decided. Outputs, if any, are being downloaded and staged.",
    State.PUBLISHING: "The result is complete in `stage/`, and the hash of its manifest is here.",
    State.DONE: "The result is in `done/`, or a consumer has taken it. Final.",
    State.FAILED: "The result is in `failed/`, or a consumer has taken it. Final.",
    State.CANCELLED: "The same, for a job that a person cancelled. Final.",
}

_ORDERS: Final = {ask: getattr(orders, ask.name.capitalize()) for ask in job.Ask}
_OLD_S: Final = -1e6  # longer ago than any patience
_TOKEN: Final = facts.Token(JobId("job"), 1, 1)
_RECORDS: Final = [Record(end=end) for end in End]
_DONE: Final = Outcome(state=State.DONE)
_FAILED: Final = Outcome(state=State.FAILED, reason=Reason.LOST, message="m")
_CANCELLED: Final = Outcome(state=State.CANCELLED, reason=Reason.CANCELLED, message="m")


def _told() -> list[job.JobFact]:
    """Every sort of fact, with each value that a rule may tell apart."""
    t = _TOKEN
    return [
        facts.Accepted(token=t),
        facts.Accepted(token=t, node_errors={"1": {}}),
        facts.Rejected(token=t, message="m"),
        facts.NotSent(token=t, reason="refused"),
        facts.SubmitUnknown(token=t, reason="timeout"),
        facts.Unsendable(token=t, message="m"),
        *(
            facts.Probed(token=t, presence=presence)
            for presence in facts.Presence
            if presence is not facts.Presence.FINISHED
        ),
        *(
            facts.Probed(token=t, presence=facts.Presence.FINISHED, record=record)
            for record in _RECORDS
        ),
        *(
            facts.Fetched(token=t, result=result)
            for result in facts.FetchResult
            if result is not facts.FetchResult.FOUND
        ),
        *(
            facts.Fetched(token=t, result=facts.FetchResult.FOUND, record=record)
            for record in _RECORDS
        ),
        facts.Collected(token=t, staged=Staged(manifest_sha256="0")),
        *(facts.CollectFailed(token=t, cause=cause, message="m") for cause in facts.Uncollected),
        facts.Published(token=t),
        facts.PublishConflict(token=t, message="m"),
        facts.PublishDelayed(token=t, message="m"),
        facts.Retired(token=t),
        *(
            facts.Hint(server=ServerName("gpu"), prompt_id=prompt_id_of(t.job, 1), sign=sign)
            for sign in facts.Sign
        ),
        facts.CheckAsked(job=_TOKEN.job),
        facts.CancelAsked(job=_TOKEN.job),
        facts.ReleaseAsked(job=_TOKEN.job),
        facts.HoldAsked(job=_TOKEN.job, reason="m"),
        job.Assigned(ServerName("gpu"), "http://gpu", "c"),
        job.Orphaned("deaf"),
        job.Doubted(),
        job.Due(),
    ]


def _row(state: State, **changes: Any) -> Row:
    placed = state not in {State.QUEUED, State.HELD}
    row = Row(job=_TOKEN.job, seq=1, state=state, attempt=1, dropped=1, max_attempts=3)
    if placed:
        row = msgspec.structs.replace(
            row,
            server=ServerName("gpu"),
            origin="http://gpu",
            prompt_id=prompt_id_of(_TOKEN.job, 1),
        )
    return msgspec.structs.replace(row, **changes)


def _rows(state: State) -> Iterator[Row]:
    outcomes: tuple[Outcome | None, ...] = (None,)
    reasons: tuple[Outcome | None, ...] = (None,)
    match state:
        case State.SUBMITTING:
            reasons = (None, _CANCELLED)
        case State.STOPPING:
            reasons = (_CANCELLED, _FAILED)
        case State.COLLECTING | State.PUBLISHING:
            outcomes = (_DONE, _FAILED, _CANCELLED)
        case State.DONE | State.FAILED | State.CANCELLED:
            outcomes = (_DONE if state is State.DONE else _FAILED,)
        case State.QUEUED | State.HELD | State.SUBMITTED:
            pass
    for why, outcome, charged, crashes in itertools.product(reasons, outcomes, (0, 2), (0, 3)):
        yield _row(state, why=why, outcome=outcome, charged=charged, crashes=crashes)


def _lives(order: job.Ask | None) -> Iterator[Live]:
    for old, ended in itertools.product((False, True), repeat=2):
        past_s = _OLD_S if old else None
        yield Live(
            seq=1,
            order=order,
            look_s=math.inf if order else 0.0,
            since_s=_OLD_S if old else 0.0,
            tries=9 if old else 0,
            absent_s=past_s,
            unsure_s=past_s,
            unreadable_s=past_s,
            ended=ended,
        )


def _order_for(fact: job.JobFact) -> job.Ask | None:
    """The order whose answer *fact* is; None for what is no answer."""
    answers = lifecycle.ANSWERS_TO.items()
    return next((ask for ask, kinds in answers if isinstance(fact, kinds)), None)


def leads_to(state: State, kind: type) -> set[State]:
    """The states that a fact of *kind* can bring a job to from *state*, itself included."""
    context = Context(now_s=0.0, u=0.0, policy=Policy())
    found = set()
    for fact in _told():
        if isinstance(fact, kind):
            for row, live in itertools.product(_rows(state), _lives(_order_for(fact))):
                found.add(lifecycle.step(Job(row, live), fact, context).job.row.state)
    return found


def _about(thing: object) -> str:
    """The first paragraph of its docstring, fit for a table."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split()).replace("``", "`")


def _rule(rule: lifecycle.Rule) -> str:
    return f"`{rule.__module__.rpartition('.')[2]}.{rule.__name__}`"


def _words(states: set[State]) -> str:
    return ", ".join(state.value for state in State if state in states) or "-"


def _order(asks: Mapping[State, job.Ask], state: State) -> str:
    return asks[state].name.capitalize() if state in asks else "-"


def page() -> str:
    """The whole page."""
    kinds = {state: [kind for at, kind in lifecycle.TABLE if at is state] for state in State}
    ways = {
        (state, kind): leads_to(state, kind) - {state} for state in State for kind in kinds[state]
    }
    leaves = {state: set().union(*(ways[state, kind] for kind in kinds[state])) for state in State}
    at_load = dict(lifecycle.AT_LOAD)
    lines = [
        "# The states of a job",
        "",
        "Made from the code by `python docs/make_job_states.py`; do not edit.",
        "",
        "A row is committed before any order that it leads to is given. So a state says what is"
        " intended or doubted, never what is merely hoped.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> queued: claimed",
        "    [*] --> collecting: claimed, but no job",
        *(
            f"    {state.value} --> {target.value}"
            for state in State
            for target in State
            if target in leaves[state]
        ),
        *(f"    {state.value} --> [*]" for state in State if state.final),
        "```",
        "",
        "| state | committed means | order on entry | order at load | leads to |",
        "|---|---|---|---|---|",
        *(
            f"| {state.value} | {MEANING[state]} | {_order(moves.ON_ENTRY, state)}"
            f" | {_order(at_load, state)} | {_words(leaves[state])} |"
            for state in State
        ),
        "",
        "*At load* is when a daemon finds the row in its journal at start: there is no other"
        " recovery. A job found submitting is looked for only after `audit.lost_grace`, since its"
        " request may still be on its way; a final one is retired only if it was not yet. A job"
        " found queued or collecting that was at hand in three crashes in a row becomes held.",
        "",
        "| order | means |",
        "|---|---|",
        *(f"| {ask.name.capitalize()} | {_about(_ORDERS[ask])} |" for ask in job.Ask),
        "",
        "## What may happen in each state",
        "",
        "A hint or a wish that has no line here is ignored and counted"
        " (`comfyd_facts_dropped_total`). An answer to an order that is no longer current is too;"
        " a current one without a line is a bug, and the daemon stops. *Leads to* names the other"
        " states; without one, the job stays and may be given an order.",
    ]
    for state in State:
        lines += ["", f"### {state.value}", "", "| fact | rule | leads to |", "|---|---|---|"]
        for kind in kinds[state]:
            rule = lifecycle.TABLE[state, kind]
            lines.append(
                f"| {kind.__name__} | {_rule(rule)}: {_about(rule)} | {_words(ways[state, kind])} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
