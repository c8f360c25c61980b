"""Fences: attempts that were given up while nobody knew whether they were over.

While there is one on a server, nothing new is sent there. It is asked to end and looked for as a
stopped prompt is, and lifted once it is proven to be over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from comfyd.core.facts import Fenced, Presence
from comfyd.core.model import Fence
from comfyd.core.policy import Policy, exponential_s, has_lasted


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is known of one fence. Forgotten in a crash; the fence itself is not.

    Attributes:
      asked: An order is outstanding.
      look_s: When to ask (again).
      absent_s, alive_s: Since when each answer has been given without a break.
      tries: Answers so far that did not end it.

    """

    fence: Fence
    asked: bool = False
    look_s: float = -math.inf
    absent_s: float | None = None
    alive_s: float | None = None
    tries: int = 0

    def is_stubborn(self, policy: Policy, *, now_s: float) -> bool:
        """Whether it goes on although it was told to stop: its server is stuck."""
        return has_lasted(self.alive_s, policy.stop_retry_s, now_s=now_s)


def looked(watch: Watch, fact: Fenced, policy: Policy, *, now_s: float, u: float) -> Watch | None:
    """The watch after an answer; None if the attempt is proven to be over."""
    watch = replace(watch, asked=False, tries=watch.tries + 1)
    later_s = now_s + exponential_s(watch.tries, policy.stop_retry_s, policy.retry_max_s, u=u)
    match fact.presence:
        case Presence.FINISHED:
            return None
        case Presence.ABSENT | Presence.REFUSED | Presence.UNREADABLE:
            # An unreadable record is one all the same, or will be none: it is not in the queue.
            since_s = now_s if watch.absent_s is None else watch.absent_s
            if has_lasted(since_s, policy.lost_grace_s, now_s=now_s):
                return None
            until_s = since_s + policy.lost_grace_s
            return replace(watch, absent_s=since_s, alive_s=None, look_s=until_s)
        case Presence.PENDING | Presence.RUNNING:
            since_s = now_s if watch.alive_s is None else watch.alive_s
            return replace(watch, absent_s=None, alive_s=since_s, look_s=later_s)
        case Presence.UNKNOWN:
            return replace(watch, look_s=later_s)


def again_soon(watch: Watch, policy: Policy, *, now_s: float) -> Watch:
    """To be looked at once more: its success cannot be taken right now."""
    return replace(watch, asked=False, look_s=now_s + policy.stop_retry_s)
