"""One server, as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass

from comfyd.core.model import ServerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is known of one server. A value; the engine replaces it.

    Attributes:
      origin: Its URL.
      window: Prompts of ours it may hold, or None for auto.
      up: The last health probe was good; None before the first.
      refusal: Why it must not be used, e.g. its version; "" if it may.
      client_id: Of the live connection; None while there is none.
      stalled: The connection is open but the server sends no events: work by polling.
      remaining: The server's own count of prompts, others' included, as last heard.
      failures, closed_until_s: Submissions turned away in a row, and when to try the next.
      run_average_s: Moving average of run times since the last (re)connect.
      listen_by_s: Until then a missing connection is given time to come (back) before prompts are
        sent that nobody would hear of.
      death_charged: Somebody was charged for its last loss of memory; until it accepts again.

    """

    name: ServerName
    origin: str
    window: int | None = None
    up: bool | None = None
    refusal: str = ""
    client_id: str | None = None
    stalled: bool = False
    remaining: int = 0
    failures: int = 0
    closed_until_s: float = 0.0
    run_average_s: float | None = None
    listen_by_s: float = 0.0
    death_charged: bool = False
    draining: bool = False
    wedged: str = ""

    @property
    def opens_s(self) -> float:
        """When something may be sent to it, as far as refusals and its connection go."""
        connected = self.client_id is not None
        return self.closed_until_s if connected else max(self.closed_until_s, self.listen_by_s)

    @property
    def hearing(self) -> bool:
        return self.client_id is not None and not self.stalled
