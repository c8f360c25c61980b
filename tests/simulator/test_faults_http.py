"""Faults of HTTP, the history and the worker do what their one line says."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from comfyd.simulator import Simulator
from tests.simulator.client import (
    CutOffError,
    Reply,
    ask,
    graph,
    submit,
    wait_recorded,
)

LONG_S = 1000.0


async def post(simulator: Simulator, prompt_id: str, colour: int = 1) -> Reply:
    body = {"prompt": graph(colour=colour), "prompt_id": prompt_id}
    return await ask(simulator, "POST", "/prompt", body)


@pytest.mark.parametrize(
    ("fault", "path"), [("history-fail=2", "/history/x"), ("queue-fail=2", "/queue")]
)
async def test_a_read_fails_twice(
    autojump_clock: MockClock, simulator: Simulator, fault: str, path: str
) -> None:
    simulator.faults.set(fault)
    assert [(await ask(simulator, "GET", path)).status for _ in range(3)] == [500, 500, 200]


async def test_old_records_are_evicted(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("evict-history=2")
    ids = []
    for colour in range(4):
        ids.append(await submit(simulator, graph(colour=colour)))
        await wait_recorded(simulator, ids[-1])
    assert simulator.history == ids[-2:]


async def test_no_record_is_kept_at_all(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("evict-history=0")
    await submit(simulator, graph())
    await trio.sleep(5)
    assert simulator.history == []


async def test_a_refused_post_queues_nothing(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("post-refuse=1")
    with pytest.raises(CutOffError):
        await post(simulator, "p")
    await trio.sleep(LONG_S)
    assert simulator.executions == {}
    assert (await post(simulator, "p")).status == 200


async def test_a_failing_post_queues_nothing(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("post-fail=503:1")
    assert [(await post(simulator, p)).status for p in ("a", "b")] == [503, 200]
    await trio.sleep(LONG_S)
    assert simulator.executions == {"b": 1}


async def test_an_ambiguous_post_runs_unanswered(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("post-ambiguous=1")
    with pytest.raises(CutOffError):
        await post(simulator, "p")
    assert (await wait_recorded(simulator, "p"))["status"]["completed"] is True
    assert simulator.executions == {"p": 1}


async def test_a_hanging_post_runs_unanswered(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("post-hang=1")
    with pytest.raises(trio.TooSlowError), trio.fail_after(LONG_S):
        await post(simulator, "p")
    assert simulator.executions == {"p": 1}


async def test_a_delayed_post_is_queued_after_its_client_gave_up(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("post-delay=60s")
    with pytest.raises(trio.TooSlowError), trio.fail_after(10):
        await post(simulator, "p")
    assert simulator.posts == {}
    await trio.sleep(60)
    assert simulator.executions == {"p": 1}


async def finished_file(simulator: Simulator) -> str:
    prompt_id = await submit(simulator, graph("name"))
    await wait_recorded(simulator, prompt_id)
    return "/view?filename=name_00001_.png"


async def test_a_view_is_cut_short(autojump_clock: MockClock, simulator: Simulator) -> None:
    path = await finished_file(simulator)
    simulator.faults.set("view-truncate=1")
    with pytest.raises(CutOffError):
        await ask(simulator, "GET", path)
    assert (await ask(simulator, "GET", path)).status == 200
    assert simulator.views == {"name_00001_.png": 2}


async def test_a_view_is_a_login_page(autojump_clock: MockClock, simulator: Simulator) -> None:
    path = await finished_file(simulator)
    simulator.faults.set("view-wrong=1")
    wrong, right = [await ask(simulator, "GET", path) for _ in range(2)]
    assert (wrong.status, wrong.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert right.body.startswith(b"\x89PNG")


async def test_a_view_fails(autojump_clock: MockClock, simulator: Simulator) -> None:
    path = await finished_file(simulator)
    simulator.faults.set("view-fail=403:1")
    assert [(await ask(simulator, "GET", path)).status for _ in range(2)] == [403, 200]


async def test_a_view_is_missing(autojump_clock: MockClock, simulator: Simulator) -> None:
    path = await finished_file(simulator)
    simulator.faults.set("view-missing=1")
    assert [(await ask(simulator, "GET", path)).status for _ in range(2)] == [404, 200]


async def test_an_interrupt_can_be_ignored(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("interrupt-ignored=1")
    prompt_id = await submit(simulator, graph(seconds=LONG_S))
    await trio.sleep(1)
    for is_running in ([prompt_id], []):
        await ask(simulator, "POST", "/interrupt", {"prompt_id": prompt_id})
        await trio.sleep(1)
        assert simulator.running == is_running


async def test_the_server_restarts_when_one_more_prompt_starts(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("restart-after=2")
    ids = [await submit(simulator, graph(colour=n)) for n in range(4)]
    await trio.sleep(LONG_S)
    assert simulator.restarts == 1
    assert [simulator.executions[i] for i in ids] == [1, 1, 0, 0]
    assert simulator.history == simulator.pending == simulator.running == []
    again = await submit(simulator, graph(colour=9))
    assert (await wait_recorded(simulator, again))["prompt"][0] == 0, "numbers start again"


async def test_a_dead_worker_takes_a_prompt_and_never_ends(
    autojump_clock: MockClock, simulator: Simulator
) -> None:
    simulator.faults.set("zombie-worker=1")
    first, second = [await submit(simulator, graph(colour=n)) for n in range(2)]
    await trio.sleep(LONG_S)
    assert (simulator.running, simulator.pending) == ([first], [second])
    assert (await ask(simulator, "GET", "/prompt")).json() == {"exec_info": {"queue_remaining": 2}}
    simulator.restart()
    third = await submit(simulator, graph(colour=2))
    await wait_recorded(simulator, third)


async def test_every_answer_is_slow(autojump_clock: MockClock, simulator: Simulator) -> None:
    simulator.faults.set("slow=30s")
    started_s = trio.current_time()
    await ask(simulator, "GET", "/queue")
    assert trio.current_time() - started_s == pytest.approx(30, abs=0.1)
