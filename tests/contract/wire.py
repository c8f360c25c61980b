"""A raw client that writes down all that is sent and received, in order.

It knows HTTP and WebSockets and nothing of comfyd: what the contract says must not be judged by the
code that relies on it.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio
import trio_websocket

Message = dict[str, Any]
Step = dict[str, Any]

PATIENCE_S = 20.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Socket:
    """One open WebSocket; a task of the session reads it without pause.

    Attributes:
      received: Text messages as decoded JSON; binary frames as {"binary": event, "bytes": length}.
      closed: Set when the server's side has ended.

    """

    def __init__(self, label: str, connection: trio_websocket.WebSocketConnection) -> None:
        self.label = label
        self.received: list[Message] = []
        self.closed = trio.Event()
        self.connection = connection
        self._news = trio.Event()
        self._taken = 0

    def took(self, message: Message) -> None:
        self.received.append(message)
        self._news.set()
        self._news = trio.Event()

    async def wait(self, wanted: Callable[[Message], bool]) -> Message:
        """The next message for which *wanted* is true; what lies before it is skipped.

        Raises:
          trio.TooSlowError: if it does not come within PATIENCE_S.

        """
        with trio.fail_after(PATIENCE_S):
            while True:
                while self._taken < len(self.received):
                    message = self.received[self._taken]
                    self._taken += 1
                    if wanted(message):
                        return message
                await self._news.wait()

    async def wait_end(self, prompt_id: str) -> Message:
        """The `executing` message without a node, which ends *prompt_id*."""
        return await self.wait(lambda m: is_end(m, prompt_id))

    async def close(self) -> None:
        """Say goodbye and wait for the answer."""
        with trio.fail_after(PATIENCE_S):
            await self.connection.aclose()


def is_end(message: Message, prompt_id: str) -> bool:
    """Whether *message* says that *prompt_id* is over and recorded."""
    return (
        message.get("type") == "executing"
        and message["data"]["node"] is None
        and message["data"].get("prompt_id") == prompt_id
    )


class Session:
    """HTTP and WebSockets to one server, with a log of every step.

    Attributes:
      sockets: Those that were opened, in order.
      log: What was sent and received. Steps of one channel are in true order; between channels
        the order is only that in which this process saw them.

    """

    def __init__(self, url: str, client: httpx.AsyncClient, nursery: trio.Nursery) -> None:
        self.url = url
        self.log: list[Step] = []
        self.sockets: list[Socket] = []
        self.run = uuid.uuid4().hex[:8]
        self._client = client
        self._nursery = nursery
        self._names: dict[str, str] = {self.run: "<run>"}

    @property
    def prefix(self) -> str:
        """A file name prefix that no other run has used."""
        return f"case-{self.run}"

    @property
    def colour(self) -> int:
        """A colour that no other run is likely to have used: graphs with it are not cached."""
        return int(self.run, 16) % 0xFFFFF0

    def new_prompt_id(self) -> str:
        return self._name(str(uuid.uuid4()), "prompt")

    def new_client_id(self) -> str:
        return self._name(uuid.uuid4().hex, "client")

    def _name(self, value: str, kind: str) -> str:
        number = sum(name.startswith(f"<{kind}-") for name in self._names.values()) + 1
        self._names[value] = f"<{kind}-{number}>"
        return value

    async def http(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send one request; `json`, `content`, `data` and `files` are those of httpx."""
        sent: Step = {"send": "http", "method": method, "path": path}
        for key in ("json", "content", "data"):
            if key in request:
                sent[key] = request[key]
        if "files" in request:
            sent["files"] = {k: f"{len(v[1])} bytes as {v[0]}" for k, v in request["files"].items()}
        self.log.append(sent)
        with trio.fail_after(PATIENCE_S):
            response = await self._client.request(method, path, **request)
        kind = response.headers.get("content-type", "").partition(";")[0]
        received: Step = {"recv": "http", "status": response.status_code, "content_type": kind}
        if kind == "application/json":
            received["json"] = response.json()
        elif kind.startswith("text/"):
            received["text"] = response.text
        else:
            received["bytes"] = len(response.content)
        if "content-disposition" in response.headers:
            received["content_disposition"] = response.headers["content-disposition"]
        self.log.append(received)
        return response

    async def submit(self, graph: dict[str, Any], client_id: str | None) -> str:
        """POST *graph* under a new prompt id, which is returned; the answer must be 200."""
        prompt_id = self.new_prompt_id()
        body: dict[str, Any] = {"prompt": graph, "prompt_id": prompt_id}
        if client_id is not None:
            body["client_id"] = client_id
        response = await self.http("POST", "/prompt", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["prompt_id"] == prompt_id
        return prompt_id

    async def record_of(self, prompt_id: str) -> dict[str, Any] | None:
        """The history record of *prompt_id*, or None."""
        answer = (await self.http("GET", f"/history/{prompt_id}")).json()
        record: dict[str, Any] | None = answer.get(prompt_id)
        return record

    async def wait_recorded(self, prompt_id: str) -> dict[str, Any]:
        """Poll for the record of *prompt_id*, without a trace in the log."""
        with trio.fail_after(PATIENCE_S):
            while True:
                answer = (await self._client.get(f"/history/{prompt_id}")).json()
                if prompt_id in answer:
                    record: dict[str, Any] = answer[prompt_id]
                    return record
                await trio.sleep(0.02)

    async def has_node(self, class_type: str) -> bool:
        """Whether the server knows the node class, without a trace in the log."""
        return bool((await self._client.get(f"/object_info/{class_type}")).json())

    async def open(self, client_id: str | None = None) -> Socket:
        """Open a WebSocket and wait for its first message."""
        label = f"ws-{sum('open' in step for step in self.log) + 1}"
        path = "/ws" if client_id is None else f"/ws?clientId={client_id}"
        self.log.append({"send": label, "open": path})
        with trio.fail_after(PATIENCE_S):
            connection = await trio_websocket.connect_websocket_url(
                self._nursery,
                self.url.replace("http", "ws", 1) + path,
                max_message_size=MAX_MESSAGE_BYTES,
            )
        socket = Socket(label, connection)
        self.sockets.append(socket)
        self._nursery.start_soon(self._read, socket)
        first = await socket.wait(lambda m: m.get("type") == "status")
        if client_id is None:
            self._name(first["data"]["sid"], "client")
        return socket

    async def send(self, socket: Socket, message: object) -> None:
        self.log.append({"send": socket.label, "message": message})
        await socket.connection.send_message(json.dumps(message))

    async def close(self, socket: Socket) -> None:
        self.log.append({"send": socket.label, "close": True})
        await socket.close()

    async def _read(self, socket: Socket) -> None:
        while True:
            try:
                frame = await socket.connection.get_message()
            except trio_websocket.ConnectionClosed:
                socket.closed.set()
                return
            if isinstance(frame, str):
                message = json.loads(frame)
                self.log.append({"recv": socket.label, "message": message})
            else:
                (event,) = struct.unpack(">I", frame[:4])
                message = {"binary": event, "bytes": len(frame)}
                self.log.append({"recv": socket.label, **message})
            socket.took(message)

    def normalised(self) -> list[Step]:
        """The log with placeholders for all that differs from run to run."""
        numbers = [
            step["json"]["number"]
            for step in self.log
            if isinstance(step.get("json"), dict) and isinstance(step["json"].get("number"), int)
        ]
        offset = min(numbers, default=0)
        steps: list[Step] = self._normal(self.log, "", offset)
        return steps

    def _normal(self, value: Any, key: str, offset: int) -> Any:
        if key == "timestamp":
            return "<timestamp>"
        if key == "traceback":
            return ["<traceback>"]
        if key == "color" and value == self.colour:
            return 1
        if key == "number" and isinstance(value, int):
            return value - offset
        if isinstance(value, dict):
            return {
                self._normal(k, "", offset): self._normal(v, k, offset) for k, v in value.items()
            }
        if isinstance(value, list):
            if len(value) == 5 and isinstance(value[2], dict) and isinstance(value[0], int):
                value = [value[0] - offset, *value[1:]]  # a queue item
            return [self._normal(item, "", offset) for item in value]
        if isinstance(value, str):
            if value.startswith("tensor("):
                return "<tensor>"
            for text, name in self._names.items():
                value = value.replace(text, name)
            return re.sub(r"_temp_[a-z]{5}_", "_temp_xxxxx_", value)
        return value


@asynccontextmanager
async def open_session(url: str) -> AsyncIterator[Session]:
    """A session with *url*; its sockets are closed at the end."""
    # No certificate is looked at, and loading the bundle would take longer than most tests.
    async with (
        httpx.AsyncClient(base_url=url, timeout=None, verify=False) as client,
        trio.open_nursery() as tasks,
    ):
        session = Session(url, client, tasks)
        yield session
        for socket in session.sockets:
            await socket.close()
        tasks.cancel_scope.cancel()
