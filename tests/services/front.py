"""A simulated server behind a listener of ours, which knows what was said to it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import trio

from comfyd.simulator import Simulator


class _Heard(trio.abc.Stream):
    """Passes everything through and remembers what was received."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.received = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytes(await self._stream.receive_some(max_bytes))
        self.received += data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass
class Front:
    """Attributes: the server's URL, itself, and every connection that there ever was."""

    url: str
    simulator: Simulator
    streams: list[_Heard] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def serving(cls, tls: ssl.SSLContext | None = None) -> AsyncIterator[Self]:
        """A server on a free port of 127.0.0.1."""
        simulator = Simulator(run_s=0.0)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        front = cls(f"{'https' if tls else 'http'}://127.0.0.1:{port}", simulator)
        listeners: list[trio.abc.Listener[trio.abc.Stream]] = [listener]
        if tls is not None:
            listeners = [trio.SSLListener(listener, tls, https_compatible=True)]
        async with trio.open_nursery() as nursery:
            await nursery.start(simulator.run)
            nursery.start_soon(trio.serve_listeners, front.converse, listeners)
            yield front
            nursery.cancel_scope.cancel()

    async def converse(self, stream: trio.abc.Stream) -> None:
        heard = _Heard(stream)
        self.streams.append(heard)
        try:
            await self.simulator.serve_stream(heard)
        except (trio.BrokenResourceError, ssl.SSLError):
            pass  # who does not trust us hangs up
        finally:
            await trio.aclose_forcefully(heard)

    def requests(self, line: bytes) -> list[bytes]:
        """What was received on every connection whose first request begins with *line*."""
        return [s.received for s in self.streams if s.received.startswith(line)]
