"""The prober: what a server really knows of our prompts.

``/queue`` is read first and ``/history/{id}`` second: a prompt moves pending -> running -> history,
each move atomic (ComfyUI execution.py, PromptQueue), so only in that order does absent twice mean
absent. One GET /queue a round serves all who ask: its body holds every queued graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NoReturn

import trio

from comfyd.comfyui.client import Client
from comfyd.core.facts import Answer, Presence, Probed
from comfyd.core.orders import Probe, Stop
from comfyd.core.wire.answers import QueueSnapshot
from comfyd.errors import ServerError, ServerProtocol, ServerRefused, ServerStatus

# The interrupt is consumed at the next node or progress tick (ComfyUI nodes.py); a look that comes
# a moment later saves a second round.
_INTERRUPT_S: Final = 0.1


class Prober:
    """Answers Probe and Stop orders of one server.

    Args:
      answer: Takes each answer, without blocking.

    Bounds: at most one order a prompt in flight waits here.

    """

    def __init__(self, client: Client, answer: Callable[[Answer], None]) -> None:
        self._client = client
        self._answer = answer
        self._asked: list[Probe | Stop] = []
        self._mail = trio.Event()

    def ask(self, order: Probe | Stop) -> None:
        """Answer *order* with the next round. A round that has begun may have read too early."""
        self._asked.append(order)
        self._mail.set()

    async def run(self) -> NoReturn:
        """Go round for ever. Servers' failures become answers (unknown), nothing else."""
        while True:
            await self._mail.wait()
            self._mail = trio.Event()
            orders, self._asked = self._asked, []
            await self._round(orders)

    async def _round(self, orders: list[Probe | Stop]) -> None:
        stops = [order for order in orders if isinstance(order, Stop)]
        try:
            for stop in stops:
                await self._client.delete(_prompt(stop))
            seen = await self._client.queue()
            running = {item.prompt_id for item in seen.running}
            interrupted = [stop for stop in stops if _prompt(stop) in running]
            for stop in interrupted:
                await self._client.interrupt(_prompt(stop))
            if interrupted:
                await trio.sleep(_INTERRUPT_S)
                seen = await self._client.queue()
        except ServerError as error:
            presence = Presence.REFUSED if isinstance(error, ServerRefused) else Presence.UNKNOWN
            for order in orders:
                self._answer(Probed(token=order.token, presence=presence, reason=str(error)))
            return
        for order in orders:
            self._answer(await self._look(order, seen))

    async def _look(self, order: Probe | Stop, seen: QueueSnapshot) -> Probed:
        prompt_id, token = _prompt(order), order.token
        if any(item.prompt_id == prompt_id for item in seen.running):
            return Probed(token=token, presence=Presence.RUNNING)
        if any(item.prompt_id == prompt_id for item in seen.pending):
            return Probed(token=token, presence=Presence.PENDING)
        try:
            record = await self._client.history(prompt_id)
        except ServerProtocol as error:
            return Probed(token=token, presence=Presence.UNREADABLE, reason=str(error))
        except ServerError as error:
            # One bad record makes its own answer a 500 (ComfyUI server.py); others stay readable.
            bad = isinstance(error, ServerStatus) and error.status == 500
            presence = Presence.UNREADABLE if bad else Presence.UNKNOWN
            return Probed(token=token, presence=presence, reason=str(error))
        if record is None:
            return Probed(token=token, presence=Presence.ABSENT)
        return Probed(token=token, presence=Presence.FINISHED, record=record)


def _prompt(order: Probe | Stop) -> str:
    assert order.row.prompt_id is not None
    return order.row.prompt_id
