"""Orders the core gives. Imperative, frozen, complete: a shell needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from comfyd.core.facts import Token
from comfyd.core.model import Row


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
    """Delete from the queue, probe, interrupt by id if running, probe. Answer: Probed."""

    token: Token
    row: Row


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
class Refill:
    """Read the next *count* queued rows from the journal. Answer: Candidates."""

    count: int


JobOrder = Submit | Probe | Stop | Fetch | Collect | Publish | Retire
Order = JobOrder | Refill
