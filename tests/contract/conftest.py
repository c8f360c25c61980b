"""Which server the contract is held against: the simulator, or COMFYUI_URL."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import trio

from comfyd.simulator import Simulator
from tests.contract.wire import Session, open_session

TEST_LIMIT_S = 60.0


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A server to talk to: a fresh simulator, or the one that the environment names."""
    real = os.environ.get("COMFYUI_URL")
    if real:
        yield real.rstrip("/")
        return
    async with trio.open_nursery() as nursery:
        yield await nursery.start(Simulator(run_s=0.05).serve)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    """A recording session with the server; no test of it takes longer than TEST_LIMIT_S."""
    with trio.fail_after(TEST_LIMIT_S):
        async with open_session(url) as opened:
            yield opened
