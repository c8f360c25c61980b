"""``/api/v1``: what the daemon and its jobs look like, as JSON.

Every answer is made by the pure functions that the command line uses too, so the two never differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from comfyd.core.model import Row, State
from comfyd.core.present import (
    SHOWN_STATES,
    Told,
    job_story,
    job_summary,
    journal_state,
    shown_state,
)
from comfyd.core.snapshot import Snapshot

LIMIT_DEFAULT: Final = 100
LIMIT_MAX: Final = 500  # about 400 KB of JSON, 10 ms of the event loop
SEQ_MAX: Final = 2**63 - 1  # what the journal can compare with


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Where the pages' data comes from. Each may raise ComfydError; the answer is then a 503.

    Attributes:
      snapshot: The daemon now.
      rows: One page of rows, newest first: in this state of the journal, at most *limit*, older
        than the seq *after*.
      latest: The rows in this final state that were published last, the last one first, at most
        *limit*.
      story: The row of exactly this job and its events, or None.

    """

    snapshot: Callable[[], Awaitable[Snapshot]]
    rows: Callable[[State | None, int, int | None], Awaitable[Iterable[Row]]]
    latest: Callable[[State, int], Awaitable[Iterable[Row]]]
    story: Callable[[str], Awaitable[tuple[Row, Iterable[Told]] | None]]


class BadQuestion(Exception):
    """The request cannot be understood; the text says what would be right."""


@dataclass(frozen=True, slots=True)
class Page:
    """The parameters of ``/api/v1/jobs``, checked."""

    state: str | None
    limit: int
    after: int | None


def page_of(params: Iterable[tuple[str, str]]) -> Page:
    """Check the query's *params*; an empty value is as good as none.

    Raises:
      BadQuestion: Unknown or repeated names, or values out of range.

    """
    given: dict[str, str] = {}
    for name, text in params:
        if name not in {"state", "limit", "after"}:
            raise BadQuestion("The parameters are state, limit and after.")
        if name in given:
            raise BadQuestion(f"The parameter {name} was given twice.")
        given[name] = text
    state = given.get("state") or None
    if state is not None and state not in SHOWN_STATES:
        raise BadQuestion(f"The parameter state is one of {', '.join(SHOWN_STATES)}.")
    limit = _number(given, "limit", 1, LIMIT_MAX)
    after = _number(given, "after", 0, SEQ_MAX)
    return Page(state, LIMIT_DEFAULT if limit is None else limit, after)


def _number(given: dict[str, str], name: str, low: int, high: int) -> int | None:
    text = given.get(name)
    if not text:
        return None
    if re.fullmatch(r"[0-9]{1,19}", text) is None or not low <= int(text) <= high:
        raise BadQuestion(f"The parameter {name} is a whole number from {low} to {high}.")
    return int(text)


def as_json(content: dict[str, Any], status: int = 200) -> Response:
    """*content* in ASCII alone: whatever is in a name, the answer is valid JSON in any encoding."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"
    return Response(text, status, media_type="application/json")


def problem(status: int, sentence: str) -> Response:
    """An answer that says in *sentence* what is wrong."""
    return as_json({"error": sentence}, status)


def routes(reads: Reads) -> list[Route]:
    """The routes of ``/api/v1``."""

    async def status(request: Request) -> Response:
        return as_json((await reads.snapshot()).to_dict())

    async def jobs(request: Request) -> Response:
        page = page_of(request.query_params.multi_items())
        state = None if page.state is None else journal_state(page.state)
        rows = list(await reads.rows(state, page.limit, page.after))
        # "running" and "submitted" are one state in the journal: a page of them may be short.
        shown = [row for row in rows if page.state in {None, shown_state(row)}]
        return as_json(
            {
                "jobs": [job_summary(row) for row in shown],
                "next": rows[-1].seq if len(rows) == page.limit else None,
            }
        )

    async def job(request: Request) -> Response:
        found = await reads.story(request.path_params["job"])
        if found is None:
            return problem(404, "There is no job of that name; use its whole id.")
        return as_json(job_story(*found))

    return [
        Route("/api/v1/status", status),
        Route("/api/v1/jobs", jobs),
        Route("/api/v1/jobs/{job}", job),
    ]
