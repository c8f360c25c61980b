"""One prompt being run: its messages, its progress, and what its nodes may ask for."""

from __future__ import annotations

import time
from typing import Any

import trio

from comfyd.simulator.files import Files
from comfyd.simulator.hub import Hub
from comfyd.simulator.validation import Graph


class InterruptedRunError(Exception):
    """An interrupt was noticed."""


class PromptRun:
    """The messages and the progress of one prompt; what nodes see of it is `nodes.Run`.

    Attributes:
      messages: Event and data of all that goes into the record.
      interrupted: Set to make the prompt stop before its next node or at its next tick.

    """

    def __init__(
        self,
        hub: Hub,
        prompt_id: str,
        graph: Graph,
        extra_data: dict[str, Any],
        *,
        files: Files,
        temp_tag: str,
    ) -> None:
        self._hub = hub
        self._id = prompt_id
        self._progress: dict[str, dict[str, Any]] = {}
        self._node_id: str | None = None
        self._client_id: str | None = extra_data.get("client_id")
        self.graph = graph
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.interrupted = trio.Event()
        self.files = files
        self.prompt: dict[str, Any] = graph
        self.extra_pnginfo: dict[str, Any] | None = extra_data.get("extra_pnginfo")
        self.temp_tag = temp_tag

    @property
    def node_id(self) -> str | None:
        """The node that was last told to be executing; None if nobody was told."""
        return self._node_id if self._client_id is not None else None

    def note(self, event: str, data: dict[str, Any], *, broadcast: bool = False) -> None:
        """Send a message that also goes into the record."""
        data = {"prompt_id": self._id, **data, "timestamp": int(time.time() * 1000)}
        self.messages.append((event, data))
        if self._client_id is not None or broadcast:
            self._hub.send(event, data, self._client_id)

    def meta(self, node_id: str) -> dict[str, Any]:
        return {
            "node_id": node_id,
            "display_node": node_id,
            "parent_node": None,
            "real_node_id": node_id,
        }

    def start(self, node_id: str) -> None:
        self._node_id = node_id
        self._progress[node_id] = {"value": 0.0, "max": 1.0, "state": "running"}
        self._send_progress()
        if self._client_id is not None:
            self._send("executing", {"node": node_id, "display_node": node_id})

    def executed(self, node_id: str, output: dict[str, Any] | None) -> None:
        if self._client_id is not None:
            data = {"node": node_id, "display_node": node_id, "output": output}
            self._send("executed", data)

    def finish(self, node_id: str) -> None:
        entry = self._progress.setdefault(node_id, {"value": 1, "max": 1})
        entry.update(state="finished", value=entry["max"])
        self._send_progress()

    def check_interrupt(self) -> None:
        if self.interrupted.is_set():
            raise InterruptedRunError

    async def sleep(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.interrupted.wait()

    def tick(self, value: int, total: int, preview: bytes | None) -> None:
        self.check_interrupt()
        node_id = self._node_id or ""
        self._progress[node_id] = {"value": value, "max": total, "state": "running"}
        self._send_progress()
        with_metadata = self._hub.wants_metadata(self._client_id)
        if preview is not None and with_metadata:
            about = {
                "node_id": node_id,
                "prompt_id": self._id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            }
            self._hub.send_preview_with_metadata(preview, about, self._client_id)
        data = {"value": value, "max": total, "prompt_id": self._id, "node": node_id}
        self._hub.send("progress", data, self._client_id)
        if preview is not None and not with_metadata:
            self._hub.send_preview(preview, self._client_id)

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        self._hub.send(kind, {**data, "prompt_id": self._id}, self._client_id)

    def _send_progress(self) -> None:
        nodes = {
            node_id: {
                **entry,
                "node_id": node_id,
                "prompt_id": self._id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            }
            for node_id, entry in self._progress.items()
        }
        # Without a client id this goes to everybody (ComfyUI's main.py and progress.py).
        data = {"prompt_id": self._id, "nodes": nodes}
        self._hub.send("progress_state", data, self._client_id)
