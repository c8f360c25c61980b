"""Orders the core gives. Imperative, frozen, complete: a shell needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from comfyd.core import model
from comfyd.core.facts import LateSuccess, Token, Wish
from comfyd.core.model import Row, ServerName, Shelf


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """POST the job's graph as ``row.prompt_id`` to ``row.server``. Answer: Accepted, Rejected,
    NotSent, SubmitUnknown or Unsendable."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Read /queue, then /history/{id}. Answer: Probed."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Delete from the queue, probe, interrupt by id if running, probe. Answer: Probed.

    Attributes: *interrupt* is False where a running prompt shall be left alone.
    """

    token: Token
    row: Row
    interrupt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Read /history/{id} at once, with the configured tries. Answer: Fetched."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Download, verify and stage what ``row.outcome`` and ``row.record`` say.
    Answer: Collected or CollectFailed."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """One no-clobber rename from stage/ to done/ or failed/. Answer: Published,
    PublishConflict or PublishDelayed."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Remove the claimed file. Answer: Retired."""

    token: Token
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """End an abandoned attempt as Stop does. Answer: Fenced."""

    fence: model.Fence


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlist:
    """Talk to this server from now on. No answer but its news."""

    server: ServerName
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismiss:
    """Nothing of ours is left on this server: talk to it no more. No answer."""

    server: ServerName
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summon:
    """Read the rows of the jobs that *purposes* are about. Answer: Summoned."""

    purposes: tuple[Wish | LateSuccess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """Read the next *count* queued rows past their deadline. Answer: Overdue."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refill:
    """Read the next *count* queued rows of one kind from the journal. Answer: Candidates."""

    count: int
    shelf: Shelf


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Restart the systemd unit of a wedged server. No answer: that it is well again is seen."""

    server: ServerName
    why: str


JobOrder = Submit | Probe | Stop | Fetch | Collect | Publish | Retire
Read = Refill | Summon | Expire
"""What the dispatcher reads from the journal at once, so that nothing is older than in memory."""
Task = JobOrder | Fence | Restart | Enlist | Dismiss
"""What is carried out beside the dispatcher."""
Order = Task | Read
