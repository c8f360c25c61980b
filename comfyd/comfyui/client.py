"""HTTP to one ComfyUI server. The only module that imports httpx.

httpx's own timeouts are off: one cancel scope covers each exchange with its body. Its trace events
(an httpcore extension) tell what no exception does: whether a byte of the request was written, and
whether the connection was a reused one. No answer of any status is trusted for its length.
"""

from __future__ import annotations

import math
import re
import ssl
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import httpx
import msgspec
import trio

from comfyd.comfyui.download import Download, Downloaded
from comfyd.comfyui.endpoint import Endpoint, connect_error
from comfyd.core.model import FileRef, Record
from comfyd.core.wire import (
    QueueItem,
    QueueSnapshot,
    SubmitReply,
    SystemStats,
    decode_history,
    decode_listing,
    decode_queue,
    decode_remaining,
    decode_stats,
    decode_submit,
    decode_upload,
)
from comfyd.errors import AnswerTooLong, ServerProtocol, ServerStatus, ServerUnreachable

T = TypeVar("T")

MAX_QUEUE_BYTES: Final = 64 * 2**20  # whole graphs, ours and others'
MAX_HISTORY_BYTES: Final = 16 * 2**20
MAX_SUBMIT_BYTES: Final = 16 * 2**20  # a refusal repeats every choice of every wrong input
MAX_ANSWER_BYTES: Final = 2**20
MAX_ERROR_CHARS: Final = 2000
DECODE_IN_THREAD_BYTES: Final = 2**20

# Enough for a full window, its downloads and the probes; a server's backlog is 128.
MAX_CONNECTIONS: Final = 32
# Below any server's or proxy's own limit, so that a reused connection is rarely a closing one.
KEEPALIVE_S: Final = 5.0

_UPLOAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request, its body in parts. *repeatable*: the server may get it twice without harm."""

    method: str
    path: str
    within_s: float
    content: tuple[bytes, ...] = ()
    content_type: str = "application/json"
    repeatable: bool = True


class _Body(httpx.AsyncByteStream):
    """A request's body. Not an async generator: httpx leaves those behind when writing fails."""

    def __init__(self, content: tuple[bytes, ...]) -> None:
        self._parts = iter(content)

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        for part in self._parts:
            return part
        raise StopAsyncIteration


@dataclass(slots=True)
class _Exchange:
    """One try at a request: its deadline, and what became of it so far."""

    scope: trio.CancelScope
    connect_timeout_s: float
    deadline: float  # trio's clock
    fresh: bool = False  # a new connection was made for it
    connecting: bool = False
    sent: bool = False  # a byte of the request may have been written
    answered: bool = False  # the head of an answer came

    async def trace(self, event: str, _info: Mapping[str, Any]) -> None:
        match event:
            case "connection.connect_tcp.started":
                self.fresh = self.connecting = True
                end = trio.current_time() + self.connect_timeout_s
                self.scope.deadline = min(end, self.deadline)
            case "http11.send_request_headers.started":
                self.connecting, self.sent = False, True
                self.scope.deadline = self.deadline
            case "http11.receive_response_headers.complete":
                self.answered = True
            case _:
                pass


class Client:
    """All HTTP that comfyd ever speaks to one server.

    Every method raises, bare and never grouped:
      ServerRefused: The address refused the connection.
      ServerUnreachable: No complete answer in time; ``sent`` says whether the server may have
        seen the request.
      ServerStatus: Any status but 200; redirects too, for credentials must not follow them.
      ServerProtocol: An answer that is too long or does not decode.

    Cancellation: at every await; what the server did with a request is then unknown.

    Args:
      url, headers, ca_file: See ``Endpoint``.
      connect_timeout_s: For TCP and TLS together, within the other limits.
      submit_timeout_s: For POST /prompt with its answer.
      history_timeout_s: For /history, /queue and /interrupt.
      health_timeout_s: For GET /prompt and /system_stats.
      upload_timeout_s: For one upload.
      download_idle_timeout_s: For the head of a download, then for every 256 KiB of it.
      transport: Stands in for the network. Must report httpcore's trace events.

    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        ca_file: Path | None = None,
        connect_timeout_s: float,
        submit_timeout_s: float,
        history_timeout_s: float,
        health_timeout_s: float,
        upload_timeout_s: float,
        download_idle_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.endpoint = Endpoint.parse(url, headers, ca_file)
        self.limit(
            connect_timeout_s=connect_timeout_s,
            submit_timeout_s=submit_timeout_s,
            history_timeout_s=history_timeout_s,
            health_timeout_s=health_timeout_s,
            upload_timeout_s=upload_timeout_s,
            download_idle_timeout_s=download_idle_timeout_s,
        )
        self._http = httpx.AsyncClient(
            # For plain http an empty context: it trusts nobody, and costs nothing to make.
            verify=self.endpoint.ssl_context() or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            # No cookie is kept: a server must not be able to grow our memory or our requests.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=None,
            trust_env=False,
            follow_redirects=False,
            transport=transport,
            limits=httpx.Limits(
                max_connections=MAX_CONNECTIONS,
                max_keepalive_connections=MAX_CONNECTIONS // 2,
                keepalive_expiry=KEEPALIVE_S,
            ),
        )

    def limit(
        self,
        *,
        connect_timeout_s: float,
        submit_timeout_s: float,
        history_timeout_s: float,
        health_timeout_s: float,
        upload_timeout_s: float,
        download_idle_timeout_s: float,
    ) -> None:
        """Set the timeouts, as named above, of what is asked from now on."""
        self._connect_timeout_s = connect_timeout_s
        self._submit_timeout_s = submit_timeout_s
        self._history_timeout_s = history_timeout_s
        self._health_timeout_s = health_timeout_s
        self._upload_timeout_s = upload_timeout_s
        self._download_idle_timeout_s = download_idle_timeout_s

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def submit(self, body: bytes) -> SubmitReply:
        """POST /prompt. Sent once, ever: who does not know what became of it must look.

        Raises:
          ServerStatus: With the whole body (16 MiB at most): ``decode_rejection`` reads it.

        """
        ask = _Ask("POST", "/prompt", self._submit_timeout_s, (body,), repeatable=False)
        answer = await self._answer(ask, MAX_SUBMIT_BYTES, error_chars=MAX_SUBMIT_BYTES)
        return decode_submit(answer)

    async def queue(self) -> QueueSnapshot:
        """GET /queue."""
        ask = _Ask("GET", "/queue", self._history_timeout_s)
        body = await self._answer(ask, MAX_QUEUE_BYTES)
        return await _decoded(decode_queue, body)

    async def history(self, prompt_id: str) -> Record | None:
        """GET /history/{prompt_id}: its record, or None if the server has none (yet)."""
        path = f"/history/{quote(prompt_id, safe='')}"
        ask = _Ask("GET", path, self._history_timeout_s)
        body = await self._answer(ask, MAX_HISTORY_BYTES)
        return await _decoded(lambda raw: decode_history(raw, prompt_id), body)

    async def recorded(self, offset: int, count: int) -> tuple[QueueItem, ...]:
        """GET /history: which prompts have records, *count* from *offset*, oldest first.

        Their bodies hold whole graphs: ask for a few at a time.
        """
        path = f"/history?max_items={count}&offset={offset}"
        ask = _Ask("GET", path, self._history_timeout_s)
        return await _decoded(decode_listing, await self._answer(ask, MAX_QUEUE_BYTES))

    async def remaining(self) -> int:
        """GET /prompt: how many prompts are pending or running there. The cheapest question."""
        ask = _Ask("GET", "/prompt", self._health_timeout_s)
        return decode_remaining(await self._answer(ask))

    async def system_stats(self) -> SystemStats:
        """GET /system_stats."""
        ask = _Ask("GET", "/system_stats", self._health_timeout_s)
        return decode_stats(await self._answer(ask))

    async def told_s(self) -> float | None:
        """What time it is by the server's clock, seconds since the epoch, in whole seconds.

        Returns:
          None if it tells no time that can be read.

        """

        async def take(response: httpx.Response, _exchange: _Exchange) -> float | None:
            if response.status_code != 200:
                raise await _status(response, MAX_ERROR_CHARS)
            try:
                return parsedate_to_datetime(response.headers["date"]).timestamp()
            except (KeyError, ValueError, OverflowError):
                return None

        return await self._exchange(_Ask("GET", "/prompt", self._health_timeout_s), take)

    async def interrupt(self, prompt_id: str) -> None:
        """POST /interrupt for this prompt alone. Its 200 proves nothing: look at the queue."""
        await self._order("/interrupt", {"prompt_id": prompt_id})

    async def delete(self, prompt_id: str) -> None:
        """POST /queue: delete this prompt if it is pending. Its 200 proves nothing."""
        await self._order("/queue", {"delete": [prompt_id]})

    async def upload(self, name: str, content: bytes) -> str:
        """POST /upload/image: store *content* among the server's inputs.

        Args:
          name: ``[A-Za-z0-9._-]``, and different for different content: the server keeps an
            equal file and renames an unequal one.
          content: Any bytes; the server does not mind that they are no image.

        Returns:
          The name by which a graph must refer to it.

        """
        if not _UPLOAD_NAME.fullmatch(name):
            raise ValueError(f"not a name for an upload: {name!r}")
        boundary = uuid.uuid4().hex
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        ask = _Ask(
            "POST",
            "/upload/image",
            self._upload_timeout_s,
            (head.encode(), content, f"\r\n--{boundary}--\r\n".encode()),
            f"multipart/form-data; boundary={boundary}",
        )
        return decode_upload(await self._answer(ask))

    async def view(
        self, ref: FileRef, sink: Callable[[bytes], object], *, max_bytes: int
    ) -> Downloaded:
        """GET /view: hand the file, as the server stores it, to *sink* piece by piece.

        Args:
          ref: As the history record named it.
          sink: Called in a worker thread with pieces of about 256 KiB, in order, one at a time.
            What it raises is passed on as it is. After an error it may have got a part.
          max_bytes: A longer file is an error, as soon as that is known.

        Raises:
          AnswerTooLong: It has more than *max_bytes*.
          ServerProtocol: Compressed, or of a length that cannot be verified.
          ServerUnreachable: Broken off, or less than 256 KiB came within the idle timeout.

        """
        query = {"filename": ref.filename, "type": ref.type, "subfolder": ref.subfolder}
        idle_s = self._download_idle_timeout_s

        async def take(response: httpx.Response, exchange: _Exchange) -> Downloaded:
            if response.status_code != 200:
                raise await _status(response, MAX_ERROR_CHARS)
            _check_plain(response, max_bytes, verifiable=True)
            download = Download(sink, max_bytes)

            async def add(chunk: bytes) -> bool:
                if download.add(chunk):
                    exchange.scope.deadline = math.inf  # our disk's time is not the server's
                    await trio.to_thread.run_sync(download.flush)
                    exchange.scope.deadline = trio.current_time() + idle_s
                return True

            await _read(response, add)
            exchange.scope.deadline = math.inf
            return await trio.to_thread.run_sync(download.finish)

        path = "/view?" + urlencode(query, quote_via=quote)
        return await self._exchange(_Ask("GET", path, idle_s), take)

    async def _order(self, path: str, order: dict[str, Any]) -> None:
        """POST something that may be repeated without harm."""
        content = msgspec.json.encode(order)
        await self._answer(_Ask("POST", path, self._history_timeout_s, (content,)))

    async def _answer(
        self, ask: _Ask, cap_bytes: int = MAX_ANSWER_BYTES, error_chars: int = MAX_ERROR_CHARS
    ) -> bytes:
        """The body of a 200, if it has at most *cap_bytes*."""

        async def take(response: httpx.Response, _exchange: _Exchange) -> bytes:
            if response.status_code != 200:
                raise await _status(response, error_chars)
            _check_plain(response, cap_bytes)
            body = await _first_bytes(response, cap_bytes + 1)
            if len(body) > cap_bytes:
                raise AnswerTooLong(f"the answer is longer than {cap_bytes} bytes")
            return body

        return await self._exchange(ask, take)

    async def _exchange(
        self, ask: _Ask, take: Callable[[httpx.Response, _Exchange], Awaitable[T]]
    ) -> T:
        """Send *ask* and let *take* read the answer, all within its time.

        Once more, at once, if a reused connection turns out to be closed: the server did that
        while it was idle, and httpx cannot tell before it writes.
        """
        deadline = trio.current_time() + ask.within_s
        for repeated in (False, True):
            with trio.CancelScope(deadline=deadline) as scope:
                exchange = _Exchange(scope, self._connect_timeout_s, deadline)
                try:
                    response = await self._http.send(self._request(ask, exchange), stream=True)
                    try:
                        return await take(response, exchange)
                    finally:
                        await response.aclose()
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    raise connect_error(self.endpoint.authority, error) from error
                except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                    reused = not (exchange.fresh or exchange.answered)
                    if not (ask.repeatable and reused and not repeated):
                        raise ServerUnreachable(
                            f"the connection to {self.endpoint.authority} broke: {error}"
                        ) from error
            if scope.cancelled_caught:
                raise self._too_slow(exchange, ask.within_s)
        raise AssertionError("the second try returns or raises")

    def _request(self, ask: _Ask, exchange: _Exchange) -> httpx.Request:
        headers = {
            "Host": self.endpoint.authority,
            "User-Agent": "comfyd",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            **dict(self.endpoint.headers),
        }
        if ask.content:
            headers["Content-Type"] = ask.content_type
            headers["Content-Length"] = str(sum(map(len, ask.content)))
        try:
            return httpx.Request(
                ask.method,
                self.endpoint.base_url + ask.path,
                headers=headers,
                stream=_Body(ask.content),
                extensions={"trace": exchange.trace},
            )
        except httpx.InvalidURL:
            raise ServerProtocol("the server named a file that no URL can hold") from None

    def _too_slow(self, exchange: _Exchange, within_s: float) -> ServerUnreachable:
        where = self.endpoint.authority
        if exchange.connecting:
            limit_s = min(self._connect_timeout_s, within_s)
            return ServerUnreachable(f"{where} took no connection in {limit_s:g} s", sent=False)
        return ServerUnreachable(f"{where} gave no answer in {within_s:g} s", sent=exchange.sent)


async def _decoded(decode: Callable[[bytes], T], body: bytes) -> T:
    """Decode large bodies beside the event loop: pings and pongs must not wait for them."""
    if len(body) < DECODE_IN_THREAD_BYTES:
        return decode(body)
    return await trio.to_thread.run_sync(decode, body)


def _check_plain(response: httpx.Response, max_bytes: int, *, verifiable: bool = False) -> None:
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ServerProtocol("the answer is compressed, though we asked that it be not")
    length = response.headers.get("content-length")
    if length is not None and length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise AnswerTooLong(f"the answer is longer than {max_bytes} bytes")
    if verifiable and length is None and "transfer-encoding" not in response.headers:
        raise ServerProtocol("the server does not say how long the file is: it may be cut")


async def _status(response: httpx.Response, error_chars: int) -> ServerStatus:
    """Our error for a status that is no answer, with the start of its body."""
    body = await _first_bytes(response, error_chars)
    asked = response.headers.get("retry-after", "")
    waits = asked.isascii() and asked.isdigit() and len(asked) < 10
    return ServerStatus(
        response.status_code,
        body.decode("utf-8", "replace"),
        retry_after_s=float(asked) if waits else None,
    )


async def _first_bytes(response: httpx.Response, limit_bytes: int) -> bytes:
    body = bytearray()

    async def add(chunk: bytes) -> bool:
        body.extend(chunk)
        return len(body) < limit_bytes

    await _read(response, add)
    return bytes(body[:limit_bytes])


async def _read(response: httpx.Response, add: Callable[[bytes], Awaitable[bool]]) -> None:
    """Hand the body to *add*, chunk by chunk, until its end or until *add* returns False.

    The loop is never left half-way: httpx's nested generators would be left to the garbage
    collector, and their connection with them. A cancelled read takes them down in order.

    Raises:
      Exception: Whatever *add* raises.

    Cancellation: while reading; *add* is left to finish.

    """
    problem: Exception | None = None
    with trio.CancelScope() as reading:
        async for chunk in response.aiter_raw():
            if reading.cancel_called:
                continue  # what was already received
            try:
                with trio.CancelScope(shield=True):
                    wanted = await add(chunk)
            except Exception as error:  # noqa: BLE001 -- raised below, once the way is clear
                problem, wanted = error, False
            if not wanted:
                reading.cancel()
    if problem is not None:
        raise problem
