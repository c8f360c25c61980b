"""One server's WebSocket, connected for as long as the daemon lives. Hints out, nothing else.

The only module that imports trio_websocket (0.12.2), whose traps it goes round: the stream is ours,
for the library leaves a client's socket open when the server closes first; the handshake runs in
our nursery under our deadline, for the library's own never fires; a handshake broken off is seen
by our stream, for the library waits for ever; and nothing here waits while a message is at hand,
for until it is taken no pong is read.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLContext
from typing import Final, Literal, NoReturn, cast

import h11
import trio
import trio_websocket as tws
import wsproto.utilities

from comfyd.comfyui.ear import Ear
from comfyd.comfyui.endpoint import Endpoint, connect_error, dial
from comfyd.comfyui.listener import Cause, Listener, Result, State, Timings
from comfyd.core.canary import Canary
from comfyd.core.facts import Sign
from comfyd.core.policy import exponential_s
from comfyd.core.wire import (
    Alive,
    Ended,
    Ending,
    Ignored,
    Invalid,
    Status,
    decode_message,
    label_of,
)
from comfyd.errors import (
    ServerError,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)

# Outputs of text nodes and images sent over the wire exceed the library's 1 MiB every day, and one
# message too large ends the connection (1009), again after every reconnect. So: more than any
# sane node sends, and less than hurts when it comes.
MAX_MESSAGE_BYTES: Final = 128 * 2**20
RECEIVE_BYTES: Final = 64 * 2**10
GOODBYE_S: Final = 1.0
INVALID_EVERY_S: Final = 60.0
LATE_S: Final = 10.0  # how late a busy machine may make us

# Close codes by which the peer, or we, say that the other broke the protocol.
_PROTOCOL_CODES: Final = frozenset({1002, 1003, 1007, 1009, 1010})


class _Lost(ServerUnreachable):
    """An attempt or a connection is over. *cause* is for metrics, the text for people."""

    def __init__(self, cause: Cause | Literal["timeout"], message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Tracker:
    """Args: the server, and the seams.

    url, headers, ca_file: See ``Endpoint``.
    ask_remaining: GET /prompt; raises ``ServerError``.
    timings: May be replaced at any time; *deaf_after_s* then holds from the next connection on.
    listener: Called from ``run``, never concurrently.
    now_s: Any monotonic clock of seconds.
    u: A random sample from [0, 1).
    open_stream: Opens a byte stream to host and port, with TLS if given a context.

    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        ca_file: Path | None = None,
        timings: Timings,
        ask_remaining: Callable[[], Awaitable[int]],
        listener: Listener,
        now_s: Callable[[], float],
        u: Callable[[], float],
        open_stream: Callable[[str, int, SSLContext | None], Awaitable[trio.abc.Stream]] = dial,
    ) -> None:
        self._endpoint = Endpoint.parse(url, headers, ca_file)
        self._tls = self._endpoint.ssl_context()
        self.timings = timings
        self._ask_remaining = ask_remaining
        self._listener = listener
        self._now_s = now_s
        self._u = u
        self._open_stream = open_stream
        self._canary: Canary | None = None  # of the live connection
        self._verdicts = 0
        self._look = trio.Event()
        self._answering = trio.Event()
        self._greeted_at_s = math.inf
        self._invalid_at_s = -math.inf
        self._state: State = "connecting"
        self._due_s = math.inf  # by when the state has to change
        self.problem = ""

    @property
    def state(self) -> State:
        """For status pages; ``problem`` says in a sentence why it is not connected."""
        if self._canary is not None and self._canary.stalled:
            return "deaf"
        return self._state

    def on_time(self) -> bool:
        """Whether it is where it should be; False means that its task hangs."""
        return self._now_s() < self._due_s + LATE_S

    def posted(self) -> None:
        """The server just answered 200 to a POST /prompt: a ``status`` is due."""
        if self._canary is not None:
            self._canary = self._canary.posted(self._now_s())
            self._look.set()

    def answers(self) -> None:
        """The server is back: what is left of a backoff is not waited for."""
        self._answering.set()

    async def run(self) -> NoReturn:
        """Connect, track, and connect again, for ever.

        Survives what a server and a network can do. A bug, here or in the listener, is raised.

        """
        failures = 0
        while True:
            self._state, self._greeted_at_s = "connecting", math.inf
            self._due_s = self._now_s() + self.timings.connect_timeout_s
            try:
                await self._connection(uuid.uuid4().hex)
            except* ServerError as group:
                self._over(group)
            first_s, max_s = self.timings.reconnect_first_s, self.timings.reconnect_max_s
            # Not reset by connecting: a server that greets and hangs up must not be hammered.
            failures = 1 if self._now_s() - self._greeted_at_s >= max_s else failures + 1
            delay_s = exponential_s(failures, first_s, max_s, u=self._u())
            self._state, self._due_s = "backoff", self._now_s() + delay_s
            self._answering = trio.Event()
            with trio.move_on_after(delay_s):
                await self._answering.wait()
                failures = 0

    def _over(self, group: BaseExceptionGroup[ServerError]) -> None:
        """Tell why an attempt or a connection ended: its first reason, if it had several."""
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.problem = str(error)
        canary, self._canary = self._canary, None
        if canary is None:
            self._listener.on_connect_result(_result(error))
        else:
            self._verdicts = canary.verdicts
            cause = error.cause if isinstance(error, _Lost) else "error"
            self._listener.on_disconnected("error" if cause == "timeout" else cause)

    # --- one connection, top to bottom --------------------------------------------------------

    async def _connection(self, client_id: str) -> None:
        """Live through one connection.

        A clientId is used once: if the server still holds an old connection with it, ending that
        one unregisters ours (issue #16010).

        Raises:
          ServerError: It never came up, or is over; alone or in groups. Never returns.

        """
        deadline = trio.current_time() + self.timings.connect_timeout_s
        with _in_time(deadline, f"{self._endpoint.authority} took no connection"):
            try:
                stream = await self._open_stream(
                    self._endpoint.host, self._endpoint.port, self._tls
                )
            except (OSError, trio.BrokenResourceError) as error:
                raise connect_error(self._endpoint.authority, error) from error
        ear = Ear(stream)
        try:
            with _translated(ear):
                async with trio.open_nursery() as reader:
                    with _in_time(deadline, "the WebSocket handshake was not finished"):
                        ws = await self._handshake(reader, ear, client_id)
                    await self._converse(ws, ear, client_id, deadline)
        finally:
            await trio.aclose_forcefully(ear)

    async def _handshake(
        self, reader: trio.Nursery, ear: Ear, client_id: str
    ) -> tws.WebSocketConnection:
        with ear.handshake:
            return await tws.wrap_client_stream(
                reader,
                cast("trio.SocketStream", ear),  # any stream will do
                self._endpoint.authority,
                f"{self._endpoint.prefix}/ws?clientId={client_id}",
                extra_headers=[(k.encode(), v.encode()) for k, v in self._endpoint.headers],
                max_message_size=MAX_MESSAGE_BYTES,
                receive_buffer_size=RECEIVE_BYTES,
            )
        raise _broken_handshake(ear)

    async def _converse(
        self, ws: tws.WebSocketConnection, ear: Ear, client_id: str, deadline: float
    ) -> None:
        with _in_time(deadline, "the server did not greet the WebSocket"):
            await self._greeting(ws, client_id)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ping, ws, ear)
                nursery.start_soon(self._doubt)
                while True:
                    self._take(await ws.get_message())
        except* _Lost as group:
            if any(isinstance(e, _Lost) and e.cause == "deaf" for e in group.exceptions):
                with trio.move_on_after(GOODBYE_S):  # the peer lives: let it close cleanly
                    await ws.aclose()
            raise

    async def _greeting(self, ws: tws.WebSocketConnection, client_id: str) -> None:
        """Take messages until the server has registered *client_id*, and say so."""
        while True:
            message = self._take(await ws.get_message())
            if not isinstance(message, Status) or message.sid is None:
                continue
            if message.sid != client_id:
                raise ServerProtocol("the server greeted the WebSocket by another clientId")
            break
        self._canary = Canary.greeted(
            self._now_s(),
            message.remaining,
            deaf_after_s=self.timings.deaf_after_s,
            compare_every_s=self.timings.ping_interval_s,
            verdicts=self._verdicts,
        )
        self._greeted_at_s = self._now_s()
        self._state, self.problem, self._due_s = "connected", "", math.inf
        self._listener.on_connect_result("ok")
        self._listener.on_connected(client_id)

    async def _ping(self, ws: tws.WebSocketConnection, ear: Ear) -> None:
        """The server never pings (server.py): without this a dead link looks like an idle one."""
        while True:
            await trio.sleep(self.timings.ping_interval_s)
            with ear.listening(self.timings.ping_timeout_s) as scope:
                await ws.ping()
            if scope.cancelled_caught:
                raise _Lost(
                    "ping_timeout",
                    f"nothing came for {self.timings.ping_timeout_s:g} s after a ping",
                )

    async def _doubt(self) -> None:
        """Ask the server, when the canary wants to know, whether we hear what it says."""
        leave_at_s = self._now_s() + self.timings.reconnect_max_s
        while True:
            canary = self._live()
            look_at_s = min(canary.look_at_s, leave_at_s) if canary.stalled else canary.look_at_s
            self._look = trio.Event()
            with trio.move_on_after(max(0.0, look_at_s - self._now_s())):
                await self._look.wait()
                continue  # a submission changed the hour
            if self._live().stalled and self._now_s() >= leave_at_s:
                raise _Lost("deaf", "the server publishes nothing; trying a new connection")
            remaining = await self._prompt_answer()
            if remaining is None:
                self._canary = self._live().unanswered(self._now_s())
                continue
            self._listener.on_remaining(remaining)
            self._canary, deaf = self._live().compared(self._now_s(), remaining)
            if deaf and not self._canary.stalled:
                raise _Lost("deaf", "the WebSocket is open but hears nothing")
            if deaf and not canary.stalled:
                # Reconnecting was no help. Stay, so as to hear it as soon as that ends.
                leave_at_s = self._now_s() + self.timings.reconnect_max_s
                self._listener.on_stalled(True)

    async def _prompt_answer(self) -> int | None:
        """What the server says of its queue, or None if it does not say so promptly."""
        with trio.move_on_after(self.timings.deaf_after_s):
            try:
                return await self._ask_remaining()
            except ServerError:
                return None  # unknown, and unknown proves nothing
        return None

    def _live(self) -> Canary:
        assert self._canary is not None, "asked only while connected"
        return self._canary

    # --- messages -------------------------------------------------------------------------------

    def _take(self, frame: str | bytes) -> object:
        """Tell the listener what *frame* says. Synchronous: see the module's first words."""
        if isinstance(frame, bytes):
            self._listener.on_message("binary")  # previews: nothing here needs them
            return None
        message = decode_message(frame)
        self._listener.on_message(label_of(message))
        match message:
            case Status(remaining):
                if self._canary is not None:
                    was_stalled = self._canary.stalled
                    self._canary = self._canary.status(self._now_s(), remaining)
                    if was_stalled:
                        self._listener.on_stalled(False)
                self._listener.on_remaining(remaining)
            case Alive(kind, prompt_id, data):
                self._listener.on_hint(prompt_id, Sign.ALIVE)
                self._listener.on_progress(prompt_id, kind, data)
            case Ending(_, prompt_id):
                self._listener.on_hint(prompt_id, Sign.ENDING)
            case Ended(prompt_id):
                self._listener.on_hint(prompt_id, Sign.ENDED)
            case Invalid(type_, problem):
                if self._now_s() - self._invalid_at_s >= INVALID_EVERY_S:
                    self._invalid_at_s = self._now_s()
                    self._listener.on_invalid(type_, problem)
            case Ignored():
                pass
        return message


def _result(error: BaseException) -> Result:
    match error:
        case ServerRefused():
            return "refused"
        case ServerStatus():
            return "rejected"
        case _Lost(cause="timeout"):
            return "timeout"
        case _:
            return "error"


@contextmanager
def _in_time(deadline: float, what: str) -> Iterator[None]:
    """Raise ``_Lost("timeout")`` when the block is not through by *deadline* (trio's clock)."""
    with trio.CancelScope(deadline=deadline) as scope:
        yield
    if scope.cancelled_caught:
        raise _Lost("timeout", f"{what} in time")


@contextmanager
def _translated(ear: Ear) -> Iterator[None]:
    """Turn what the library raises, in our task or in its reader, into our errors."""
    try:
        yield
    except* tws.ConnectionRejected as group:
        raise _broken_handshake(ear) from group
    except* tws.ConnectionClosed as group:
        raise _closed(group) from group
    except* (tws.HandshakeError, wsproto.utilities.ProtocolError, h11.ProtocolError) as group:
        # h11's own: after a broken 101 the library tries to answer as if it were the server.
        raise _Lost("error", "the server broke the WebSocket protocol") from group


def _closed(group: BaseExceptionGroup[tws.ConnectionClosed]) -> _Lost:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    reason = cast("tws.ConnectionClosed", error).reason
    code = reason.code if reason is not None else 1006
    if code in _PROTOCOL_CODES:
        return _Lost("error", f"the WebSocket was closed for a protocol error ({code})")
    return _Lost("closed", f"the server closed the WebSocket ({code})")


def _broken_handshake(ear: Ear) -> ServerError:
    """What came instead of an upgrade: a status, or an end."""
    status = ear.status()
    if status is not None and status != 101:
        return ServerStatus(status)
    return _Lost("error", "the connection ended during the WebSocket handshake")
