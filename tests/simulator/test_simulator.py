"""The lives of a simulated server, its files, and the edges of its protocol."""

from __future__ import annotations

from pathlib import Path

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from comfyd.simulator import Simulator, media
from comfyd.simulator.files import DiskFiles, Files, MemoryFiles
from tests.simulator.client import (
    CutOffError,
    ask,
    ask_on,
    graph,
    listening,
    record_of,
    submit,
    wait_recorded,
)


async def test_a_restart_loses_the_memory_and_keeps_the_output(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    done = await submit(simulator, graph("kept"))
    await wait_recorded(simulator, done)
    preview = {
        "1": graph()["1"],
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    shown = await wait_recorded(simulator, await submit(simulator, preview))
    temp = shown["outputs"]["9"]["images"][0]["filename"]
    assert (await ask(simulator, "GET", f"/view?filename={temp}&type=temp")).status == 200
    running = await submit(simulator, graph(seconds=1000.0))
    waiting = await submit(simulator, graph())
    async with listening(simulator, "me") as ear:
        simulator.restart()
        await trio.sleep(1)
        assert ear.is_closed

    assert simulator.restarts == 1
    assert simulator.running == simulator.pending == simulator.history == []
    assert simulator.executions == {done: 1, shown["prompt"][1]: 1, running: 1}
    assert simulator.posts[waiting] == 1
    assert (await ask(simulator, "GET", f"/view?filename={temp}&type=temp")).status == 404
    assert (await ask(simulator, "GET", "/view?filename=kept_00001_.png")).status == 200
    again = await wait_recorded(simulator, await submit(simulator, graph("kept")))
    assert again["outputs"]["9"]["images"][0]["filename"] == "kept_00002_.png", "no cache either"


async def test_a_crashing_node_takes_the_server_down(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    nodes = graph()
    nodes["2"] = {"class_type": "SimCrash", "inputs": {"image": ["1", 0]}}
    nodes["9"]["inputs"]["images"] = ["2", 0]
    prompt_id = await submit(simulator, nodes)
    await trio.sleep(5)
    assert simulator.restarts == 1
    assert await record_of(simulator, prompt_id) is None
    await wait_recorded(simulator, await submit(simulator, graph()))


async def test_a_killed_server_refuses_until_it_is_revived(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    async with listening(simulator, "me") as ear:
        simulator.kill()
        await trio.sleep(1)
        assert ear.is_closed
    with pytest.raises(ConnectionRefusedError):
        await simulator.connect()
    simulator.revive()
    assert simulator.restarts == 1
    assert (await ask(simulator, "GET", "/queue")).status == 200


async def test_a_killed_server_frees_its_port_and_takes_it_again() -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            simulator = Simulator(run_s=0)
            url = await nursery.start(simulator.serve)
            port = int(url.rpartition(":")[2])
            simulator.kill()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(OSError, match=r"127\.0\.0\.1"):
                await trio.open_tcp_stream("127.0.0.1", port)
            simulator.revive()
            await trio.testing.wait_all_tasks_blocked(0.01)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                reply = await ask_on(stream, h11.Connection(h11.CLIENT), "GET", "/queue")
            assert reply.status == 200
            assert simulator.url == url
            nursery.cancel_scope.cancel()


async def test_one_client_that_does_not_read_silences_all() -> None:
    text = "x" * 1_000_000
    handshake = (
        b"GET /ws HTTP/1.1\r\nHost: sim\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).replace(b"/ws ", b"/ws?clientId=slow ")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            simulator = Simulator(run_s=0)
            url = await nursery.start(simulator.serve)
            slow = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            await slow.send_all(handshake)
            async with listening(simulator, "other") as ear:
                for number in range(12):
                    source = {"source": f"{number}{text}"}
                    nodes = {"5": {"class_type": "PreviewAny", "inputs": source}}
                    prompt_id = await submit(simulator, nodes, "slow")
                    await wait_recorded(simulator, prompt_id)
                # Nothing was queued for long, so all is told but for what the slow one holds up.
                assert ear.types.count("status") < 1 + 3 * 12
                await slow.aclose()
                await ear.wait_count("status", 1 + 3 * 12)
            nursery.cancel_scope.cancel()


async def test_a_dropped_connection_keeps_the_memory(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    prompt_id = await submit(simulator, graph(seconds=100.0))
    async with listening(simulator, "me") as ear:
        simulator.drop_connections()
        await trio.sleep(1)
        assert ear.is_closed
    assert simulator.running == [prompt_id]
    assert simulator.restarts == 0


async def test_others_may_clear_and_delete(autojump_clock: MockClock, simulator: Simulator) -> None:
    done = await submit(simulator, graph())
    await wait_recorded(simulator, done)
    running = await submit(simulator, graph(seconds=100.0))
    waiting = await submit(simulator, graph(colour=2))
    await trio.sleep(1)

    assert simulator.delete_pending(waiting)
    assert not simulator.delete_pending(running)
    simulator.clear_history()
    assert await record_of(simulator, done) is None
    assert (simulator.running, simulator.pending) == ([running], [])


async def test_a_sleep_of_hours_takes_no_time_and_can_be_interrupted(
    autojump_clock: MockClock,
    simulator: Simulator,
) -> None:
    prompt_id = await submit(simulator, graph(seconds=7200.0), "me")
    async with listening(simulator, "me") as ear:
        await trio.sleep(3600)
        assert 50 < ear.types.count("progress") < 200
        await ask(simulator, "POST", "/interrupt", {"prompt_id": prompt_id})
        await trio.sleep(0.1)
        assert ear.types[-3:] == ["execution_interrupted", "status", "executing"]


async def test_names_are_used_again_when_files_are_deleted(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    names = []
    for colour in (1, 2, 3):
        record = await wait_recorded(simulator, await submit(simulator, graph(colour=colour)))
        names.append(record["outputs"]["9"]["images"][0]["filename"])
        if colour == 2:
            simulator.files.delete("output", "", names[-1])
    assert names == ["sim_00001_.png", "sim_00002_.png", "sim_00002_.png"]


async def test_a_cached_prompt_names_a_file_that_may_be_gone(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    await wait_recorded(simulator, await submit(simulator, graph()))
    simulator.files.delete("output", "", "sim_00001_.png")
    record = await wait_recorded(simulator, await submit(simulator, graph()))
    assert record["outputs"]["9"]["images"][0]["filename"] == "sim_00001_.png"
    assert (await ask(simulator, "GET", "/view?filename=sim_00001_.png")).status == 404


async def test_equal_number_and_id_kill_the_worker(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    await submit(simulator, graph(seconds=1.0))
    first = await submit(simulator, graph())
    for colour in (1, 2):
        body = {"prompt": graph(colour=colour), "prompt_id": "same", "number": 5}
        assert (await ask(simulator, "POST", "/prompt", body)).status == 200
    await trio.sleep(1000)
    assert simulator.executions[first] == simulator.executions["same"] == 0
    assert simulator.running == []
    assert simulator.pending


async def test_a_connection_serves_many_requests(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    async with await simulator.connect() as stream:
        connection = h11.Connection(h11.CLIENT)
        for _ in range(3):
            assert (await ask_on(stream, connection, "GET", "/queue")).status == 200
            connection.start_next_cycle()
        assert simulator.connections == 1
    await trio.sleep(1)
    assert simulator.connections == 0


async def test_what_is_no_http_is_a_400(autojump_clock: MockClock, simulator: Simulator) -> None:
    async with await simulator.connect() as stream:
        await stream.send_all(b"\x00\x01\x02\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")


async def test_a_request_cut_short_is_forgotten(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    async with await simulator.connect() as stream:
        await stream.send_all(b"POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    await trio.sleep(1)
    assert simulator.connections == 0
    assert simulator.posts == {}


async def test_a_body_that_is_too_large_is_a_413(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    size_bytes = 100 * 1024 * 1024 + 1
    async with await simulator.connect() as stream:
        head = f"POST /prompt HTTP/1.1\r\nHost: sim\r\nContent-Length: {size_bytes}\r\n\r\n"
        await stream.send_all(head.encode())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 413")


async def test_any_ui_can_be_output(autojump_clock: MockClock, simulator: Simulator) -> None:
    ui = (
        '{"gifs": [{"filename": "a.mp4", "subfolder": "s", "type": "output", "rate": NaN}],'
        ' "text": ["x"], "numbers": [1, null]}'
    )
    nodes = {"5": {"class_type": "SimUi", "inputs": {"ui": ui}}}
    prompt_id = await submit(simulator, nodes)
    await wait_recorded(simulator, prompt_id)
    reply = await ask(simulator, "GET", f"/history/{prompt_id}")
    assert b'"rate": NaN' in reply.body
    assert reply.json()[prompt_id]["outputs"]["5"]["numbers"] == [1, None]
    video = await ask(simulator, "GET", "/view?filename=a.mp4&subfolder=s")
    assert (video.headers["content-type"], video.body) == ("video/mp4", media.MP4)


@pytest.mark.parametrize("ui", ["{", "[]", '{"images": 1}'])
async def test_a_ui_that_is_none_fails(
    autojump_clock: MockClock, simulator: Simulator, ui: str
) -> None:
    nodes = {"5": {"class_type": "SimUi", "inputs": {"ui": ui}}}
    record = await wait_recorded(simulator, await submit(simulator, nodes))
    assert record["status"]["messages"][-1][0] == "execution_error"


async def test_the_version_is_what_was_asked_for(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        simulator = Simulator(version="0.3.7")
        await nursery.start(simulator.run)
        stats = (await ask(simulator, "GET", "/system_stats")).json()
        nursery.cancel_scope.cancel()
    assert stats["system"]["comfyui_version"] == "0.3.7"


async def test_nothing_connects_before_it_runs() -> None:
    simulator = Simulator()
    with pytest.raises(ConnectionRefusedError):
        await simulator.connect()
    with pytest.raises(RuntimeError, match="not listening"):
        assert simulator.url


async def test_an_answer_that_is_cut_off_is_told_apart(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    prompt_id = await submit(simulator, graph())
    simulator.faults.set("slow=10s")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_cut_off, simulator, prompt_id)
        await trio.sleep(1)
        simulator.restart()


async def _expect_cut_off(simulator: Simulator, prompt_id: str) -> None:
    with pytest.raises(CutOffError):
        await ask(simulator, "GET", f"/history/{prompt_id}")


@pytest.fixture(params=["memory", "disk"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return MemoryFiles() if request.param == "memory" else DiskFiles(tmp_path)


def test_files_are_kept_by_folder_and_subfolder(files: Files) -> None:
    files.write("output", "", "a.png", b"1")
    files.write("output", "sub/deep", "a.png", b"2")
    files.write("temp", "sub", "b.png", b"3")

    assert files.read("output", "", "a.png") == b"1"
    assert files.read("output", "sub/./deep", "a.png") == b"2"
    assert files.read("output", "sub", "a.png") is None
    assert files.names("output", "sub/deep") == ["a.png"]
    assert files.names("output", "nowhere") == []
    files.delete("output", "", "a.png")
    files.delete("output", "", "a.png")
    assert files.names("output", "") == []
    files.clear("temp")
    assert files.read("temp", "sub", "b.png") is None
    assert files.read("output", "sub/deep", "a.png") == b"2"
