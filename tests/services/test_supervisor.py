"""Restart what is expected, let bugs through."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from comfyd.errors import ServerUnreachable
from comfyd.services.supervisor import supervise


async def test_it_restarts_on_schedule_and_forgives_a_healthy_run(
    autojump_clock: MockClock,
) -> None:
    starts: list[float] = []
    restarts: list[tuple[str, str]] = []
    lifetimes = iter([0, 0, 0, 100, 0, 0])

    async def run() -> None:
        starts.append(trio.current_time())
        await trio.sleep(next(lifetimes, 10_000))
        raise ServerUnreachable("gone")

    with trio.move_on_after(200):
        await supervise(
            "tracker",
            run,
            on_restart=lambda name, error: restarts.append((name, type(error).__name__)),
            draw=lambda: 0.0,
        )
    assert starts == pytest.approx([0, 0.5, 1.5, 3.5, 104, 105, 107])
    assert restarts[0] == ("tracker", "ServerUnreachable")


async def test_a_bug_is_not_survived(autojump_clock: MockClock) -> None:
    async def run() -> None:
        async with trio.open_nursery():
            raise KeyError("bug")

    with pytest.RaisesGroup(KeyError, flatten_subgroups=True, allow_unwrapped=True):
        await supervise("t", run, on_restart=lambda *_: None)


async def test_ending_by_itself_is_a_bug(autojump_clock: MockClock) -> None:
    async def run() -> None:
        await trio.sleep(1)

    with pytest.raises(RuntimeError, match="ended by itself"):
        await supervise("t", run, on_restart=lambda *_: None)


async def test_a_cancel_is_not_swallowed(autojump_clock: MockClock) -> None:
    async def run() -> None:
        await trio.sleep(0.1)
        raise ServerUnreachable("gone")

    with trio.move_on_after(5) as scope:
        await supervise("t", run, on_restart=lambda *_: None)
    assert scope.cancelled_caught
