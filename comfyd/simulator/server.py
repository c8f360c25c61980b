"""A ComfyUI without models: the protocol of 0.3.64, on trio, with faults on request.

It shares no code with the client on purpose. All waiting is trio's, so that a test with a jumping
clock and in-memory streams runs in no time; the same object serves TCP.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import h11
import trio
import trio.testing

from comfyd.simulator.faults import Faults
from comfyd.simulator.files import DiskFiles, Files, MemoryFiles
from comfyd.simulator.http import Answer, Request, Upgrade, serve_http
from comfyd.simulator.memory import Memory, exec_info
from comfyd.simulator.nodes import ServerCrashError
from comfyd.simulator.routes import Routes, features, is_cross_origin
from comfyd.simulator.websocket import WebSocket

HOST: Final = "127.0.0.1"


class Simulator:
    """One simulated ComfyUI server.

    Start it with `serve` (TCP) or `run` (in-memory streams from `connect` or `serve_stream`) in a
    nursery; cancel that to stop it.

    Args:
      faults: What goes wrong; may be changed at any time through the attribute.
      run_s: How long each node takes, besides what it does, in seconds.
      version: What /system_stats says; behaviour is that of 0.3.64 whatever it says.
      directory: Where input, output and temp folders are made; None keeps files in memory.

    Attributes:
      executions: How often each prompt was started, by prompt id, over all lives of the server.
      restarts: How often the memory was lost.
      alive: False between `kill` and `revive`.
      files: The server's folders; a test may delete from them.

    """

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        run_s: float = 0.05,
        version: str = "0.3.64",
        directory: Path | None = None,
    ) -> None:
        self.faults = Faults() if faults is None else faults
        self.files: Files = MemoryFiles() if directory is None else DiskFiles(directory)
        self.executions: Counter[str] = Counter()
        self.restarts = 0
        self.alive = True
        self._run_s = run_s
        self._revived = trio.Event()
        self._port: int | None = None
        self._connections: set[trio.CancelScope] = set()
        self._dropped = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._memory = self._new_memory()
        self._routes = Routes(self.faults, self.files, lambda: self._memory, version)

    @property
    def posts(self) -> Counter[str]:
        """Prompts accepted, by prompt id."""
        return self._routes.posts

    @property
    def views(self) -> Counter[str]:
        """Files asked for through /view, by name."""
        return self._routes.views

    @property
    def uploads(self) -> Counter[str]:
        """Files taken, by the name under which they were stored."""
        return self._routes.uploads

    @property
    def url(self) -> str:
        """Where it listens.

        Raises:
          RuntimeError: before `serve` has opened its port.

        """
        if self._port is None:
            raise RuntimeError("the simulator is not listening on TCP")
        return f"http://{HOST}:{self._port}"

    @property
    def running(self) -> list[str]:
        """Id of the running prompt, if there is one."""
        return [item[1] for item in self._memory.queue.running]

    @property
    def pending(self) -> list[str]:
        """Ids of the waiting prompts, next first."""
        return [item[1] for item in sorted(self._memory.queue.pending, key=lambda item: item[:2])]

    @property
    def history(self) -> list[str]:
        """Ids of the prompts whose records can be seen, oldest first."""
        return list(self._memory.queue.records())

    @property
    def connections(self) -> int:
        """Connections open now, WebSockets included."""
        return len(self._connections)

    def restart(self) -> None:
        """Lose the memory and all connections; what comes next finds a fresh server."""
        self.restarts += 1
        self._forget()

    def kill(self) -> None:
        """Lose the memory and all connections, and refuse new ones until `revive`."""
        if self.alive:
            self.alive = False
            self._revived = trio.Event()
            self._forget()
            self._dropped.set()

    def revive(self) -> None:
        """Take connections again, after `kill`."""
        if not self.alive:
            self.alive = True
            self.restarts += 1
            self._dropped = trio.Event()
            self._revived.set()

    def clear_history(self) -> None:
        """Forget all records, as any user of ComfyUI may ask for."""
        self._memory.queue.forget_all()

    def delete_pending(self, prompt_id: str) -> bool:
        """Remove a waiting prompt, as any user may; whether it was waiting."""
        return self._memory.queue.delete(prompt_id)

    def drop_connections(self) -> None:
        """Close every connection; the memory is kept."""
        for scope in list(self._connections):
            scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Execute prompts and publish messages until cancelled."""
        async with trio.open_nursery() as connections:
            self._nursery = connections
            task_status.started()
            try:
                while True:
                    async with trio.open_nursery() as life:
                        life.start_soon(self._memory.hub.publish)
                        life.start_soon(self._work, self._memory)
                        await self._memory.gone.wait()
                        life.cancel_scope.cancel()
            finally:
                self._nursery = None

    async def serve(
        self, port: int = 0, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """`run`, and listen on *port* of the loopback address; 0 takes a free one.

        Reports its URL when it listens.

        Raises:
          OSError: if the port is taken.

        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run)
            while True:
                listeners = await trio.open_tcp_listeners(port, host=HOST)
                port = self._port = listeners[0].socket.getsockname()[1]
                task_status.started(self.url)
                task_status = trio.TASK_STATUS_IGNORED
                async with trio.open_nursery() as listening:
                    listening.start_soon(trio.serve_listeners, self.serve_stream, listeners)
                    await self._dropped.wait()
                    listening.cancel_scope.cancel()
                await self._revived.wait()

    async def connect(self) -> trio.abc.Stream:
        """The client's end of a new in-memory connection; needs `run`.

        Raises:
          ConnectionRefusedError: between `kill` and `revive`, or if nothing runs.

        """
        await trio.lowlevel.checkpoint()
        if not self.alive or self._nursery is None:
            raise ConnectionRefusedError("the simulated server is down")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.serve_stream, theirs)
        return ours

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it ends, then close it."""
        try:
            if not self.alive:
                return
            with trio.CancelScope() as scope:
                self._connections.add(scope)
                try:
                    await serve_http(stream, self._handle)
                finally:
                    self._connections.discard(scope)
        finally:
            await trio.aclose_forcefully(stream)

    def _new_memory(self) -> Memory:
        return Memory(self.faults, self.files, self._run_s)

    def _forget(self) -> None:
        old, self._memory = self._memory, self._new_memory()
        old.gone.set()
        self.files.clear("temp")
        self.drop_connections()

    async def _handle(self, request: Request) -> Answer:
        if request.headers.get("upgrade", "").lower() == "websocket":
            return Upgrade(partial(self._serve_websocket, request))
        return await self._routes.handle(request)

    async def _serve_websocket(
        self, request: Request, stream: trio.abc.Stream, head: h11.Request
    ) -> None:
        socket = WebSocket(stream, self.faults)
        if self.faults.half_open in ("ws", "all"):
            await socket.ignore()
            return
        refuse = self.faults.strikes(self.faults.ws_refuse) or is_cross_origin(request)
        if not await socket.handshake(head, refuse=refuse):
            return
        memory = self._memory
        sid = memory.hub.connect(socket, request.query.get("clientId", ""))
        try:
            first = {"type": "status", "data": {**exec_info(memory.queue.remaining), "sid": sid}}
            await socket.send(json.dumps(first))
            executor = memory.executor
            if executor.client_id == sid and executor.node_id is not None:
                now = {"type": "executing", "data": {"node": executor.node_id}}
                await socket.send(json.dumps(now))
            if self.faults.strikes(self.faults.deaf):
                memory.hub.disconnect(sid)
            await socket.serve(memory.hub, sid, features(self.faults))
        finally:
            memory.hub.disconnect(sid)

    async def _crash(self) -> NoReturn:
        """What a process that dies does to its port, and a supervisor that starts it again."""
        if self.faults.down_s and self._nursery is not None:
            self._nursery.start_soon(self._come_back, self.faults.down_s)
            self.kill()
        else:
            self.restart()
        await trio.sleep_forever()

    async def _come_back(self, down_s: float) -> None:
        await trio.sleep(down_s)
        self.revive()

    async def _work(self, memory: Memory) -> None:
        """The one worker of one life."""
        while True:
            try:
                item = await memory.queue.get()
            except TypeError:
                # Two pending items of equal number and id: the real worker thread dies of it.
                await trio.sleep_forever()
            if self.faults.strikes(self.faults.zombie_worker):
                await trio.sleep_forever()
            if self.faults.restart_after is not None and memory.done >= self.faults.restart_after:
                self.restart()
                await trio.sleep_forever()
            self.executions[item[1]] += 1
            try:
                record = await memory.executor.execute(item)
            except ServerCrashError:
                await self._crash()
            memory.queue.task_done(record)
            memory.done += 1
            client_id = memory.executor.client_id
            if client_id is not None:
                end = {"node": None, "prompt_id": item[1]}
                memory.hub.send("executing", end, client_id)
