"""One server, as the engine sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from comfyd.core.model import JobId, ServerName
from comfyd.core.policy import Policy, has_lasted, window


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
      said: What came of the last of those, in a few words; "" if there was none, or no answer.
      accepted_s, uploaded_s: When it last accepted a prompt of ours, and one that came with files.
      run_average_s: Moving average of run times since the last (re)connect.
      listen_by_s: Until then a missing connection is given time to come (back) before prompts are
        sent that nobody would hear of.
      draining: A person asked to send nothing more.
      leaving: It is configured no more, and stays until nothing of ours is left there.
      successor: What is configured by its name now, and takes its place then; only if it leaves.
      strikes: Jobs in a row that failed here in ways that may be the server's fault, and whether
        they spoke of its card.
      idle_since_s: Since when prompts wait there and none runs; None while that is not so.
      wedged: That lasted too long: its worker is dead, until it is seen at work or restarts.
      unfit_since_s: Since when it could not be used, for whatever reason; None while it can.
      restart_every_s: It may be restarted when it is wedged, once in so long; None: never.
      restarted_s: When that was ordered last.

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
    said: str = ""
    accepted_s: float = -math.inf
    uploaded_s: float = -math.inf
    run_average_s: float | None = None
    listen_by_s: float = 0.0
    draining: bool = False
    leaving: bool = False
    successor: Server | None = None
    strikes: tuple[tuple[JobId, bool], ...] = ()
    idle_since_s: float | None = None
    wedged: bool = False
    unfit_since_s: float | None = None
    restart_every_s: float | None = None
    restarted_s: float = -math.inf

    @property
    def restart_s(self) -> float:
        """From when on it may be restarted; inf if never."""
        if self.restart_every_s is None or self.leaving:
            return math.inf
        return self.restarted_s + self.restart_every_s

    @property
    def opens_s(self) -> float:
        """When something may be sent to it, as far as refusals and its connection go."""
        connected = self.client_id is not None
        return self.closed_until_s if connected else max(self.closed_until_s, self.listen_by_s)

    @property
    def retiring(self) -> bool:
        """It finishes what it has, and is given nothing more."""
        return self.draining or self.leaving

    @property
    def hearing(self) -> bool:
        return self.client_id is not None and not self.stalled

    def opened(self) -> Server:
        """It takes submissions, or may do so again: what it turned away is forgotten."""
        return replace(self, failures=0, closed_until_s=0.0, said="")

    def struck(self, job: JobId, *, card: bool) -> Server:
        """*job* failed here, and it may be the server's fault."""
        cleared = self.cleared_of(job)
        return replace(cleared, strikes=(*cleared.strikes, (job, card)))

    def cleared_of(self, job: JobId) -> Server:
        """*job* fails elsewhere too: that was no fault of this server."""
        return replace(self, strikes=tuple(each for each in self.strikes if each[0] != job))

    def at_work(self) -> Server:
        """A prompt was seen to run here."""
        return replace(self, idle_since_s=None, wedged=False)

    def looked_at(self, running: int, pending: int, policy: Policy, *, now_s: float) -> Server:
        """Its queue was read: prompts that wait while none runs are a bad sign if it lasts."""
        if running:
            return self.at_work()
        if not pending:
            return replace(self, idle_since_s=None)
        since_s = now_s if self.idle_since_s is None else self.idle_since_s
        wedged = self.wedged or has_lasted(since_s, policy.wedge_after_s, now_s=now_s)
        return replace(self, idle_since_s=since_s, wedged=wedged)

    def renewed(self) -> Server:
        """It was restarted, or a person says that it is well: nothing is held against it."""
        return replace(self.at_work(), strikes=())

    def room(self, policy: Policy) -> int:
        """How many prompts of ours it may hold; few while it is under suspicion."""
        places = window(self.window, self.run_average_s)
        return min(places, 2) if self.strikes else places
