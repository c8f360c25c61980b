"""Takes people's wishes about jobs and servers, and tells what really came of each.

A wish is left in the inbox like any other fact, so it is committed before anything acts on it; the
reply is read from what was committed (``core.wishes``), never told from what was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import structlog
import trio

from comfyd.core import wishes
from comfyd.core.engine import Engine
from comfyd.core.facts import (
    Claimed,
    DrainAsked,
    Fact,
    ForgetAsked,
    PauseAsked,
    ResumeAsked,
    Tick,
)
from comfyd.core.model import JobId, Row, ServerName
from comfyd.core.present import journal_state, shown_state
from comfyd.core.strictjson import quoted
from comfyd.core.wishes import Reply
from comfyd.errors import DiskFull, JobFileError, UsageError
from comfyd.journal.thread import Journal
from comfyd.services.dispatcher import Dispatcher
from comfyd.services.inbox import Inbox
from comfyd.web import asked

Verb = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

CONFIRM_S: Final = 25.0  # a person waits no longer than this for a prompt to be seen gone
PAGE: Final = 500  # rows looked at in one request

_log: Any = structlog.get_logger("comfyd.wishes")


class Wishes:
    """See the module.

    Args:
      again: Claims what a final job was made of as a new job; blocking. Raises JobFileError if
        that cannot be, DiskFull if it cannot be now.

    Cancellation of a verb: a wish that was left is carried out all the same.

    """

    def __init__(
        self,
        journal: Journal,
        engine: Engine,
        inbox: Inbox,
        dispatcher: Dispatcher,
        *,
        again: Callable[[Row], Claimed],
    ) -> None:
        self._journal = journal
        self._engine = engine
        self._inbox = inbox
        self._dispatcher = dispatcher
        self._again = again
        self._retrying = trio.Lock()  # or two at once might make two jobs of one key

    def verbs(self) -> dict[str, Verb]:
        return {
            "select": self._select,
            **{verb: partial(self._wish, verb) for verb in wishes.VERBS},
            "retry": self._retry,
            "pause": partial(self._pause, True),
            "resume": self._resume,
            "drain": self._drain,
            "forget": self._forget,
        }

    # --- jobs ------------------------------------------------------------------------------------

    async def _select(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One page of the jobs that a verb would be for, newest first: their ids, and what to ask
        for next (``after``; null at the end). A page may be empty and not the last."""
        shown, pattern = asked.state_in(request), asked.pattern_in(request)
        verb = request.get("for")
        if not isinstance(verb, str) or verb not in wishes.CONCERNED:
            raise UsageError(f"for must be one of {', '.join(wishes.CONCERNED)}")
        states = wishes.CONCERNED[verb] if shown is None else (shown,)
        kept = {journal_state(state) for state in states}
        only = next(iter(kept)) if len(kept) == 1 else None
        rows = await self._journal.rows(only, limit=PAGE, after=asked.after_in(request))
        jobs = [
            row.job
            for row in rows
            if shown_state(row) in states and (pattern is None or fnmatchcase(row.job, pattern))
        ]
        if verb == "retry":  # or each time that everything is retried, there would be twice as much
            jobs = [job for job in jobs if not await self._was_retried(job)]
        return {"jobs": jobs, "after": rows[-1].seq if len(rows) == PAGE else None}

    async def _was_retried(self, job: JobId) -> bool:
        return any(event.kind == "retried" for event in await self._journal.events(job))

    async def _wish(self, verb: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Tell the core each wish, wait until it is carried out or CONFIRM_S are over, and tell."""
        fact_of, reply_of = wishes.VERBS[verb]
        chosen = await self._chosen(request)
        jobs = [each.job for each in chosen if isinstance(each, Row)]
        with trio.move_on_after(CONFIRM_S):
            await self._heeded([fact_of(job) for job in jobs])
            while any(self._is_ending(job) for job in jobs):
                await self._dispatcher.settled()
            await self._heeded([Tick()])  # by then, what was seen in memory is committed
        return _told(
            verb,
            [
                reply_of(each, await self._committed(each)) if isinstance(each, Row) else each
                for each in chosen
            ],
        )

    async def _retry(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make a new job of each; done when its row is committed."""
        told: list[Reply | tuple[Row, Row]] = []
        by_key: dict[str | None, Row] = {}  # made here, and maybe not in the journal yet
        async with self._retrying:
            for each in await self._chosen(request):
                made = each if isinstance(each, Reply) else await self._made_again(each, by_key)
                told.append(made)
            with trio.move_on_after(CONFIRM_S):
                await self._heeded([Tick()])
        return _told(
            "retry",
            [
                each
                if isinstance(each, Reply)
                else wishes.retried(*each, await self._journal.get(each[1].job))
                for each in told
            ],
        )

    async def _made_again(self, row: Row, by_key: dict[str | None, Row]) -> tuple[Row, Row] | Reply:
        """The old row and the one that was made of it, which the core is told of; or why not."""
        keyed = None
        if row.key is not None:
            keyed = by_key.get(row.key) or await self._journal.keyed(row.key)
        why = wishes.why_no_retry(row, keyed)
        if why:
            return wishes.not_retried(row, why)
        try:
            claimed = await trio.to_thread.run_sync(self._again, row)
        except (JobFileError, DiskFull) as error:
            return wishes.not_retried(row, f"not retried: {error}")
        # Nothing is awaited in between: a verb that is cancelled leaves no file without its row.
        self._inbox.put(claimed)
        by_key[row.key] = claimed.row
        return row, claimed.row

    async def _chosen(self, request: Mapping[str, Any]) -> list[Row | Reply]:
        """The jobs that are meant, as they are now, in order; or the reply for one that is not to
        be touched: an unknown one, or one that is no longer in the state it was chosen for."""
        shown = asked.state_in(request)
        chosen: dict[str, Row | Reply] = {}
        for text in asked.jobs_in(request):
            try:
                row = await asked.found(self._journal, text)
                chosen[row.job] = row
            except UsageError as error:
                chosen[text] = wishes.unknown(text, str(error))
        return [
            each if isinstance(each, Reply) else self._now(each, shown) for each in chosen.values()
        ]

    def _now(self, row: Row, shown: str | None) -> Row | Reply:
        job = self._engine.jobs.get(row.job)
        row = row if job is None else job.row
        return row if shown in (None, shown_state(row)) else wishes.moved_on(row, shown or "")

    def _is_ending(self, job_id: JobId) -> bool:
        job = self._engine.jobs.get(job_id)
        return job is not None and wishes.is_ending(job.row)

    async def _committed(self, row: Row) -> Row:
        return await self._journal.get(row.job) or row

    async def _heeded(self, facts: Iterable[Fact]) -> None:
        """Leave *facts*, and wait until they have been dealt with."""
        number = 0
        for fact in facts:
            number = self._inbox.leave(fact)
        await self._dispatcher.settled(number)

    async def _written(self, fact: Fact) -> bool:
        """Leave *fact*; whether it was dealt with, and so committed, within CONFIRM_S."""
        with trio.move_on_after(CONFIRM_S) as patience:
            await self._heeded([fact])
        return not patience.cancelled_caught

    # --- intake and servers ----------------------------------------------------------------------

    async def _pause(self, paused: bool, request: Mapping[str, Any]) -> dict[str, Any]:
        engine, before = self._engine, self._engine.paused
        written = await self._written(PauseAsked(paused=paused))
        if paused:
            told = wishes.paused(before, engine.paused)
        else:
            told = wishes.resumed(before, engine.paused, engine.servers.values())
        verb = "pause" if paused else "resume"
        return _result(verb, told if written else wishes.UNWRITTEN, paused=engine.paused)

    async def _resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("server") is None:
            return await self._pause(False, request)
        name, engine = self._server(request), self._engine
        before, was = engine.servers[name], engine.trouble(name)
        written = await self._written(ResumeAsked(server=name))
        # A reload may have taken it away meanwhile.
        after = engine.servers.get(name)
        if after is None:
            return _result("resume", wishes.departed(name), server=name)
        left = len(engine.on_server[name])
        told = wishes.server_resumed(before, was, after, engine.trouble(name), left)
        return _result("resume", told if written else wishes.UNWRITTEN, server=name)

    async def _drain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name, engine = self._server(request), self._engine
        before = engine.servers[name]
        written = await self._written(DrainAsked(server=name))
        after = engine.servers.get(name)
        if after is None:
            return _result("drain", wishes.departed(name), server=name)
        left = len(engine.on_server[name])
        told = wishes.drained(before, after, left)
        return _result("drain", told if written else wishes.UNWRITTEN, server=name, in_flight=left)

    async def _forget(self, request: Mapping[str, Any]) -> dict[str, Any]:
        engine = self._engine
        # One that is no longer configured may still have prompts of ours.
        name = self._server(request, engine.sent_to())
        why = wishes.why_not_forget(name, engine.servers.get(name))
        if why and not engine.forgettable(name):  # such as what it had by another URL
            in_flight = engine.sent_to()[name]
            return _result("forget", (False, why), server=name, in_flight=in_flight)

        def left_there() -> int:
            return sum(job.row.state.in_flight for job in engine.forgettable(name))

        before = left_there()
        written = await self._written(ForgetAsked(server=name))
        left = left_there()
        told = wishes.forgotten(name, before, left)
        return _result("forget", told if written else wishes.UNWRITTEN, server=name, in_flight=left)

    def _server(self, request: Mapping[str, Any], more: Iterable[ServerName] = ()) -> ServerName:
        name = ServerName(asked.server_in(request))
        known = dict.fromkeys([*self._engine.servers, *more])
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(f"there is no server {quoted(name)}; there are: {names}")
        return name


def _told(verb: str, replies: list[Reply]) -> dict[str, Any]:
    _log.info("asked", verb=verb, **Counter(reply.outcome for reply in replies))
    return {"results": [reply.to_dict() for reply in replies]}


def _result(verb: str, told: tuple[bool, str], **more: object) -> dict[str, Any]:
    ok, what = told
    _log.info("asked", verb=verb, ok=ok, what=what)
    return {"result": {"ok": ok, "what": what, **more}}
