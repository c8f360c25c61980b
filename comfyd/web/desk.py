"""The desk: answers people's questions, for pages and the control socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import trio

from comfyd.core.engine import Engine
from comfyd.core.facts import CheckAsked
from comfyd.core.model import JobId, Row, State
from comfyd.core.present import job_story, job_summary, journal_state, shown_state
from comfyd.errors import UsageError
from comfyd.journal.store import Event
from comfyd.journal.thread import Journal
from comfyd.services.dispatcher import Dispatcher
from comfyd.services.inbox import Inbox
from comfyd.services.overview import Overview
from comfyd.web import asked

Verb = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

CHECK_S: Final = 25.0  # a person waits no longer than this for an audit's verdict
LIMIT_MAX: Final = 500
LIMIT_DEFAULT: Final = 100


class Desk:
    """See the module. A wish that cannot be is a UsageError with one sentence."""

    def __init__(
        self,
        journal: Journal,
        engine: Engine,
        inbox: Inbox,
        dispatcher: Dispatcher,
        overview: Overview,
    ) -> None:
        self._journal = journal
        self._engine = engine
        self._inbox = inbox
        self._dispatcher = dispatcher
        self._overview = overview

    # --- for the pages ---------------------------------------------------------------------------

    async def rows(self, state: State | None, limit: int, after: int | None) -> Iterable[Row]:
        return await self._journal.rows(state, limit=limit, after=after)

    async def latest(self, state: State, limit: int) -> Iterable[Row]:
        return await self._journal.latest(state, limit=limit)

    async def exactly(self, job: str) -> tuple[Row, tuple[Event, ...]] | None:
        row = await self._journal.get(JobId(job))
        return None if row is None else (row, await self._journal.events(row.job))

    # --- for the control socket ------------------------------------------------------------------

    def verbs(self) -> dict[str, Verb]:
        return {
            "status": self._status,
            "jobs": self._jobs,
            "show": self._show,
            "check": self._check,
        }

    async def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"status": (await self._overview.snapshot()).to_dict()}

    async def _jobs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        shown, after, limit = asked.state_in(request), asked.after_in(request), request.get("limit")
        state = None if shown is None else journal_state(shown)
        count = LIMIT_DEFAULT if not isinstance(limit, int) else max(1, min(limit, LIMIT_MAX))
        rows = await self._journal.rows(state, limit=count, after=after)
        return {"jobs": [job_summary(row) for row in rows if shown in (None, shown_state(row))]}

    async def _show(self, request: Mapping[str, Any]) -> dict[str, Any]:
        row = await self._found(request)
        return {"story": job_story(row, await self._journal.events(row.job), full=True)}

    async def _check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Audit one job now, and say what came of it."""
        row = await self._found(request)
        before = shown_state(row)
        job = self._engine.jobs.get(row.job)
        if job is not None and job.row.state.in_flight:
            self._inbox.put(CheckAsked(job=row.job))
            last = job.live.seq
            with trio.move_on_after(CHECK_S):
                while self._is_looking(row.job, last):
                    await self._dispatcher.settled()
        row = await self._journal.get(row.job) or row
        events = await self._journal.events(row.job)
        verdicts = [event.data.get("verdict") for event in events if event.kind == "audit"]
        return {
            "result": {
                "job": row.job,
                "before": before,
                "after": shown_state(row),
                "verdict": verdicts[-1] if verdicts else None,
                "summary": job_summary(row),
            }
        }

    def _is_looking(self, job_id: JobId, last: int) -> bool:
        """Whether a look ordered after the order *last*, or what it led to, is still under way."""
        job = self._engine.jobs.get(job_id)
        if job is None or job.row.retired:
            return False
        if job.row.state.in_flight:
            return job.live.seq == last or job.live.order is not None
        return not job.row.state.final and job.row.state not in {State.QUEUED, State.HELD}

    async def _found(self, request: Mapping[str, Any]) -> Row:
        text = request.get("job")
        if not isinstance(text, str) or not text:
            raise UsageError("say which job: its id, the beginning of it, or a prompt id")
        return await asked.found(self._journal, text)
