"""One WebSocket, server side, over any trio stream."""

from __future__ import annotations

import json
from typing import Any, Final

import h11
import trio
import wsproto
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    TextMessage,
)

from comfyd.simulator.faults import Faults
from comfyd.simulator.hub import Hub

# aiohttp's limit for messages from a client.
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
_READ_BYTES: Final = 65536


class WebSocket:
    """One connection; `Hub` sends through it while `serve` reads."""

    def __init__(self, stream: trio.abc.Stream, faults: Faults) -> None:
        self._stream = stream
        self._faults = faults
        self._protocol = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        self._lock = trio.Lock()
        self._silent = False

    async def handshake(self, head: h11.Request, *, refuse: bool) -> bool:
        """Answer the opening request; whether the connection is open now."""
        self._protocol.initiate_upgrade_connection(list(head.headers), head.target.decode())
        next(self._protocol.events())  # the request, which the caller has read already
        answer = RejectConnection(status_code=403) if refuse else AcceptConnection()
        await self._stream.send_all(self._protocol.send(answer))
        return not refuse

    async def send(self, payload: str | bytes) -> None:
        """Send one message; a connection that is gone, or half open, swallows it."""
        if self._is_silent():
            return
        message: TextMessage | BytesMessage
        if isinstance(payload, str):
            message = TextMessage(data=payload)
        else:
            message = BytesMessage(data=payload)
        await self._send(message)

    async def ignore(self) -> None:
        """Read and discard until the other side ends it, as a peer that is gone would seem to."""
        while await self._stream.receive_some(_READ_BYTES):
            pass

    async def serve(self, hub: Hub, sid: str, features: dict[str, Any]) -> None:
        """Read until the connection ends; answers pings, and flags if they come first."""
        is_first = True
        text = ""
        while True:
            data = await self._stream.receive_some(_READ_BYTES)
            if self._is_silent():
                return await self.ignore()
            self._protocol.receive_data(bytes(data) or None)
            for event in self._protocol.events():
                match event:
                    case Ping():
                        await self._send(event.response())
                    case CloseConnection():
                        if self._protocol.state is ConnectionState.REMOTE_CLOSING:
                            await self._send(event.response())
                        return
                    case TextMessage():
                        text += event.data
                        if len(text) > MAX_MESSAGE_BYTES:
                            await self._send(CloseConnection(code=1009))
                            return
                        if event.message_finished:
                            flags = _flags(text) if is_first else None
                            is_first = is_first and not _is_json(text)
                            text = ""
                            if flags is not None:
                                hub.negotiate(sid, flags)
                                reply = {"type": "feature_flags", "data": features}
                                await self.send(json.dumps(reply))
                    case _:
                        pass  # ComfyUI ignores all else that a client sends
            if not data:
                return

    async def _send(self, event: wsproto.events.Event) -> None:
        async with self._lock:
            try:
                await self._stream.send_all(self._protocol.send(event))
            except (
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                wsproto.utilities.LocalProtocolError,
            ):
                self._silent = True

    def _is_silent(self) -> bool:
        # What has once gone silent stays so: its peer would never hear of a recovery either.
        self._silent = self._silent or self._faults.half_open in ("ws", "all")
        return self._silent


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _flags(text: str) -> dict[str, Any] | None:
    if not _is_json(text):
        return None
    message = json.loads(text)
    if not isinstance(message, dict) or message.get("type") != "feature_flags":
        return None
    flags: dict[str, Any] = message.get("data", {})
    return flags
