"""A simulated ComfyUI on a real socket, in the test's own process: it says what it has run."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from comfyd.simulator import Simulator

NODE_S = 0.01


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with trio.open_nursery() as nursery:
        simulator = Simulator(run_s=NODE_S)
        await nursery.start(simulator.serve)
        yield simulator
        nursery.cancel_scope.cancel()
