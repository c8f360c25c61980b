"""Jobs as JSON values for people and scripts: what the command line and the web pages show.

Neither the claimed file nor anything a node returned is in here; those are in the job's result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from comfyd.core.job import durations_s
from comfyd.core.model import Row, State

RUNNING: Final = "running"

# Where a job is, in a word: its state, and ``running`` for a submitted job that was seen to run.
LIVE_STATES: Final = (
    "queued", "held", "submitting", "submitted", RUNNING, "stopping", "collecting", "publishing",
)  # fmt: skip
SHOWN_STATES: Final = (*LIVE_STATES, "done", "failed", "cancelled")

# ``user:password@`` up to the last ``@`` of the authority, wherever the URL stands in a text.
_USERINFO: Final = re.compile(r"(?<=://)[^/?#\s]*@")


class Told(Protocol):
    """One line of a job's story, as the journal keeps it; *at* is seconds since the epoch."""

    @property
    def at(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


def shown_state(row: Row) -> str:
    """The one of SHOWN_STATES that *row* is in."""
    running = row.state is State.SUBMITTED and row.started_at is not None
    return RUNNING if running else row.state.value


def shown_since(row: Row, since_s: float) -> float:
    """When *row* entered the state in which it is shown.

    Args:
      since_s: When it entered that of the journal, as far as this process knows: after a restart
        the row itself knows better.

    """
    if row.state is not State.SUBMITTED or row.submitted_at is None:
        return since_s
    return row.submitted_at if row.started_at is None else row.started_at


def journal_state(shown: str) -> State:
    """The state under which the journal keeps a row shown as *shown*.

    Raises:
      ValueError: *shown* is not one of SHOWN_STATES.

    """
    return State.SUBMITTED if shown == RUNNING else State(shown)


def shown_counts(counts: Mapping[State, int], running: int) -> dict[str, int]:
    """The journal's *counts* by shown state, all of them, with *running* set apart."""
    shown = {state: counts.get(journal_state(state), 0) for state in SHOWN_STATES}
    return {**shown, RUNNING: running, "submitted": max(0, shown["submitted"] - running)}


def rfc3339(at: float) -> str:
    """*at* (seconds since the epoch) in UTC with milliseconds: ``2026-01-31T23:59:59.123Z``."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return moment.removesuffix("+00:00") + "Z"


def bare_url(url: str) -> str:
    """*url* without user, password, query and fragment: fit to be shown."""
    return _USERINFO.sub("", re.split(r"[?#]", url, maxsplit=1)[0])


def job_summary(row: Row) -> dict[str, Any]:
    """One line of a list of jobs, as JSON values.

    Times are RFC 3339 in UTC and None for what has not happened (in this attempt); a duration is 0
    for a phase that was not reached.
    """
    outcome = row.outcome or row.why
    marks = {
        "claimed": row.claimed_at,
        "submitted": row.submitted_at,
        "started": row.started_at,
        "ended": row.ended_at,
        "published": row.published_at,
    }
    return {
        "job": row.job,
        "seq": row.seq,
        "state": shown_state(row),
        "server": row.server,
        "prompt_id": row.prompt_id,
        "attempts": row.attempt,
        "charged": row.charged,
        "priority": row.priority,
        "completion": row.completion.value if row.completion else None,
        "reason": outcome.reason.value if outcome and outcome.reason else None,
        "message": (outcome.message if outcome else "") or row.held or _awaited(row),
        "times": {name: None if at is None else rfc3339(at) for name, at in marks.items()},
        "durations_s": {phase: round(span_s, 3) for phase, span_s in durations_s(row).items()},
    }


def _awaited(row: Row) -> str:
    """What a job waits for that some server has said no to, or let down; "" for any other."""
    if row.state is not State.QUEUED:
        return ""
    if row.verdicts:
        said = "; ".join(f"{verdict.server}: {verdict.outcome.message}" for verdict in row.verdicts)
        return f"Waits for a server that has not said no to it yet. {said}"
    sign = row.let_down
    if sign is None or not sign.times:
        return ""
    times = "once" if sign.times == 1 else f"{sign.times} times in a row, the last time"
    return f"Is tried again: it was let down {times} by {sign.server} ({sign.said.rstrip('.')})."


def job_story(row: Row, events: Iterable[Told], *, full: bool = False) -> dict[str, Any]:
    """All there is to tell of one job, as JSON values.

    Args:
      events: In the order they were written.
      full: Also what its owner wrote or the server quoted from the job (metadata, key, drawn
        values, detail): for those who may read the spool, not for everyone who can reach a port.

    """
    staged = row.staged
    told = [
        {"at": rfc3339(event.at), "kind": event.kind, "data": dict(event.data)} for event in events
    ]
    story = job_summary(row) | {
        "max_attempts": row.max_attempts,
        "retry_of": row.retry_of,
        "outputs": {"files": staged.outputs, "bytes": staged.bytes} if staged else None,
        "warnings": list(row.warnings),
        "verdicts": [
            {
                "server": verdict.server,
                "reason": verdict.outcome.reason.value if verdict.outcome.reason else None,
                "message": verdict.outcome.message,
            }
            for verdict in row.verdicts
        ],
        "abandoned": [
            {"server": server, "url": bare_url(origin), "prompt_id": prompt_id}
            for server, origin, prompt_id in row.abandoned
        ],
        "events": told,
    }
    if full:
        outcome = row.outcome or row.why
        story |= {
            "payload": row.payload,
            "sha256": row.sha256,
            "key": row.key,
            "metadata": row.metadata,
            "drawn": row.drawn,
            "detail": outcome.detail if outcome else {},
        }
    return story
