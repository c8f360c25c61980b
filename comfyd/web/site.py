"""All routes as one ASGI application: read-only, bounded, and with headers that keep it inert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyd.errors import ComfydError
from comfyd.metrics import Metrics
from comfyd.web import api, exporter, page
from comfyd.web.api import BadQuestion, Reads, problem
from comfyd.web.door import Door
from comfyd.web.exporter import Readiness

_log: Any = structlog.get_logger("comfyd.web.site")

REQUESTS_MAX: Final = 32
"""Answered at once; more get a 503. Each holds one page, half a megabyte at most."""
REQUEST_S: Final = 10.0
"""For one request, its answer's way to a slow reader included."""

_HEADERS: Final = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


def build(
    metrics: Metrics,
    reads: Reads,
    readiness: Callable[[], Readiness],
    *,
    door: Door | None = None,
    headers: Callable[[], Mapping[str, str]] = dict,
) -> ASGIApp:
    """The application; needs no start-up and holds nothing open.

    Args:
      door: Asks who wants to read, whatever it is; None lets everybody.
      headers: Of all answers, in the place of ours; one without a value is left out.

    """
    app = Starlette(
        routes=[
            *exporter.routes(metrics, reads.snapshot, readiness),
            *api.routes(reads),
            *page.routes(reads),
        ],
        exception_handlers={
            BadQuestion: _bad_question,
            HTTPException: _no_such_page,
            ComfydError: _unavailable,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    return _Guard(app, door, headers)


async def _bad_question(request: Request, error: Exception) -> Response:
    return problem(400, str(error))


async def _no_such_page(request: Request, error: Exception) -> Response:
    return problem(getattr(error, "status_code", 404), "There is no such page.")


async def _unavailable(request: Request, error: Exception) -> Response:
    _log.warning("request_not_answered", path=request.url.path, problem=str(error))
    return problem(503, "The daemon cannot answer this now; its log says why.")


async def _bug(request: Request, error: Exception) -> Response:
    return problem(500, "The daemon met a bug while answering; its log has the details.")


class _Guard:
    """Around everything: who is let in, GET alone, so many at once, so long each, our headers."""

    def __init__(
        self, app: ASGIApp, door: Door | None, headers: Callable[[], Mapping[str, str]]
    ) -> None:
        self._app = app
        self._door = door
        self._headers = headers
        self._places = trio.CapacityLimiter(REQUESTS_MAX)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                theirs = {name.lower().encode(): v.encode() for name, v in self._headers().items()}
                given = [each for each in message["headers"] if each[0].lower() not in theirs]
                own = {name.lower() for name, _ in given}
                ours = {name: text for name, text in _HEADERS.items() if name not in own} | theirs
                message["headers"] = [*given, *(each for each in ours.items() if each[1])]
            await send(message)

        # Before a place is taken: who may not read keeps nobody out.
        if self._door is not None:
            given = next((v for n, v in scope["headers"] if n.lower() == b"authorization"), None)
            if (refusal := await self._door.refusal(given)) is not None:
                await refusal(scope, receive, send_with_headers)
                return
        place = object()
        try:
            self._places.acquire_on_behalf_of_nowait(place)
        except trio.WouldBlock:
            await problem(503, "Too many requests at once.")(scope, receive, send_with_headers)
            return
        try:
            with trio.move_on_after(REQUEST_S) as deadline:
                if scope["method"] == "GET":
                    await self._app(scope, receive, send_with_headers)
                else:
                    refused = problem(405, "Everything here is read with GET.")
                    refused.headers["allow"] = "GET"
                    await refused(scope, receive, send_with_headers)
        finally:
            self._places.release_on_behalf_of(place)
        if deadline.cancelled_caught and not begun:
            late = problem(503, "The daemon is too busy to answer in time.")
            await late(scope, receive, send_with_headers)
