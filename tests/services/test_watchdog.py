"""systemd hears of the daemon only while its parts answer."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio
from structlog.testing import capture_logs

from comfyd.services.watchdog import AGAIN_S, TOKEN_S, Watchdog

INTERVAL_S = 30.0


class Part:
    """Something that comes round at once, until it hangs."""

    def __init__(self) -> None:
        self.well = trio.Event()
        self.well.set()

    async def turn(self) -> None:
        await trio.lowlevel.checkpoint()
        await self.well.wait()


class Rig:
    def __init__(self) -> None:
        self.began_s = trio.current_time()
        self.dispatcher, self.journal = Part(), Part()
        self.late: list[str] = []
        self.told: list[float] = []

    def tell(self) -> None:
        self.told.append(round(trio.current_time() - self.began_s, 3))


@asynccontextmanager
async def watched(interval_s: float = INTERVAL_S):
    rig = Rig()
    watchdog = Watchdog(
        interval_s,
        tokens={"dispatcher": rig.dispatcher.turn, "journal": rig.journal.turn},
        late=lambda: rig.late,
        alive=rig.tell,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run)
        yield rig
        nursery.cancel_scope.cancel()


async def test_it_is_told_at_every_half_of_the_time(autojump_clock):
    async with watched() as rig:
        await trio.sleep(2 * INTERVAL_S + 1)
    assert rig.told == [0, INTERVAL_S, 2 * INTERVAL_S]


async def test_one_part_that_hangs_is_enough_and_is_named(autojump_clock):
    for name in ("dispatcher", "journal"):
        with capture_logs() as logs:
            async with watched() as rig:
                await trio.sleep(1)
                getattr(rig, name).well = trio.Event()
                await trio.sleep(10 * INTERVAL_S)
        assert rig.told == [0]
        assert [(log["event"], log["hanging"]) for log in logs] == [("watchdog_withheld", name)]


async def test_a_part_that_was_only_slow_is_forgiven_before_systemd_loses_patience(autojump_clock):
    async with watched() as rig:
        await trio.sleep(1)
        rig.journal.well = trio.Event()
        await trio.sleep(INTERVAL_S + 15)  # asked twice by now
        rig.journal.well.set()
        await trio.sleep(1)
    [_, again] = rig.told
    assert again == INTERVAL_S + 1 + 15
    assert again < 2 * INTERVAL_S
    assert TOKEN_S + AGAIN_S < INTERVAL_S


async def test_a_late_tracker_is_not_told_as_well(autojump_clock):
    with capture_logs() as logs:
        async with watched() as rig:
            await trio.sleep(1)
            rig.late = ["tracker of a"]
            await trio.sleep(2 * INTERVAL_S)
            assert rig.told == [0]
            rig.late = []
            await trio.sleep(AGAIN_S)
            assert len(rig.told) == 2
    assert [log["event"] for log in logs] == ["watchdog_withheld", "watchdog_resumed"]


async def test_a_short_patience_shortens_the_time_to_answer(autojump_clock):
    async with watched(interval_s=1.0) as rig:
        await trio.sleep(0.5)
        rig.dispatcher.well = trio.Event()
        await trio.sleep(2.0)  # asked at 1.0, given up at 2.0
        rig.dispatcher.well.set()
        await trio.sleep(1.1)
    assert rig.told[1] <= 3.5
