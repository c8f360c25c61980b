"""Who is listening, and the one stream of messages from the worker to them.

After server.py of ComfyUI 0.3.64: one unbounded queue, one publisher, recipients looked up by
client id when a message is published. The bug that makes a new socket deaf when an old one with
its id ends is kept; clients must live with it (ComfyUI issue 16010).
"""

from __future__ import annotations

import json
import math
import struct
import uuid
from typing import Any, Final, Protocol

import trio

from comfyd.simulator.faults import Faults

PREVIEW_IMAGE: Final = 1
PREVIEW_IMAGE_WITH_METADATA: Final = 4


class Listener(Protocol):
    """The sending side of one WebSocket."""

    async def send(self, payload: str | bytes) -> None:
        """Send one message; a connection that is gone swallows it."""


class Hub:
    """The sockets by client id, and the messages on their way."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._listeners: dict[str, Listener] = {}
        self._flags: dict[str, dict[str, Any]] = {}
        # Unbounded as in ComfyUI, where a stalled client fills the server's memory.
        self._send_message, self._messages = trio.open_memory_channel[
            tuple[str, str | bytes, str | None]
        ](math.inf)

    def connect(self, listener: Listener, client_id: str) -> str:
        """Register *listener*, taking the id over if it is in use; its id, made up if ""."""
        sid = client_id or uuid.uuid4().hex
        self._listeners[sid] = listener
        self._flags[sid] = {}
        return sid

    def disconnect(self, sid: str) -> None:
        """Unregister whoever holds *sid* now, be it the caller's socket or not: the bug."""
        self._listeners.pop(sid, None)
        self._flags.pop(sid, None)

    def negotiate(self, sid: str, flags: dict[str, Any]) -> None:
        if sid in self._flags:
            self._flags[sid] = flags

    def wants_metadata(self, sid: str | None) -> bool:
        """Whether that client asked for previews with metadata."""
        return self._flags.get(sid or "", {}).get("supports_preview_metadata") is True

    def send(self, kind: str, data: dict[str, Any], sid: str | None) -> None:
        """Queue a message for *sid*, or for all if it is None."""
        name = "end" if kind == "executing" and data["node"] is None else kind
        self._send_message.send_nowait((name, json.dumps({"type": kind, "data": data}), sid))

    def send_preview(self, jpeg: bytes, sid: str | None) -> None:
        payload = struct.pack(">II", PREVIEW_IMAGE, 1) + jpeg
        self._send_message.send_nowait(("binary", payload, sid))

    def send_preview_with_metadata(
        self, jpeg: bytes, metadata: dict[str, Any], sid: str | None
    ) -> None:
        about = json.dumps({**metadata, "image_type": "image/jpeg"}).encode()
        head = struct.pack(">II", PREVIEW_IMAGE_WITH_METADATA, len(about))
        self._send_message.send_nowait(("binary", head + about + jpeg, sid))

    async def publish(self) -> None:
        """Send what is queued, for ever. A listener that does not read holds all others up."""
        async for name, payload, sid in self._messages:
            while self._faults.stalled_publisher:
                await self._faults.wait_changed()
            if self._is_dropped(name):
                continue
            delay_s = self._faults.delay_s.get(name, 0.0) + self._faults.delay_s.get("all", 0.0)
            if delay_s:
                await trio.sleep(delay_s)
            if sid is None:
                for listener in list(self._listeners.values()):
                    await listener.send(payload)
            elif sid in self._listeners:
                await self._listeners[sid].send(payload)

    def _is_dropped(self, name: str) -> bool:
        names = ("executing", "end", "all") if name == "end" else (name, "all")
        return any(self._faults.strikes(self._faults.drop.get(each)) for each in names)
