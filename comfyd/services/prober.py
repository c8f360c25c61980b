"""The prober: what a server really knows of our prompts.

``/queue`` is read first and ``/history/{id}`` second: a prompt moves pending -> running -> history,
each move atomic (ComfyUI execution.py, PromptQueue), so only in that order does absent twice mean
absent. One GET /queue a round serves all who ask: its body holds every queued graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

import trio

from comfyd.comfyui.client import Client
from comfyd.core.facts import Answer, Fenced, Presence, Probed, QueueLooked
from comfyd.core.model import PromptId, Record, ServerName
from comfyd.core.orders import Fence, Probe, Stop
from comfyd.core.wire.answers import QueueSnapshot
from comfyd.errors import ServerError, ServerProtocol, ServerRefused, ServerStatus

# The interrupt is consumed at the next node or progress tick (ComfyUI nodes.py); a look that comes
# a moment later saves a second round.
_INTERRUPT_S: Final = 0.1


Question = Probe | Stop | Fence


class Seen(NamedTuple):
    """What the server said of one prompt."""

    presence: Presence
    record: Record | None = None
    reason: str = ""


class Prober:
    """Answers Probe, Stop and Fence orders of one server.

    Args:
      answer: Takes each answer, without blocking, and how full the queue was.

    Bounds: at most one order a prompt in flight or fenced waits here.

    """

    def __init__(
        self,
        name: ServerName,
        client: Client,
        answer: Callable[[Answer | Fenced | QueueLooked], None],
    ) -> None:
        self._name = name
        self._client = client
        self._answer = answer
        self._asked: list[Question] = []
        self._under_way: list[Question] = []
        self._mail = trio.Event()

    def ask(self, order: Question) -> None:
        """Answer *order* with the next round. A round that has begun may have read too early."""
        self._asked.append(order)
        self._mail.set()

    def unanswered(self) -> list[Question]:
        """What still waits for its answer; to be asked again if `run` was cancelled."""
        return [*self._under_way, *self._asked]

    async def run(self) -> NoReturn:
        """Go round for ever. Servers' failures become answers (unknown), nothing else.

        Cancellation: anywhere; see `unanswered`.
        """
        while True:
            await self._mail.wait()
            self._mail = trio.Event()
            self._under_way, self._asked = self._asked, []
            await self._round(self._under_way[:])

    async def _round(self, orders: list[Question]) -> None:
        stops = [order for order in orders if not isinstance(order, Probe)]
        try:
            for stop in stops:
                await self._client.delete(_prompt(stop))
            seen = await self._queue()
            running = {item.prompt_id for item in seen.running}
            interrupted = [
                stop
                for stop in stops
                if _prompt(stop) in running and (isinstance(stop, Fence) or stop.interrupt)
            ]
            for stop in interrupted:
                await self._client.interrupt(_prompt(stop))
            if interrupted:
                await trio.sleep(_INTERRUPT_S)
                seen = await self._queue()
        except ServerError as error:
            presence = Presence.REFUSED if isinstance(error, ServerRefused) else Presence.UNKNOWN
            for order in orders:
                self._tell(order, Seen(presence, reason=str(error)))
            return
        for order in orders:
            self._tell(order, await self._look(_prompt(order), seen))

    async def _queue(self) -> QueueSnapshot:
        seen = await self._client.queue()
        self._answer(
            QueueLooked(server=self._name, running=len(seen.running), pending=len(seen.pending))
        )
        return seen

    async def _look(self, prompt_id: str, seen: QueueSnapshot) -> Seen:
        if any(item.prompt_id == prompt_id for item in seen.running):
            return Seen(Presence.RUNNING)
        if any(item.prompt_id == prompt_id for item in seen.pending):
            return Seen(Presence.PENDING)
        try:
            record = await self._client.history(prompt_id)
        except ServerProtocol as error:
            return Seen(Presence.UNREADABLE, reason=str(error))
        except ServerError as error:
            # One bad record makes its own answer a 500 (ComfyUI server.py); others stay readable.
            bad = isinstance(error, ServerStatus) and error.status == 500
            return Seen(Presence.UNREADABLE if bad else Presence.UNKNOWN, reason=str(error))
        if record is None:
            return Seen(Presence.ABSENT)
        return Seen(Presence.FINISHED, record)

    def _tell(self, order: Question, seen: Seen) -> None:
        self._under_way.remove(order)
        told = seen._asdict()
        if isinstance(order, Fence):
            self._answer(Fenced(prompt_id=order.fence.prompt_id, **told))
        else:
            self._answer(Probed(token=order.token, **told))


def _prompt(order: Question) -> PromptId:
    if isinstance(order, Fence):
        return order.fence.prompt_id
    assert order.row.prompt_id is not None
    return order.row.prompt_id
