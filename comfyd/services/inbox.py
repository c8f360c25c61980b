"""Where facts wait for the dispatcher: bounded, without ever blocking those who bring them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from comfyd.core.facts import Claimed, Fact, Health, Hint, QueueLooked, QueueSeen, Sign
from comfyd.core.model import PromptId, ServerName

# One batch, one commit: large enough to share an fsync, small enough to keep latency low.
BATCH: Final = 256
# Claims that wait for their commit; beyond that files stay in new/.
CLAIMS: Final = 1024

_STRENGTH: Final = {Sign.ALIVE: 0, Sign.ENDING: 1, Sign.ENDED: 2}


class Inbox:
    """The dispatcher's mail. Everything happens in one thread; nothing here waits but `claim`.

    Bounds: answers, one an outstanding order; hints, the strongest one a prompt in flight, so an
    end is never dropped and floods of progress collapse; news of servers, a few a connection
    attempt, and of a queue's length or a server's health only the last, however long a full disk
    keeps the dispatcher waiting; claims, CLAIMS.

    Args:
      is_ours: Whether a prompt id is one of ours at hand; hints about others are refused.

    """

    def __init__(self, is_ours: Callable[[PromptId], bool]) -> None:
        self.is_ours = is_ours
        self._facts: deque[Fact] = deque()
        self._hints: dict[PromptId, Hint] = {}
        self._latest: dict[tuple[type, ServerName], QueueSeen | QueueLooked | Health] = {}
        self._claims: deque[Claimed] = deque()
        self._mail = trio.Event()
        self._room = trio.Event()
        self._left = 0  # facts that were ever left by `put`
        self.taken = 0  # of those, how many were taken

    def put(self, fact: Fact) -> None:
        """Leave an answer, a person's wish, or news."""
        if isinstance(fact, QueueSeen | QueueLooked | Health):
            self._latest[type(fact), fact.server] = fact
        else:
            self._facts.append(fact)
            self._left += 1
        self._mail.set()

    def leave(self, fact: Fact) -> int:
        """As `put`, for who waits for what comes of it.

        Returns:
          The number of the last fact left so far, for ``Dispatcher.settled``.

        """
        self.put(fact)
        return self._left

    def hint(self, hint: Hint) -> bool:
        """Leave a hint. False if the prompt is not ours: it was dropped."""
        if not self.is_ours(hint.prompt_id):
            return False
        known = self._hints.get(hint.prompt_id)
        if known is None or _STRENGTH[hint.sign] > _STRENGTH[known.sign]:
            self._hints[hint.prompt_id] = hint
        self._mail.set()
        return True

    async def claim(self, claims: Sequence[Claimed]) -> None:
        """Leave claims, waiting while too many wait already.

        Cancellation: while waiting; then none of *claims* was left.
        """
        while len(self._claims) >= CLAIMS:
            self._room = trio.Event()
            await self._room.wait()
        self._claims.extend(claims)
        self._mail.set()

    async def wait(self) -> None:
        """Until there is something to take."""
        await self._mail.wait()

    def take(self) -> list[Fact]:
        """At most BATCH facts; what was left first comes first within its kind."""
        taken: list[Fact] = []
        while self._facts and len(taken) < BATCH:
            taken.append(self._facts.popleft())
        self.taken += len(taken)
        for prompt_id in list(self._hints)[: BATCH - len(taken)]:
            taken.append(self._hints.pop(prompt_id))
        # After the hints: an empty queue is only a reason to doubt what has not ended by now.
        taken += self._latest.values()
        self._latest.clear()
        while self._claims and len(taken) < BATCH:
            taken.append(self._claims.popleft())
        if len(self._claims) < CLAIMS:
            self._room.set()
        if not (self._facts or self._hints or self._claims):
            self._mail = trio.Event()
        return taken
