"""Faults of a server that is sick, or lacks something others have, do what their one line says."""

from __future__ import annotations

from typing import Any

import h11
import pytest
import trio
from trio.testing import MockClock

from comfyd.simulator import Simulator
from tests.simulator.client import (
    Reply,
    ask,
    graph,
    listening,
    record_of,
    submit,
    wait_recorded,
)

LONG_S = 1000.0


def through(class_type: str, **inputs: object) -> dict[str, Any]:
    """A picture that goes through one more node."""
    nodes = graph()
    nodes["2"] = {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}}
    nodes["9"]["inputs"]["images"] = ["2", 0]
    return nodes


async def post(simulator: Simulator, nodes: dict[str, Any]) -> Reply:
    return await ask(simulator, "POST", "/prompt", {"prompt": nodes})


async def upload(simulator: Simulator, content: bytes) -> Reply:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.bin"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    connection = h11.Connection(h11.CLIENT)
    headers = {
        "Host": "sim",
        "Content-Type": "multipart/form-data; boundary=x",
        "Content-Length": str(len(body)),
    }
    head = h11.Request(method="POST", target="/upload/image", headers=list(headers.items()))
    async with await simulator.connect() as stream:
        await stream.send_all((connection.send(head) or b"") + body)
        status, answer = 0, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
            else:
                return Reply(status, {}, answer)


async def failure(simulator: Simulator, nodes: dict[str, Any]) -> dict[str, Any]:
    record = await wait_recorded(simulator, await submit(simulator, nodes))
    event, data = record["status"]["messages"][-1]
    assert event == "execution_error"
    return dict(data)


async def test_a_stuck_worker_takes_nothing_and_goes_on_when_it_is_well(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("stuck-worker")
    ids = [await submit(simulator, graph(colour=n)) for n in range(3)]
    await trio.sleep(LONG_S)
    queue = (await ask(simulator, "GET", "/queue")).json()
    assert queue["queue_running"] == []
    assert [item[1] for item in queue["queue_pending"]] == ids
    await ask(simulator, "POST", "/queue", {"delete": [ids[1]]})
    assert simulator.pending == [ids[0], ids[2]]
    simulator.faults.clear()
    for prompt_id in (ids[0], ids[2]):
        await wait_recorded(simulator, prompt_id)
    assert simulator.executions == {ids[0]: 1, ids[2]: 1}


async def test_a_worker_that_gets_stuck_while_it_is_idle(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    await wait_recorded(simulator, await submit(simulator, graph()))
    simulator.faults.set("stuck-worker")
    waiting = await submit(simulator, graph(colour=2))
    await trio.sleep(LONG_S)
    assert (simulator.running, simulator.pending) == ([], [waiting])


async def test_a_node_stands_still_until_it_is_interrupted(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("node-stalls=1")
    async with listening(simulator, "me") as ear:
        prompt_id = await submit(simulator, graph(), "me")
        await trio.sleep(1)
        heard = len(ear.heard)
        await trio.sleep(LONG_S)
        assert len(ear.heard) == heard, "not a word from a node that stands still"
        assert simulator.running == [prompt_id]
        await ask(simulator, "POST", "/interrupt", {"prompt_id": prompt_id})
        record = await wait_recorded(simulator, prompt_id)
    assert record["status"]["messages"][-1][0] == "execution_interrupted"
    await wait_recorded(simulator, await submit(simulator, graph(colour=2)))


async def test_a_node_hangs_whatever_one_says_to_it(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("node-hangs=1")
    prompt_id = await submit(simulator, graph())
    await trio.sleep(1)
    await ask(simulator, "POST", "/interrupt", {"prompt_id": prompt_id})
    await trio.sleep(LONG_S)
    assert simulator.running == [prompt_id]
    assert await record_of(simulator, prompt_id) is None
    simulator.restart()
    await wait_recorded(simulator, await submit(simulator, graph()))


@pytest.mark.parametrize(
    ("kind", "exception_type", "says"),
    [
        ("cuda", "RuntimeError", "CUDA error: an illegal memory access was encountered"),
        ("memory", "torch.OutOfMemoryError", "CUDA out of memory."),
        ("other", "RuntimeError", "cannot be multiplied"),
    ],
)
async def test_a_broken_card_fails_at_once(
    autojump_clock: MockClock, simulator: Simulator, kind: str, exception_type: str, says: str
) -> None:
    simulator.faults.set(f"card-fails={kind}")
    began_s = trio.current_time()
    for colour in range(3):
        data = await failure(simulator, graph(colour=colour))
        assert data["exception_type"] == exception_type
        assert says in data["exception_message"]
        assert (data["node_id"], data["node_type"]) == ("1", "EmptyImage")
    assert trio.current_time() - began_s < 0.5
    simulator.faults.clear()
    await wait_recorded(simulator, await submit(simulator, graph(colour=0)))


async def test_a_card_that_fails_twice(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("card-fails=cuda:2")
    for colour in range(2):
        await failure(simulator, graph(colour=colour))
    record = await wait_recorded(simulator, await submit(simulator, graph(colour=2)))
    assert record["status"]["completed"] is True


async def test_a_node_class_that_is_not_installed(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    nodes = through("ImageInvert")
    simulator.faults.set("missing-node=ImageInvert,ImageBlur")
    reply = await post(simulator, nodes)
    assert reply.status == 400
    assert reply.json()["error"]["type"] == "invalid_prompt"
    assert "ImageInvert does not exist" in reply.json()["error"]["message"]
    assert (await ask(simulator, "GET", "/object_info/ImageInvert")).json() == {}
    assert "ImageBlur" not in (await ask(simulator, "GET", "/object_info")).json()
    assert (await post(simulator, graph())).status == 200
    simulator.faults.clear()
    assert (await post(simulator, nodes)).status == 200


async def test_a_model_that_is_missing(autojump_clock: MockClock, simulator: Simulator) -> None:
    nodes = through("SimModel", model="tuned.safetensors")
    simulator.faults.set("missing-model=tuned.safetensors")
    reply = await post(simulator, nodes)
    assert reply.status == 400
    (reason,) = reply.json()["node_errors"]["2"]["errors"]
    assert reason["type"] == "value_not_in_list"
    assert reason["details"] == "model: 'tuned.safetensors' not in ['base.safetensors']"
    other = through("SimModel", model="base.safetensors")
    assert (await post(simulator, other)).status == 200
    simulator.faults.clear()
    assert (await post(simulator, nodes)).status == 200


async def test_a_body_that_is_too_large_is_refused(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("max-upload=1KiB")
    features = (await ask(simulator, "GET", "/features")).json()
    assert features["max_upload_size"] == 1024
    refused = await upload(simulator, bytes(1024))
    assert refused.status == 413
    assert refused.body == b"Maximum request body size 1024 exceeded."
    assert (await upload(simulator, bytes(512))).status == 200
    assert simulator.uploads == {"a.bin": 1}


async def test_an_upload_fails(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("upload-fail=507:1")
    assert [(await upload(simulator, b"x")).status for _ in range(2)] == [507, 200]
    assert simulator.uploads == {"a.bin": 1}


async def test_a_crash_takes_the_port_down_for_a_while(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("crash-down=30s")
    waiting = [await submit(simulator, nodes) for nodes in (through("SimCrash"), graph())]
    await trio.sleep(10)
    assert not simulator.alive
    with pytest.raises(ConnectionRefusedError):
        await ask(simulator, "GET", "/queue")
    await trio.sleep(30)
    assert (simulator.alive, simulator.restarts) == (True, 1)
    assert simulator.pending == simulator.running == simulator.history == []
    assert simulator.executions == {waiting[0]: 1}
    await wait_recorded(simulator, await submit(simulator, graph()))
