"""The queue and the history: plain memory, lost with the server.

After PromptQueue in execution.py of ComfyUI 0.3.64. Every change is announced, and a prompt moves
from pending to running to history without a gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from comfyd.simulator.faults import Faults
from comfyd.simulator.validation import Graph

# number, prompt id, graph, extra_data, ids of the outputs to execute
Item = tuple[float, str, Graph, dict[str, Any], list[str]]
Record = dict[str, Any]

MAXIMUM_HISTORY_SIZE: Final = 10000
_SECRETS: Final = ("auth_token_comfy_org", "api_key_comfy_org")


@dataclass(frozen=True, slots=True)
class _Kept:
    record: Record
    visible_at_s: float


class PromptQueue:
    """Pending prompts, the running one, and the records of those that ended."""

    def __init__(self, faults: Faults, announce: Callable[[int], None]) -> None:
        self._faults = faults
        self._announce = announce
        self._pending: list[Item] = []
        self._running: Item | None = None
        self._history: dict[str, _Kept] = {}
        self._filled = trio.Event()

    @property
    def remaining(self) -> int:
        """Pending and running prompts."""
        return len(self._pending) + (self._running is not None)

    @property
    def running(self) -> list[Item]:
        return [] if self._running is None else [self._running]

    @property
    def pending(self) -> list[Item]:
        """In heap order, which is not the order of execution."""
        return list(self._pending)

    def put(self, item: Item) -> None:
        """Add *item*.

        Raises:
          TypeError: if number and id are those of another pending item, as in ComfyUI.

        """
        heapq.heappush(self._pending, item)
        self._announce(self.remaining)
        self._filled.set()

    async def get(self) -> Item:
        """Wait for the next prompt and make it the running one.

        Raises:
          TypeError: as `put`; in ComfyUI this kills the worker.

        """
        while not self._pending or self._faults.stuck_worker:
            if self._pending:
                await self._faults.wait_changed()
            else:
                self._filled = trio.Event()
                await self._filled.wait()
        self._running = heapq.heappop(self._pending)
        self._announce(self.remaining)
        return self._running

    def task_done(self, record: Record) -> None:
        """End the running prompt; *record* lacks only its `prompt`.

        Raises:
          RuntimeError: if none is running.

        """
        item, self._running = self._running, None
        if item is None:
            raise RuntimeError("no prompt is running")
        limit = self._faults.evict_history
        while len(self._history) > (MAXIMUM_HISTORY_SIZE if limit is None else max(limit - 1, 0)):
            del self._history[next(iter(self._history))]
        extra_data = {key: value for key, value in item[3].items() if key not in _SECRETS}
        if limit != 0:
            visible_at_s = trio.current_time() + self._faults.history_delay_s
            prompt = [*item[:3], extra_data, item[4]]
            self._history[item[1]] = _Kept({"prompt": prompt, **record}, visible_at_s)
        self._announce(self.remaining)

    def delete(self, prompt_id: str) -> bool:
        """Remove the first pending prompt of that id; whether there was one."""
        for index, item in enumerate(self._pending):
            if item[1] == prompt_id:
                if len(self._pending) == 1:
                    self.wipe()
                else:
                    del self._pending[index]
                    heapq.heapify(self._pending)
                self._announce(self.remaining)
                return True
        return False

    def wipe(self) -> None:
        """Remove all pending prompts."""
        self._pending.clear()
        self._announce(self.remaining)

    def records(
        self, prompt_id: str | None = None, *, most: int | None = None, offset: int = -1
    ) -> dict[str, Record]:
        """Records that can be seen now, oldest first; of one id, or *most* from *offset*."""
        now_s = trio.current_time()
        if prompt_id is not None:
            one = self._history.get(prompt_id)
            return {} if one is None or one.visible_at_s > now_s else {prompt_id: one.record}
        seen = {k: kept.record for k, kept in self._history.items() if kept.visible_at_s <= now_s}
        if most is None:
            return dict(list(seen.items())[max(offset, 0) :])
        start = len(seen) - most if offset < 0 else offset
        return dict(list(seen.items())[max(start, 0) :][:most])

    def forget(self, prompt_id: str) -> None:
        """Delete one record, if it is there."""
        self._history.pop(prompt_id, None)

    def forget_all(self) -> None:
        self._history.clear()
