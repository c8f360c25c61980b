"""A byte stream that knows when it last heard something, and when its peer stopped talking."""

from __future__ import annotations

import re
from typing import Final

import trio

MAX_HANDSHAKE_BYTES: Final = 256 * 2**10  # a refusal may bring a page; it need not bring a book
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


class Ear(trio.abc.Stream):
    """Wraps a stream; everything goes through unchanged.

    Attributes:
      handshake: Enter it around a handshake: it is cancelled when the peer ends the stream, or
        sends more than a handshake needs.

    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._first = b""
        self._received_bytes = 0
        self._window: tuple[trio.CancelScope, float] | None = None
        self.handshake = trio.CancelScope()

    def listening(self, silence_s: float) -> trio.CancelScope:
        """A scope that is cancelled once not one byte has come for *silence_s* seconds.

        Any byte will do: on a slow link a pong may wait behind megabytes of messages.
        """
        scope = trio.CancelScope(deadline=trio.current_time() + silence_s)
        self._window = (scope, silence_s)
        return scope

    def status(self) -> int | None:
        """The HTTP status by which the peer's first answer began, if it did so."""
        match = _STATUS.match(self._first)
        return int(match[1]) if match else None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            received = bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.handshake.cancel()
            raise
        self._received_bytes += len(received)
        if len(self._first) < 16:
            self._first = (self._first + received)[:16]
        if not received or self._received_bytes > MAX_HANDSHAKE_BYTES:
            self.handshake.cancel()
        if self._window is not None:
            scope, silence_s = self._window
            scope.deadline = trio.current_time() + silence_s
        return received

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self.handshake.cancel()
        await self._stream.aclose()
