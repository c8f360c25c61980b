"""A running simulator. Tests name `autojump_clock` themselves: only so is it their clock."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from comfyd.simulator import Simulator


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with trio.open_nursery() as nursery:
        simulator = Simulator()
        await nursery.start(simulator.run)
        yield simulator
        nursery.cancel_scope.cancel()
