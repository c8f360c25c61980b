"""Queueing, deleting and interrupting: what moves where, and what leaves no trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from tests.contract import graphs
from tests.contract.scenarios import SILENCE_S
from tests.contract.test_messages import naming, queue_counts
from tests.contract.wire import Session, Socket


async def occupied(session: Session) -> tuple[Socket, str, str]:
    """A server whose worker is busy: the socket, its client id and the running prompt's id."""
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    running = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await socket.wait(lambda m: m.get("type") == "executing")
    return socket, client_id, running


async def interrupt(session: Session, prompt_id: str) -> None:
    response = await session.http("POST", "/interrupt", json={"prompt_id": prompt_id})
    assert (response.status_code, response.content) == (200, b"")


async def queue_of(session: Session) -> tuple[list[Any], list[Any]]:
    queue = (await session.http("GET", "/queue")).json()
    assert set(queue) == {"queue_running", "queue_pending"}
    return queue["queue_running"], queue["queue_pending"]


async def test_an_item_is_number_id_graph_extra_data_and_outputs(session: Session) -> None:
    socket, client_id, running = await occupied(session)
    waiting = session.new_prompt_id()
    graph = graphs.success(session.prefix, session.colour)
    body = {
        "prompt": graph,
        "prompt_id": waiting,
        "client_id": client_id,
        "extra_data": {"comfyd": {"job": "j", "attempt": 1}},
    }
    number = (await session.http("POST", "/prompt", json=body)).json()["number"]
    now_running, now_pending = await queue_of(session)
    await session.http("POST", "/queue", json={"delete": [waiting]})
    await interrupt(session, running)
    await socket.wait_end(running)

    assert [item[1] for item in now_running] == [running]
    extra_data = {"comfyd": {"job": "j", "attempt": 1}, "client_id": client_id}
    assert now_pending == [[number, waiting, graph, extra_data, ["9"]]]


async def test_extra_data_is_kept_in_the_record(session: Session) -> None:
    prompt_id = session.new_prompt_id()
    extra_data = {"comfyd": {"job": "j", "attempt": 1}}
    graph = graphs.success(session.prefix, session.colour)
    body = {"prompt": graph, "prompt_id": prompt_id, "extra_data": extra_data}
    await session.http("POST", "/prompt", json=body)
    record = await session.wait_recorded(prompt_id)
    assert record["prompt"][3] == extra_data


async def test_a_deleted_prompt_leaves_no_trace(session: Session) -> None:
    socket, client_id, running = await occupied(session)
    waiting = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    response = await session.http("POST", "/queue", json={"delete": [waiting]})
    _, pending = await queue_of(session)
    await interrupt(session, running)
    await socket.wait_end(running)
    await trio.sleep(SILENCE_S)

    assert (response.status_code, response.content) == (200, b"")
    assert pending == []
    assert naming(socket.received, waiting) == []
    assert await session.record_of(waiting) is None
    told_twice = [2, 1, 1, 0]
    assert queue_counts(socket)[-4:] == told_twice


async def test_clearing_the_queue_spares_the_running_prompt(session: Session) -> None:
    socket, client_id, running = await occupied(session)
    for _ in range(2):
        await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await session.http("POST", "/queue", json={"clear": True})
    now_running, pending = await queue_of(session)
    await interrupt(session, running)
    await socket.wait_end(running)

    assert [item[1] for item in now_running] == [running]
    assert pending == []


async def test_deleting_the_running_or_an_unknown_prompt_does_nothing(session: Session) -> None:
    socket, _, running = await occupied(session)
    for prompt_id in (running, session.new_prompt_id()):
        response = await session.http("POST", "/queue", json={"delete": [prompt_id]})
        assert response.status_code == 200
    now_running, _ = await queue_of(session)
    await interrupt(session, running)
    await socket.wait_end(running)

    assert [item[1] for item in now_running] == [running]


async def test_an_interrupted_prompt_is_recorded_as_such(session: Session) -> None:
    socket, _, running = await occupied(session)
    await interrupt(session, running)
    await socket.wait_end(running)
    record = await session.record_of(running)

    assert record is not None
    assert record["status"]["status_str"] == "error", "only the messages tell it from an error"
    assert record["status"]["completed"] is False
    event, data = record["status"]["messages"][-1]
    assert event == "execution_interrupted"
    assert set(data) == {"prompt_id", "node_id", "node_type", "executed", "timestamp"}


async def test_an_interrupt_for_a_waiting_prompt_does_nothing(session: Session) -> None:
    socket, client_id, running = await occupied(session)
    waiting = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await interrupt(session, waiting)
    await trio.sleep(SILENCE_S)
    now_running, pending = await queue_of(session)
    await interrupt(session, running)
    await socket.wait_end(waiting)
    record = await session.record_of(waiting)

    assert [item[1] for item in now_running] == [running]
    assert [item[1] for item in pending] == [waiting]
    assert record is not None
    assert record["status"]["completed"] is True


async def test_an_interrupt_of_an_idle_server_does_not_hit_the_next_prompt(
    session: Session,
) -> None:
    response = await session.http("POST", "/interrupt")
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), None)
    record = await session.wait_recorded(prompt_id)

    assert response.status_code == 200
    assert record["status"]["completed"] is True


async def test_an_interrupt_without_an_id_hits_whatever_runs(session: Session) -> None:
    socket, _, running = await occupied(session)
    await session.http("POST", "/interrupt", json={})
    await socket.wait(lambda m: m.get("type") == "execution_interrupted")
    await socket.wait_end(running)


async def test_the_front_of_the_queue_runs_first(session: Session) -> None:
    socket, client_id, running = await occupied(session)
    last = await session.submit(graphs.success(f"{session.prefix}-l", session.colour), client_id)
    first = session.new_prompt_id()
    body = {
        "prompt": graphs.success(f"{session.prefix}-f", session.colour),
        "prompt_id": first,
        "client_id": client_id,
        "front": True,
    }
    answer = (await session.http("POST", "/prompt", json=body)).json()
    await interrupt(session, running)
    await socket.wait_end(last)

    assert answer["number"] <= 0
    started = [
        m["data"]["prompt_id"] for m in socket.received if m.get("type") == "execution_start"
    ]
    assert started == [running, first, last]


async def test_the_same_id_twice_runs_twice(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = session.new_prompt_id()
    body = {
        "prompt": graphs.success(session.prefix, session.colour),
        "prompt_id": prompt_id,
        "client_id": client_id,
    }
    for _ in range(2):
        assert (await session.http("POST", "/prompt", json=body)).status_code == 200
    await socket.wait_end(prompt_id)
    await socket.wait_end(prompt_id)


async def test_records_can_be_deleted(session: Session) -> None:
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), None)
    await session.wait_recorded(prompt_id)
    response = await session.http("POST", "/history", json={"delete": [prompt_id]})

    assert (response.status_code, response.content) == (200, b"")
    assert await session.record_of(prompt_id) is None


async def test_the_newest_records_are_listed_last(session: Session) -> None:
    ids = []
    for number in range(3):
        graph = graphs.success(f"{session.prefix}-{number}", session.colour)
        ids.append(await session.submit(graph, None))
        await session.wait_recorded(ids[-1])
    listed = (await session.http("GET", "/history?max_items=2")).json()

    assert list(listed) == ids[-2:]


@pytest.mark.parametrize("path", ["/queue", "/history", "/prompt"])
async def test_a_body_that_is_no_json_is_a_500(session: Session, path: str) -> None:
    response = await session.http("POST", path, content="{not json")
    assert response.status_code == 500
    assert response.headers["content-type"].startswith("text/plain")


async def test_not_a_number_is_written_bare(session: Session) -> None:
    prompt_id = session.new_prompt_id()
    graph = graphs.slow(session.prefix, session.colour)
    graph = {"1": graph["1"], "2": graph["2"], "9": {**graph["99"]}}
    graph["9"]["inputs"] = {"images": ["2", 0], "filename_prefix": session.prefix}
    text = json.dumps({"prompt": graph, "prompt_id": prompt_id})
    text = text.replace('"sigma": 1.0', '"sigma": NaN')
    assert (await session.http("POST", "/prompt", content=text)).status_code == 200
    await session.wait_recorded(prompt_id)
    response = await session.http("GET", f"/history/{prompt_id}")

    assert '"sigma": NaN' in response.text
