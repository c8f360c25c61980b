"""Faults of the message stream do what their one line says."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from comfyd.simulator import Simulator
from tests.simulator.client import (
    ask,
    graph,
    listening,
    record_of,
    submit,
    wait_recorded,
)

LONG_S = 1000.0


async def run_heard(simulator: Simulator, colour: int = 1) -> tuple[str, list[str]]:
    """Run a prompt with an open socket; its id and the types heard until all is quiet."""
    async with listening(simulator, "me") as ear:
        prompt_id = await submit(simulator, graph(colour=colour), "me")
        await wait_recorded(simulator, prompt_id)
        await trio.sleep(LONG_S)
        return prompt_id, ear.types


async def test_a_dropped_type_is_not_heard(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("drop-executed")
    _, types = await run_heard(simulator)
    assert "executed" not in types
    assert types[-3:] == ["execution_success", "status", "executing"]


async def test_the_end_alone_can_be_dropped(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("drop-end")
    _, types = await run_heard(simulator)
    assert types[-2:] == ["execution_success", "status"]
    assert types.count("executing") == 2


async def test_dropping_all_leaves_the_first_status(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("drop-all")
    _, types = await run_heard(simulator)
    assert types == ["status"]


async def test_some_are_dropped_with_a_probability(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("drop-end=0.5")
    ends = 0
    for colour in range(20):
        _, types = await run_heard(simulator, colour)
        ends += types.count("executing") - 2
    assert 3 < ends < 17


async def test_a_delay_holds_the_stream(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("delay-end=10s")
    async with listening(simulator, "me") as ear:
        prompt_id = await submit(simulator, graph(), "me")
        await wait_recorded(simulator, prompt_id)
        await trio.sleep(9)
        assert ear.types[-1] == "status"
        await trio.sleep(2)
        assert ear.types[-1] == "executing"


async def test_a_deaf_socket_gets_one_status_and_answers_pings(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("deaf=1")
    async with listening(simulator, "me") as deaf:
        prompt_id = await submit(simulator, graph(), "me")
        await wait_recorded(simulator, prompt_id)
        assert deaf.types == ["status"]
        with trio.fail_after(5):
            await deaf.connection.ping()
    _, types = await run_heard(simulator, 2)
    assert types[-1] == "executing", "the next socket hears again"


async def test_a_half_open_socket_stays_silent_for_ever(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    async with listening(simulator, "me") as ear:
        simulator.faults.half_open = "ws"
        prompt_id = await submit(simulator, graph(), "me")
        await wait_recorded(simulator, prompt_id)
        simulator.faults.half_open = None
        with pytest.raises(trio.TooSlowError), trio.fail_after(LONG_S):
            await ear.connection.ping()
        assert ear.types == ["status"]
        assert not ear.is_closed
        async with listening(simulator, "other") as other:
            await submit(simulator, graph(), "other")
            await trio.sleep(5)
            assert len(other.types) > 1


@pytest.mark.parametrize("which", ["http", "all"])
async def test_a_half_open_server_never_answers(
    autojump_clock: MockClock, simulator: Simulator, which: str
) -> None:
    simulator.faults.set(f"half-open={which}")
    with pytest.raises(trio.TooSlowError), trio.fail_after(LONG_S):
        await ask(simulator, "GET", "/queue")
    await trio.sleep(1)
    assert simulator.connections == 0, "the client's end ends the connection"


async def test_a_stalled_publisher_keeps_its_backlog(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("stalled-publisher")
    async with listening(simulator, "me") as ear:
        prompt_id = await submit(simulator, graph(), "me")
        await wait_recorded(simulator, prompt_id)
        await trio.sleep(LONG_S)
        assert ear.types == ["status"]
        simulator.faults.stalled_publisher = False
        await trio.sleep(1)
        assert ear.types[-1] == "executing"


async def test_a_refused_socket_is_a_403(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("ws-refuse=1")
    async with await simulator.connect() as stream:
        await stream.send_all(
            b"GET /ws HTTP/1.1\r\nHost: sim\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 403")
    async with listening(simulator, "me") as ear:
        assert ear.types == ["status"]


async def test_teardown_parts_the_success_from_the_record(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("teardown=60s")
    async with listening(simulator, "me") as ear:
        prompt_id = await submit(simulator, graph(), "me")
        await trio.sleep(30)
        assert ear.types[-1] == "execution_success"
        assert await record_of(simulator, prompt_id) is None
        assert simulator.running == [prompt_id]
        await trio.sleep(60)
        assert ear.types[-1] == "executing"
        assert await record_of(simulator, prompt_id) is not None


async def test_a_record_appears_late(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("history-delay=60s")
    prompt_id = await submit(simulator, graph())
    await trio.sleep(30)
    assert simulator.running == []
    assert await record_of(simulator, prompt_id) is None
    await trio.sleep(60)
    assert await record_of(simulator, prompt_id) is not None
