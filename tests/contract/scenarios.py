"""What is played against a server: once to record it, and again to compare another server with it.

Each scenario is one function of a session. It waits only for what the protocol promises, so the
same function runs against a real server and against the simulator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from tests.contract import graphs
from tests.contract.wire import Message, Session

Scenario = Callable[[Session], Awaitable[None]]

# Long enough for a message that was sent to arrive, when the claim is that none was.
SILENCE_S = 0.3


async def success(session: Session) -> None:
    """One prompt from submission to its file."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    await session.http("GET", "/prompt")
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await socket.wait_end(prompt_id)
    await session.http("GET", "/queue")
    await session.record_of(prompt_id)
    await session.http("GET", f"/view?filename={session.prefix}_00001_.png&subfolder=&type=output")


async def cached(session: Session) -> None:
    """The same graph twice: the second run executes nothing and names the old file."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    for _ in range(2):
        prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
        await socket.wait_end(prompt_id)
        await session.record_of(prompt_id)


async def failing(session: Session) -> None:
    """A node raises after another output was saved."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    graph = graphs.half_failing(session.prefix, session.colour)
    prompt_id = await session.submit(graph, client_id)
    await socket.wait_end(prompt_id)
    await session.record_of(prompt_id)


async def refused(session: Session) -> None:
    """Every way in which a prompt is turned away at once."""
    refused_graphs: list[graphs.Graph] = [
        graphs.out_of_range(session.prefix),
        graphs.unknown_class(),
        graphs.missing_input(),
        graphs.no_outputs(),
        {"1": {"inputs": {}}},
        {},
    ]
    for graph in refused_graphs:
        body = {"prompt": graph, "prompt_id": session.new_prompt_id()}
        await session.http("POST", "/prompt", json=body)
    await session.http("POST", "/prompt", json={"client_id": session.new_client_id()})
    await session.http("POST", "/prompt", content="{not json")


async def partial(session: Session) -> None:
    """Accepted, with one output dropped."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = await session.submit(graphs.partial(session.prefix), client_id)
    await socket.wait_end(prompt_id)
    await session.record_of(prompt_id)


async def interrupt(session: Session) -> None:
    """A running prompt is interrupted by its id; another id has no effect."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await socket.wait(lambda m: _starts(m, "2"))
    await session.http("POST", "/interrupt", json={"prompt_id": session.new_prompt_id()})
    await socket.wait(lambda m: _starts(m, "4"))
    await session.http("POST", "/interrupt", json={"prompt_id": prompt_id})
    await socket.wait_end(prompt_id)
    await session.record_of(prompt_id)


async def delete_pending(session: Session) -> None:
    """A waiting prompt is deleted: no message names it and no record is made."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    running = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await socket.wait(lambda m: _starts(m, "2"))
    pending = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await session.http("GET", "/queue")
    await session.http("POST", "/queue", json={"delete": [pending]})
    await session.http("GET", "/prompt")
    await session.http("POST", "/interrupt", json={"prompt_id": running})
    await socket.wait_end(running)
    await session.record_of(pending)


async def clear(session: Session) -> None:
    """The queue is cleared, then a record is deleted."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    running = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await socket.wait(lambda m: _starts(m, "2"))
    for _ in range(2):
        await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await session.http("POST", "/queue", json={"clear": True})
    await session.http("POST", "/interrupt", json={"prompt_id": running})
    await socket.wait_end(running)
    await session.http("POST", "/history", json={"delete": [running]})
    await session.record_of(running)


async def reconnect(session: Session) -> None:
    """A client id taken over while its old socket is open; the end of the old one deafens the new.

    A third socket with a fresh id shows that the server is well.
    """
    client_id = session.new_client_id()
    old = await session.open(client_id)
    new = await session.open(client_id)
    first = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await new.wait_end(first)
    await session.close(old)
    await trio.sleep(SILENCE_S)
    fresh_id = session.new_client_id()
    fresh = await session.open(fresh_id)
    graph = graphs.success(f"{session.prefix}-b", session.colour)
    second = await session.submit(graph, fresh_id)
    await fresh.wait_end(second)
    third = await session.submit(graphs.success(f"{session.prefix}-c", session.colour), client_id)
    await session.wait_recorded(third)
    await trio.sleep(SILENCE_S)


async def reconnect_while_running(session: Session) -> None:
    """A new socket with the id of a running prompt is told its node, without a prompt id."""
    client_id = session.new_client_id()
    old = await session.open(client_id)
    prompt_id = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await old.wait(lambda m: _starts(m, "2"))
    await session.close(old)
    await trio.sleep(0.05)
    new = await session.open(client_id)
    await new.wait(lambda m: m.get("type") == "executing")
    await session.http("POST", "/interrupt", json={"prompt_id": prompt_id})
    await new.wait_end(prompt_id)


async def mixed(session: Session) -> None:
    """Pictures, an animation and a text in one graph."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = await session.submit(graphs.mixed(session.prefix, session.colour), client_id)
    await socket.wait_end(prompt_id)
    record = await session.record_of(prompt_id)
    assert record is not None
    for node_id in ("9", "10"):
        for file in record["outputs"][node_id]["images"]:
            await session.http("GET", f"/view?filename={file['filename']}&type=output&subfolder=")


async def anonymous(session: Session) -> None:
    """A prompt without a client id: others see `status` and broadcast progress only."""
    socket = await session.open(session.new_client_id())
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), None)
    await session.wait_recorded(prompt_id)
    await trio.sleep(SILENCE_S)
    assert socket.received


async def progress(session: Session) -> None:
    """A node that ticks and sends binary previews. Needs the SimSleep node on the server."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    graph = graphs.sleep(session.prefix, 0.15, session.colour, with_preview=True)
    prompt_id = await session.submit(graph, client_id)
    await socket.wait_end(prompt_id)


async def features(session: Session) -> None:
    """The handshake of flags, the routes that say what a server is, and the /api prefix."""
    socket = await session.open()
    await session.send(socket, {"type": "feature_flags", "data": {}})
    await socket.wait(lambda m: m.get("type") == "feature_flags")
    await session.http("GET", "/features")
    await session.http("GET", "/api/features")
    await session.http("GET", "/object_info/EmptyImage")
    await session.http("GET", "/object_info/NoSuchNodeAnywhere")
    await session.http("GET", "/api/prompt")
    await session.http("GET", "/api/jobs")


async def files(session: Session) -> None:
    """Uploads with and without a name in use, and views that are refused."""
    name = f"{session.prefix}.bin"

    async def upload(content: bytes, **data: str) -> None:
        form = {"files": {"image": (name, content, "application/octet-stream")}, "data": data}
        await session.http("POST", "/upload/image", **form)

    await upload(b"one")
    await upload(b"one")
    await upload(b"two")
    await upload(b"three", overwrite="true")
    await upload(b"four", subfolder="sub", type="temp")
    await upload(b"five", subfolder="../..")
    await session.http("POST", "/upload/image", data={"type": "input"})
    for query in (
        f"filename={name}&type=input",
        f"filename={name}&type=temp&subfolder=sub",
        f"filename={name}%20[input]",
        f"filename={name}&type=output",
        f"filename={name}&type=nonsense",
        f"filename={name}&type=input&subfolder=../..",
        "filename=a..b.png",
        "filename=/etc/hostname",
        "filename=",
        "type=output",
    ):
        await session.http("GET", f"/view?{query}")


def _starts(message: Message, node: str) -> bool:
    return message.get("type") == "executing" and message["data"]["node"] == node


SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.__name__: scenario
    for scenario in (
        success,
        cached,
        failing,
        refused,
        partial,
        interrupt,
        delete_pending,
        clear,
        reconnect,
        reconnect_while_running,
        mixed,
        anonymous,
        progress,
        features,
        files,
    )
}
