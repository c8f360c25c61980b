"""What is said on the WebSocket: in which order, to whom, and what can be relied on by then."""

from __future__ import annotations

import pytest
import trio

from tests.contract import graphs
from tests.contract.scenarios import SILENCE_S
from tests.contract.wire import Message, Session, Socket, is_end


def types_of(messages: list[Message]) -> list[str]:
    return [m.get("type", "binary") for m in messages]


def naming(messages: list[Message], prompt_id: str) -> list[Message]:
    return [m for m in messages if m.get("data", {}).get("prompt_id") == prompt_id]


def queue_counts(socket: Socket) -> list[int]:
    return [
        m["data"]["status"]["exec_info"]["queue_remaining"]
        for m in socket.received
        if m.get("type") == "status"
    ]


async def test_a_successful_prompt_is_told_in_this_order(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await socket.wait_end(prompt_id)

    assert types_of(socket.received) == [
        "status",  # connected
        "status",  # queued
        "status",  # taken by the worker
        "execution_start",
        "execution_cached",
        *("progress_state", "executing", "progress_state"),
        *("progress_state", "executing", "executed", "progress_state"),
        "execution_success",
        "status",  # recorded
        "executing",  # node null
    ]
    nodes = [m["data"]["node"] for m in socket.received if m["type"] == "executing"]
    assert nodes == ["1", "9", None]
    assert queue_counts(socket)[1:] == [1, 1, 0]


async def test_the_end_marker_comes_after_the_record(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    for number in range(5):
        graph = graphs.success(f"{session.prefix}-{number}", session.colour)
        prompt_id = await session.submit(graph, client_id)
        await socket.wait_end(prompt_id)
        queue = (await session.http("GET", "/queue")).json()
        record = await session.record_of(prompt_id)

        listed = [item[1] for items in queue.values() for item in items]
        assert prompt_id not in listed
        assert record is not None
        assert record["status"]["messages"][-1][0] == "execution_success"


async def test_only_the_first_status_carries_the_sid(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await socket.wait_end(prompt_id)

    statuses = [m["data"] for m in socket.received if m["type"] == "status"]
    assert statuses[0]["sid"] == client_id
    assert all("sid" not in status for status in statuses[1:])


async def test_a_socket_without_a_client_id_is_given_one(session: Session) -> None:
    socket = await session.open()
    sid = socket.received[0]["data"]["sid"]
    assert len(sid) == 32
    assert int(sid, 16) >= 0


async def test_only_the_submitter_hears_of_its_prompt(session: Session) -> None:
    mine, theirs = session.new_client_id(), session.new_client_id()
    my_socket, their_socket = await session.open(mine), await session.open(theirs)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), mine)
    await my_socket.wait_end(prompt_id)
    await trio.sleep(SILENCE_S)

    assert naming(my_socket.received, prompt_id)
    assert set(types_of(their_socket.received)) == {"status"}
    assert queue_counts(their_socket)[1:] == [1, 1, 0]


async def test_a_prompt_of_an_absent_client_runs_unheard(session: Session) -> None:
    other = await session.open(session.new_client_id())
    graph = graphs.success(session.prefix, session.colour)
    prompt_id = await session.submit(graph, session.new_client_id())
    record = await session.wait_recorded(prompt_id)
    await trio.sleep(SILENCE_S)

    assert record["status"]["completed"] is True
    assert naming(other.received, prompt_id) == []


async def test_a_prompt_without_a_client_id_has_its_progress_broadcast(session: Session) -> None:
    other = await session.open(session.new_client_id())
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), None)
    await session.wait_recorded(prompt_id)
    await trio.sleep(SILENCE_S)

    assert set(types_of(naming(other.received, prompt_id))) == {"progress_state"}


async def test_a_cached_prompt_executes_nothing_and_names_the_old_file(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    graph = graphs.success(session.prefix, session.colour)
    first = await session.submit(graph, client_id)
    await socket.wait_end(first)
    second = await session.submit(graph, client_id)
    await socket.wait_end(second)

    told = naming(socket.received, second)
    assert types_of(told) == [
        "execution_start",
        "execution_cached",
        "executed",
        "progress_state",
        "execution_success",
        "executing",
    ]
    assert sorted(told[1]["data"]["nodes"]) == ["1", "9"]
    old, new = await session.record_of(first), await session.record_of(second)
    assert old is not None
    assert new is not None
    assert new["outputs"] == old["outputs"]
    assert new["status"]["status_str"] == "success"


async def test_a_failing_node_ends_the_prompt(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    graph = graphs.half_failing(session.prefix, session.colour)
    prompt_id = await session.submit(graph, client_id)
    await socket.wait_end(prompt_id)
    record = await session.record_of(prompt_id)

    assert types_of(socket.received)[-3:] == ["execution_error", "status", "executing"]
    error = socket.received[-3]["data"]
    assert (error["node_id"], error["node_type"]) == ("2", "ImageBlur")
    assert error["exception_type"] == "RuntimeError"
    assert error["exception_message"].endswith("\n")
    assert sorted(error["executed"]) == ["1", "8"]
    assert set(error["current_inputs"]) == {"image", "blur_radius", "sigma"}
    assert record is not None
    assert record["status"]["status_str"] == "error"
    assert record["status"]["completed"] is False
    assert [event for event, _ in record["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_error",
    ]
    assert list(record["outputs"]) == ["8"], "what was made before the failure is recorded"


async def test_an_old_socket_falls_silent_when_its_client_id_is_taken_over(
    session: Session,
) -> None:
    client_id = session.new_client_id()
    old = await session.open(client_id)
    new = await session.open(client_id)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await new.wait_end(prompt_id)

    assert len(old.received) == 1
    with trio.fail_after(2):
        await old.connection.ping()


async def test_the_end_of_the_old_socket_deafens_the_new_one(session: Session) -> None:
    client_id = session.new_client_id()
    old = await session.open(client_id)
    new = await session.open(client_id)
    await session.close(old)
    await trio.sleep(SILENCE_S)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await session.wait_recorded(prompt_id)
    await trio.sleep(SILENCE_S)

    assert len(new.received) == 1, "not even status arrives"
    with trio.fail_after(2):
        await new.connection.ping()
    assert not new.closed.is_set()


async def test_a_socket_closed_before_its_id_is_used_again_leaves_the_new_one_hearing(
    session: Session,
) -> None:
    client_id = session.new_client_id()
    old = await session.open(client_id)
    await session.close(old)
    await trio.sleep(SILENCE_S)
    new = await session.open(client_id)
    prompt_id = await session.submit(graphs.success(session.prefix, session.colour), client_id)
    await new.wait_end(prompt_id)


async def test_a_reconnect_is_told_the_running_node_without_a_prompt_id(session: Session) -> None:
    client_id = session.new_client_id()
    old = await session.open(client_id)
    prompt_id = await session.submit(graphs.slow(session.prefix, session.colour), client_id)
    await old.wait(lambda m: m.get("type") == "executing")
    await session.close(old)
    new = await session.open(client_id)
    told = await new.wait(lambda m: m.get("type") == "executing")
    await session.http("POST", "/interrupt", json={"prompt_id": prompt_id})

    assert list(told["data"]) == ["node"]
    await new.wait_end(prompt_id)
    assert not any(m.get("type") == "execution_start" for m in new.received)


@pytest.mark.parametrize("flags", [None, {"supports_preview_metadata": True}])
async def test_previews_are_binary_and_follow_the_flags(
    session: Session, flags: dict[str, bool] | None
) -> None:
    if not await session.has_node("SimSleep"):
        pytest.skip("core nodes send previews only with a model; the server has no SimSleep")
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    if flags is not None:
        await session.send(socket, {"type": "feature_flags", "data": flags})
        await socket.wait(lambda m: m.get("type") == "feature_flags")
    graph = graphs.sleep(session.prefix, 0.15, session.colour, with_preview=True)
    prompt_id = await session.submit(graph, client_id)
    await socket.wait_end(prompt_id)

    events = {m["binary"] for m in socket.received if "binary" in m}
    assert events == {4 if flags else 1}
    ticks = [m["data"] for m in socket.received if m.get("type") == "progress"]
    assert [tick["value"] for tick in ticks] == list(range(1, ticks[0]["max"] + 1))
    assert {(tick["prompt_id"], tick["node"]) for tick in ticks} == {(prompt_id, "2")}


async def test_messages_may_be_larger_than_a_mebibyte(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    text = session.run * 300_000
    graph = {"12": {"class_type": "PreviewAny", "inputs": {"source": text}}}
    prompt_id = await session.submit(graph, client_id)
    told = await socket.wait(lambda m: m.get("type") == "executed")
    await socket.wait_end(prompt_id)

    assert told["data"]["output"] == {"text": [text]}


async def test_a_foreign_origin_is_refused_at_the_handshake(session: Session) -> None:
    headers = {
        "Origin": "http://example.invalid",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    assert (await session.http("GET", "/ws", headers=headers)).status_code == 403


async def test_two_prompts_of_one_client_end_in_order_of_submission(session: Session) -> None:
    client_id = session.new_client_id()
    socket = await session.open(client_id)
    ids = [
        await session.submit(graphs.success(f"{session.prefix}-{n}", session.colour), client_id)
        for n in range(3)
    ]
    await socket.wait_end(ids[-1])

    ends = [m["data"]["prompt_id"] for m in socket.received if any(is_end(m, i) for i in ids)]
    assert ends == ids
