"""HTTP/1.1 over any trio stream, with the ways in which an answer can go wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

MAX_BODY_BYTES: Final = 100 * 1024 * 1024
_READ_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Request:
    """One request, its body read."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON.

        Raises:
          ValueError: if it is none.

        """
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
      sent_bytes: Stop after so many bytes of the body and close; None sends it all.

    """

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    sent_bytes: int | None = None


class Hangup:
    """Instead of an answer: the connection is closed."""


class Silence:
    """Instead of an answer: the connection stays open and nothing ever comes."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """Instead of an answer: the stream becomes a WebSocket, which this function serves."""

    serve: Callable[[trio.abc.Stream, h11.Request], Awaitable[None]]


Answer = Response | Hangup | Silence | Upgrade
Handler = Callable[[Request], Awaitable[Answer]]


def json_response(value: object, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode(), "application/json; charset=utf-8")


def server_error() -> Response:
    """What aiohttp answers when a request handler raised."""
    text = b"500 Internal Server Error\n\nServer got itself in trouble"
    return Response(500, text, "text/plain; charset=utf-8")


def too_large(limit_bytes: int) -> Response:
    """What aiohttp answers to a request whose body is larger than it takes."""
    text = f"Maximum request body size {limit_bytes} exceeded."
    return Response(413, text.encode(), "text/plain; charset=utf-8")


async def serve_http(stream: trio.abc.Stream, handle: Handler) -> None:
    """Serve requests on *stream* until either side closes it. The caller closes the stream."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_READ_BYTES)
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await _serve_one(stream, connection, handle):
            connection.start_next_cycle()


async def _serve_one(stream: trio.abc.Stream, connection: h11.Connection, handle: Handler) -> bool:
    """Serve one request; whether the connection can take another."""
    try:
        head = await _next_event(stream, connection)
        if not isinstance(head, h11.Request):
            return False
        body = bytearray()
        if _declared_bytes(head) > MAX_BODY_BYTES:
            await _send(stream, connection, too_large(MAX_BODY_BYTES))
            return False
        if not _is_upgrade(head):
            while isinstance(event := await _next_event(stream, connection), h11.Data):
                if len(body) <= MAX_BODY_BYTES:
                    body += event.data
            if not isinstance(event, h11.EndOfMessage):
                return False
    except h11.RemoteProtocolError:
        await _send(stream, connection, Response(400))
        return False
    if len(body) > MAX_BODY_BYTES:
        await _send(stream, connection, too_large(MAX_BODY_BYTES))
        return False
    answer = await handle(_request(head, bytes(body)))
    match answer:
        case Upgrade():
            await answer.serve(stream, head)
            return False
        case Hangup():
            return False
        case Silence():
            while await stream.receive_some(_READ_BYTES):
                pass
            return False
        case Response():
            await _send(stream, connection, answer)
            return connection.our_state is h11.DONE and connection.their_state is h11.DONE


def _is_upgrade(head: h11.Request) -> bool:
    return any(k == b"upgrade" and v.lower() == b"websocket" for k, v in head.headers)


def _declared_bytes(head: h11.Request) -> int:
    return next((int(value) for key, value in head.headers if key == b"content-length"), 0)


def _request(head: h11.Request, body: bytes) -> Request:
    url = urlsplit(head.target.decode("ascii"))
    return Request(
        method=head.method.decode("ascii"),
        path=unquote(url.path),
        query=dict(parse_qsl(url.query, keep_blank_values=True)),
        headers={key.decode("ascii"): value.decode("latin-1") for key, value in head.headers},
        body=body,
    )


async def _next_event(stream: trio.abc.Stream, connection: h11.Connection) -> h11.Event | type:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        if connection.they_are_waiting_for_100_continue:
            headers: list[tuple[bytes, bytes]] = []
            go_on = h11.InformationalResponse(status_code=100, headers=headers)
            await stream.send_all(connection.send(go_on) or b"")
        connection.receive_data(bytes(await stream.receive_some(_READ_BYTES)))


async def _send(stream: trio.abc.Stream, connection: h11.Connection, response: Response) -> None:
    headers = {"Server": "comfyd-simulator", "Content-Length": str(len(response.body))}
    headers["Date"] = formatdate(usegmt=True)
    if response.content_type is not None:
        headers["Content-Type"] = response.content_type
    headers |= response.headers
    if response.status >= 500:
        headers["Connection"] = "close"
    # aiohttp writes headers in UTF-8, whatever a file's name is.
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    head = h11.Response(status_code=response.status, headers=fields)
    out = connection.send(head) or b""
    if response.sent_bytes is not None:
        await stream.send_all(out + response.body[: response.sent_bytes])
        raise trio.BrokenResourceError("cut off on purpose")
    out += connection.send(h11.Data(data=response.body)) or b""
    out += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(out)
