"""A simulated ComfyUI in a process of its own, which can be killed and comes back on its port."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import trio

from tests.endtoend.daemon import ROOT, end

LISTENS_S = 15.0


class Server:
    """Args: how long each node takes, and the port."""

    def __init__(self, node_s: float, port: int) -> None:
        self._node_s = node_s
        self._port = port
        self._process: trio.Process | None = None

    @classmethod
    @asynccontextmanager
    async def running(cls, *, node_s: float) -> AsyncIterator[Self]:
        """A server that listens; killed at the end."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            server = cls(node_s, free.getsockname()[1])
        await server.start()
        try:
            yield server
        finally:
            await server.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, empty, and wait until it listens."""
        command = [sys.executable, "-m", "comfyd", "simulate", "--port", str(self._port)]
        self._process = await trio.lowlevel.open_process(
            [*command, "--run-time", f"{self._node_s * 1000:g}ms"], cwd=ROOT, stdout=-3, stderr=-3
        )
        with trio.fail_after(LISTENS_S):
            while not await self._listens():
                assert self._process.poll() is None, "the simulator ended by itself"
                await trio.sleep(0.02)

    async def _listens(self) -> bool:
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        except OSError:
            return False
        await stream.aclose()
        return True

    def pause(self) -> None:
        """SIGSTOP: it stands still, its memory and its connections stay."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await end(process)
