"""Client and tracker together against the simulator, over loopback."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from comfyd.comfyui.client import Client
from comfyd.comfyui.listener import Timings
from comfyd.comfyui.tracker import Tracker
from comfyd.core.model import End
from comfyd.errors import ServerRefused, ServerStatus, ServerUnreachable
from comfyd.simulator import Simulator
from tests.comfyui.log import Log

PATIENCE_S = 20
EMPTY = {
    "class_type": "EmptyImage",
    "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": 0},
}
SLEEP = {
    "1": EMPTY,
    "2": {"class_type": "SimSleep", "inputs": {"image": ["1", 0], "seconds": 30.0}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "s"}},
}
SAVE = {
    "1": EMPTY,
    "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
}


@dataclass
class Rig:
    simulator: Simulator
    client: Client
    tracker: Tracker
    log: Log

    async def submit(self, graph: dict[str, Any] = SAVE) -> str:
        prompt_id = str(uuid.uuid4())
        body = {
            "prompt": graph,
            "prompt_id": prompt_id,
            "client_id": self.log.values("connected")[-1],
            "extra_data": {"comfyd": {"job": "j", "attempt": 1}},
        }
        await self.client.submit(json.dumps(body).encode())
        self.tracker.posted()
        return prompt_id

    async def hint(self, prompt_id: str, sign: str) -> None:
        await self.log.until(lambda: (prompt_id, sign) in self.log.values("hint"))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            simulator, log = Simulator(run_s=0.01), Log()
            url = await nursery.start(simulator.serve)
            client = Client(
                url,
                connect_timeout_s=1,
                submit_timeout_s=0.5,
                history_timeout_s=1,
                health_timeout_s=1,
                upload_timeout_s=1,
                download_idle_timeout_s=1,
            )
            tracker = Tracker(
                url,
                timings=Timings(
                    deaf_after_s=0.3,
                    ping_interval_s=0.5,
                    reconnect_first_s=0.02,
                    reconnect_max_s=0.6,
                ),
                ask_remaining=client.remaining,
                listener=log,
                now_s=trio.current_time,
                u=lambda: 0.0,
            )
            nursery.start_soon(tracker.run)
            await log.results(1)
            yield Rig(simulator, client, tracker, log)
            nursery.cancel_scope.cancel()
        await client.aclose()


async def test_a_prompt_from_submission_to_files(rig: Rig) -> None:
    prompt_id = await rig.submit()
    await rig.hint(prompt_id, "ended")
    record = await rig.client.history(prompt_id)
    assert record is not None
    assert record.end is End.SUCCESS
    assert record.ours == ("j", 1)
    assert len(record.files) == 2
    for ref in record.files:
        content = bytearray()
        got = await rig.client.view(ref, content.extend, max_bytes=2**20)
        assert got.sha256 == hashlib.sha256(content).hexdigest()
        assert got.head.startswith(b"\x89PNG")
    assert rig.log.values("disconnected") == []


async def test_stopping_what_waits_and_what_runs(rig: Rig) -> None:
    running, waiting = await rig.submit(SLEEP), await rig.submit(SLEEP)
    await rig.hint(running, "alive")
    queue = await rig.client.queue()
    assert [item.prompt_id for item in queue.running] == [running]
    assert [item.prompt_id for item in queue.pending] == [waiting]
    assert queue.pending[0].ours == ("j", 1)
    assert await rig.client.remaining() == 2
    await rig.client.delete(waiting)
    await rig.client.interrupt(running)
    await rig.hint(running, "ended")
    assert await rig.client.remaining() == 0
    record = await rig.client.history(running)
    assert record is not None
    assert record.end is End.INTERRUPTED
    assert await rig.client.history(waiting) is None


async def test_an_upload_can_be_read_back(rig: Rig) -> None:
    assert await rig.client.upload("abc.png", b"content") == "abc.png"
    assert await rig.client.upload("abc.png", b"content") == "abc.png"


@pytest.mark.parametrize("fault", ["post-ambiguous=1", "post-hang=1"])
async def test_a_lost_answer_is_unknown_and_the_prompt_is_there(rig: Rig, fault: str) -> None:
    rig.simulator.faults.set(fault)
    with pytest.raises(ServerUnreachable) as caught:
        await rig.submit()
    assert caught.value.sent
    assert sum(rig.simulator.posts.values()) == 1


async def test_a_failing_server_says_so(rig: Rig) -> None:
    rig.simulator.faults.set("history-fail=1")
    with pytest.raises(ServerStatus) as caught:
        await rig.client.history("x")
    assert caught.value.status == 500
    assert await rig.client.history("x") is None


async def test_a_truncated_download_is_an_error(rig: Rig) -> None:
    prompt_id = await rig.submit()
    await rig.hint(prompt_id, "ended")
    record = await rig.client.history(prompt_id)
    assert record is not None
    rig.simulator.faults.set("view-truncate=1")
    with pytest.raises(ServerUnreachable):
        await rig.client.view(record.files[0], len, max_bytes=2**20)
    assert (await rig.client.view(record.files[0], len, max_bytes=2**20)).size_bytes > 0


async def test_a_killed_server_refuses_and_is_found_again(rig: Rig) -> None:
    rig.simulator.kill()
    await rig.log.until(lambda: "refused" in rig.log.values("result"))
    with pytest.raises(ServerRefused):
        await rig.submit()
    rig.simulator.revive()
    await rig.log.until(lambda: len(rig.log.values("connected")) == 2)
    assert rig.log.values("disconnected") == ["closed"]
    prompt_id = await rig.submit()
    await rig.hint(prompt_id, "ended")


async def test_a_refused_handshake_is_tried_again(rig: Rig) -> None:
    rig.simulator.faults.set("ws-refuse=2")
    rig.simulator.drop_connections()
    await rig.log.until(lambda: len(rig.log.values("connected")) == 2)
    assert rig.log.values("result") == ["ok", "rejected", "rejected", "ok"]


async def test_a_deaf_socket_is_found_and_replaced(rig: Rig) -> None:
    rig.simulator.faults.set("deaf=1")
    rig.simulator.drop_connections()
    await rig.log.until(lambda: len(rig.log.values("connected")) == 2)
    await rig.submit()
    await rig.log.until(lambda: len(rig.log.values("connected")) == 3)
    assert rig.log.values("disconnected") == ["closed", "deaf"]
    prompt_id = await rig.submit()
    await rig.hint(prompt_id, "ended")
    assert rig.log.values("stalled") == []


async def test_a_stalled_publisher_is_worked_with_until_it_speaks(rig: Rig) -> None:
    rig.simulator.faults.stalled_publisher = True
    await rig.submit()
    await rig.log.until(lambda: rig.log.values("disconnected") == ["deaf"])
    await rig.log.until(lambda: len(rig.log.values("connected")) == 2)
    prompt_id = await rig.submit()
    await rig.log.until(lambda: rig.log.values("stalled") == [True])
    assert rig.tracker.state == "deaf"
    while await rig.client.history(prompt_id) is None:  # noqa: ASYNC110 -- as the auditor does
        await trio.sleep(0.02)
    rig.simulator.faults.stalled_publisher = False
    await rig.submit()
    await rig.log.until(lambda: rig.log.values("stalled") == [True, False])
    assert rig.tracker.state != "deaf"
