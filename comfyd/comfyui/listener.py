"""What a tracker tells, to whom, and how patient it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from comfyd.core.facts import Sign
from comfyd.core.model import PromptId

Cause = Literal["closed", "ping_timeout", "deaf", "error"]
Result = Literal["ok", "refused", "timeout", "rejected", "error"]
State = Literal["connecting", "connected", "deaf", "backoff"]


class Listener(Protocol):
    """Who is told. All synchronous: the tracker waits for nobody."""

    def on_connected(self, client_id: str) -> None:
        """The server greeted *client_id*: prompts may carry it."""

    def on_disconnected(self, cause: Cause) -> None:
        """The connection that was last said to be connected is gone."""

    def on_hint(self, prompt_id: PromptId, sign: Sign) -> None:
        """A message named a prompt; anybody's, and any text may be its id."""

    def on_progress(self, prompt_id: PromptId, kind: str, data: bytes) -> None:
        """After the hint: the message of type *kind* itself, which may say how far the prompt is.
        *data* is JSON, and of any size."""

    def on_remaining(self, remaining: int) -> None:
        """The server's own count of pending and running prompts."""

    def on_message(self, label: str) -> None:
        """A frame came; *label* is one of ``MESSAGE_TYPES``."""

    def on_connect_result(self, result: Result) -> None:
        """An attempt to connect ended."""

    def on_stalled(self, stalled: bool) -> None:
        """The server began, or stopped, publishing nothing at all."""

    def on_invalid(self, label: str, problem: str) -> None:
        """For the log: at most once a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds; names and defaults are those of ``tracker`` in the configuration.

    connect_timeout_s: From the first packet to the server's greeting.
    ping_interval_s: Between pings, and between comparisons of the queue's length.
    ping_timeout_s: How long not one byte may come after a ping.
    deaf_after_s: See ``Canary``; also how soon an answer counts as prompt.
    reconnect_first_s, reconnect_max_s: The wait doubles from one to the other, jittered, and
      starts anew after a connection that lasted ``reconnect_max_s``.

    """

    connect_timeout_s: float = 10.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    deaf_after_s: float = 5.0
    reconnect_first_s: float = 0.5
    reconnect_max_s: float = 30.0
