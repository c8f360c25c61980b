"""A TCP server for tests that plays one script a connection, byte by byte."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

Script = Callable[["Peer"], Awaitable[None]]


@dataclass
class Peer:
    """The server's end of one connection."""

    stream: trio.SocketStream
    heard: bytearray = field(default_factory=bytearray)

    async def request(self) -> bytes:
        """Read one request with its body; b"" when the client is gone."""
        head = await self._until(b"\r\n\r\n")
        if not head:
            return b""
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        while len(self.heard) < length:
            self.heard += await self.stream.receive_some()
        body, self.heard = bytes(self.heard[:length]), self.heard[length:]
        return head + body

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self.heard:
            received = await self.stream.receive_some()
            if not received:
                return b""
            self.heard += received
        head, _, rest = bytes(self.heard).partition(mark)
        self.heard = bytearray(rest)
        return head + mark

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            await self.stream.send_all(part)

    async def answer(self, body: bytes, status: str = "200 OK", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    def reset(self) -> None:
        """Close with a TCP reset instead of a polite end."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()


@dataclass
class Served:
    url: str
    requests: list[bytes]
    connections: int = 0


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[Served]:
    """Serve on loopback: the nth connection plays the nth script, later ones the last."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}", [])

    async def play(stream: trio.SocketStream) -> None:
        script = scripts[min(served.connections, len(scripts) - 1)]
        served.connections += 1
        peer = Recording(stream, served.requests)
        try:
            await script(peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client hung up, as some tests mean it to
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, play, listeners)
        try:
            yield served
        finally:
            nursery.cancel_scope.cancel()


class Recording(Peer):
    def __init__(self, stream: trio.SocketStream, log: list[bytes]) -> None:
        super().__init__(stream)
        self._log = log

    async def request(self) -> bytes:
        request = await super().request()
        if request:
            self._log.append(request)
        return request


def always(body: bytes, status: str = "200 OK", *headers: str) -> Script:
    """Answer every request of a connection with the same."""

    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.answer(body, status, *headers)

    return script


def closed_port() -> int:
    """A port on loopback where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
