"""Whether an open WebSocket still hears anything.

A ComfyUI connection can go deaf while it stays open and answers pings: its registration is removed
when an older connection with the same clientId ends (issue #16010), and one slow reader elsewhere
stalls the publisher for everybody. Both show in the same way: no ``status`` comes, though every
change of the queue broadcasts one. So a ``status`` is expected around each of our own submissions,
and the count in the last one is compared with the server's own from time to time.

One look that finds something wrong may have met a message on its way; two in a row, with no
``status`` between them, may not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What one connection has heard. Times are seconds on any one clock.

    Attributes:
      deaf_after_s: How far from the 200 of a submission its ``status`` may be, either way: it is
        often read before the 200 is.
      compare_every_s: Between two comparisons of the queue's length.
      remaining: What the last ``status`` said.
      compare_at_s: When to compare next.
      heard_at_s: The last ``status`` but the greeting, which is sent past the publisher and proves
        nothing.
      due_at_s: When a ``status`` will be overdue; infinity while none is owed.
      doubts: Looks in a row that found something wrong.
      verdicts: Deaf verdicts in a row, over all connections since a ``status`` was last heard.

    """

    deaf_after_s: float
    compare_every_s: float
    remaining: int
    compare_at_s: float
    heard_at_s: float = -math.inf
    due_at_s: float = math.inf
    doubts: int = 0
    verdicts: int = 0

    @classmethod
    def greeted(
        cls,
        now_s: float,
        remaining: int,
        *,
        deaf_after_s: float,
        compare_every_s: float,
        verdicts: int = 0,
    ) -> Canary:
        """A new connection, greeted with *remaining*; *verdicts* of the one before it."""
        return cls(
            deaf_after_s=deaf_after_s,
            compare_every_s=compare_every_s,
            remaining=remaining,
            compare_at_s=now_s + compare_every_s,
            verdicts=verdicts,
        )

    @property
    def look_at_s(self) -> float:
        """When to ask the server for its queue's length and tell ``compared``."""
        return min(self.due_at_s, self.compare_at_s)

    @property
    def stalled(self) -> bool:
        """Whether reconnecting did not help: the server publishes nothing to anybody."""
        return self.verdicts >= 2

    def posted(self, now_s: float) -> Canary:
        """The server answered 200 to a submission of ours."""
        if now_s - self.heard_at_s <= self.deaf_after_s:
            return self
        return replace(self, due_at_s=min(self.due_at_s, now_s + self.deaf_after_s))

    def status(self, now_s: float, remaining: int) -> Canary:
        """A ``status`` came, whoever caused it: the connection hears."""
        return replace(
            self, remaining=remaining, heard_at_s=now_s, due_at_s=math.inf, doubts=0, verdicts=0
        )

    def compared(self, now_s: float, remaining: int) -> tuple[Canary, bool]:
        """The server answered promptly that *remaining* prompts are in its queue.

        Returns:
          The next state, and whether the connection is deaf.

        """
        overdue = now_s >= self.due_at_s
        wrong = overdue or remaining != self.remaining
        doubts = self.doubts + 1 if wrong else 0
        deaf = doubts >= 2
        # An overdue status is looked for again at once: it may only have been overtaken.
        return (
            replace(
                self,
                compare_at_s=now_s + self.compare_every_s,
                due_at_s=math.inf if deaf else self.due_at_s,
                doubts=0 if deaf else doubts,
                verdicts=self.verdicts + deaf,
            ),
            deaf,
        )

    def unanswered(self, now_s: float) -> Canary:
        """The server did not answer promptly: a busy loop sends no ``status`` either."""
        later_s = now_s + self.deaf_after_s
        return replace(
            self,
            compare_at_s=max(self.compare_at_s, later_s),
            due_at_s=self.due_at_s if math.isinf(self.due_at_s) else max(self.due_at_s, later_s),
        )
