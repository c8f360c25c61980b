"""A small client over the simulator's in-memory streams."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import trio
import trio_websocket

from comfyd.simulator import Simulator


class CutOffError(Exception):
    """The connection ended before the answer was complete."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(simulator: Simulator, method: str, path: str, body: object = None) -> Reply:
    """One request on a connection of its own.

    Raises:
      CutOffError: if the answer does not come, or not whole.

    """
    async with await simulator.connect() as stream:
        return await ask_on(stream, h11.Connection(h11.CLIENT), method, path, body)


async def ask_on(
    stream: trio.abc.Stream,
    connection: h11.Connection,
    method: str,
    path: str,
    body: object = None,
) -> Reply:
    content = b"" if body is None else json.dumps(body).encode()
    headers = {"Host": "sim", "Content-Length": str(len(content))}
    request = h11.Request(method=method, target=path, headers=list(headers.items()))
    out = connection.send(request) or b""
    out += connection.send(h11.Data(data=content)) or b""
    out += connection.send(h11.EndOfMessage()) or b""
    try:
        await stream.send_all(out)
        head: h11.Response | None = None
        received = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                received += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                fields = {k.decode(): v.decode() for k, v in head.headers}
                return Reply(head.status_code, fields, received)
            else:
                raise CutOffError
    except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
        raise CutOffError from error


def graph(prefix: str = "sim", *, colour: int = 1, seconds: float | None = None) -> dict[str, Any]:
    """A picture that is saved; with *seconds*, after a sleep."""
    nodes: dict[str, Any] = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 4, "height": 4, "batch_size": 1, "color": colour},
        },
        "9": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": prefix},
        },
    }
    if seconds is not None:
        nodes["2"] = {
            "class_type": "SimSleep",
            "inputs": {"image": ["1", 0], "seconds": seconds},
        }
        nodes["9"]["inputs"]["images"] = ["2", 0]
    return nodes


async def submit(simulator: Simulator, nodes: dict[str, Any], client_id: str | None = None) -> str:
    """POST a prompt, which must be accepted; its id."""
    prompt_id = str(uuid.uuid4())
    body: dict[str, Any] = {"prompt": nodes, "prompt_id": prompt_id}
    if client_id is not None:
        body["client_id"] = client_id
    reply = await ask(simulator, "POST", "/prompt", body)
    assert reply.status == 200, reply
    return prompt_id


async def record_of(simulator: Simulator, prompt_id: str) -> dict[str, Any] | None:
    reply = await ask(simulator, "GET", f"/history/{prompt_id}")
    assert reply.status == 200
    record: dict[str, Any] | None = reply.json().get(prompt_id)
    return record


async def wait_recorded(simulator: Simulator, prompt_id: str) -> dict[str, Any]:
    with trio.fail_after(3600):
        while True:
            record = await record_of(simulator, prompt_id)
            if record is not None:
                return record
            await trio.sleep(0.05)


class Ear:
    """A WebSocket that collects what it hears."""

    def __init__(self, connection: trio_websocket.WebSocketConnection) -> None:
        self.connection = connection
        self.heard: list[dict[str, Any]] = []
        self.is_closed = False
        self._news = trio.Event()

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.heard]

    async def wait_count(self, kind: str, count: int) -> None:
        """Return when *count* messages of that type have been heard."""
        while self.types.count(kind) < count:
            await self._news.wait()

    async def listen(self) -> None:
        while True:
            try:
                frame = await self.connection.get_message()
            except trio_websocket.ConnectionClosed:
                self.is_closed = True
                return
            if isinstance(frame, str):
                self.heard.append(json.loads(frame))
                self._news.set()
                self._news = trio.Event()


@asynccontextmanager
async def listening(simulator: Simulator, client_id: str) -> AsyncIterator[Ear]:
    """An open WebSocket that has heard its first status."""
    async with trio.open_nursery() as nursery:
        # Any stream will do, whatever the annotation says.
        stream: Any = await simulator.connect()
        connection = await trio_websocket.wrap_client_stream(
            nursery, stream, "sim", f"/ws?clientId={client_id}"
        )
        ear = Ear(connection)
        nursery.start_soon(ear.listen)
        await trio.sleep(0.01)
        yield ear
        nursery.cancel_scope.cancel()
