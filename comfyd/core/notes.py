"""Notes: what happened, as values. Events, metrics and log lines all derive from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from comfyd.core.model import JobId, PromptId

Kind = Literal[
    "claimed",  # a job was taken in
    "retried",  # new: the job that was made of it
    "moved",  # state: its new state; reason, where that is not the next one on the way
    "accepted",  # number
    "started",  # it was seen to run for the first time
    "signal",  # sign: a hint that changed something
    "retry",  # operation, reason
    "audit",  # verdict
    "ended",  # source, missed: cause or None
    "lost",  # cause, charged: how many attempts are held against the job for it
    "charged",  # charged: the same without a loss, reason
    "blamed",  # blame: whose fault a failure is: card, server (perhaps) or job
    "finished",  # outcome, reason, durations
    "dropped",  # reason: a fact that was ignored
    "fetched",  # outputs, bytes
    "fenced",  # its attempt was given up without proof: nothing new is sent there before it is over
    "unfenced",  # it is over
]


@dataclass(frozen=True, slots=True)
class Note:
    """Attributes: *story* says whether it belongs in the job's events (not only in metrics).

    prompt: The prompt id of the attempt that it is about, if it is about one.
    """

    kind: Kind
    job: JobId | None
    server: str | None
    data: dict[str, Any] = field(default_factory=dict)
    story: bool = True
    prompt: PromptId | None = None
