"""The values everything else speaks of: a job's row, its states, records and outcomes.

All times are seconds since the Unix epoch on a clock that is monotonic within one process and was
set to UTC when the process started (see ``comfyd.clock``), so rows can be written as they are.
"""

from __future__ import annotations

import enum
import uuid
from typing import Any, Final, NewType

import msgspec

JobId = NewType("JobId", str)
PromptId = NewType("PromptId", str)
ServerName = NewType("ServerName", str)

# One namespace for ever: prompt ids must be recomputable from a job id and an attempt alone.
PROMPT_NAMESPACE: Final = uuid.UUID("6f6d9f2e-3d0b-5c57-9a53-c0f7d0a4f1aa")


def prompt_id_of(job: JobId, attempt: int) -> PromptId:
    """The prompt id of one attempt: canonical lowercase, and the same for ever."""
    return PromptId(str(uuid.uuid5(PROMPT_NAMESPACE, f"{job}/{attempt}")))


class State(enum.Enum):
    """Where a job is. What each one means once committed is in docs/job-states.md."""

    QUEUED = "queued"
    HELD = "held"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    STOPPING = "stopping"
    COLLECTING = "collecting"
    PUBLISHING = "publishing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in FINAL

    @property
    def in_flight(self) -> bool:
        """Whether a prompt of ours may be on a server: it takes a place in the window."""
        return self in IN_FLIGHT


FINAL: Final = frozenset({State.DONE, State.FAILED, State.CANCELLED})
IN_FLIGHT: Final = frozenset({State.SUBMITTING, State.SUBMITTED, State.STOPPING})


class Reason(enum.Enum):
    """Why a job ended without a result, or why it is being stopped."""

    INVALID_JOB = "invalid_job"
    REJECTED = "rejected"
    PARTIAL = "partial"
    EXECUTION_ERROR = "execution_error"
    INTERRUPTED = "interrupted"
    QUEUE_TIMEOUT = "queue_timeout"
    RUN_TIMEOUT = "run_timeout"
    STALLED = "stalled"
    LOST = "lost"
    OUTPUT_MISSING = "output_missing"
    OUTPUT_INVALID = "output_invalid"
    SERVER_PROTOCOL = "server_protocol"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"


class Source(enum.Enum):
    """How the end of a prompt was learnt."""

    SIGNAL = "signal"
    RECONNECT = "reconnect"
    AUDIT = "audit"
    RECOVERY = "recovery"


class End(enum.Enum):
    """What the last entry of a record's ``status.messages`` says."""

    SUCCESS = "success"
    ERROR = "error"
    INTERRUPTED = "interrupted"


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all values that are stored: frozen, compared by content."""


class FileRef(Value, frozen=True):
    """One file a record names, by the server's own words; never a local path.

    Attributes:
      node: Node id in the graph that ran.
      key: Key in the node's ui output, e.g. ``images``.
      type: The server's folder: ``output`` or ``temp``.

    """

    node: str
    key: str
    filename: str
    subfolder: str = ""
    type: str = "output"


class NodeFailure(Value, frozen=True):
    """What an ``execution_error`` said, without inputs or local paths."""

    node: str
    node_type: str
    exception_type: str
    message: str


class Record(Value, frozen=True):
    """A history record, decoded and bounded.

    Attributes:
      end: How the prompt ended.
      files: The files it names, in node and list order.
      ui: Everything else that nodes returned, by node and key, as JSON values.
      ours: The ``extra_data.comfyd`` tag the server kept: (job, attempt), or None.
      unrun: Nodes at the graph's ends that were not to run: they are no outputs, or did not pass
        the server's checks.

    """

    end: End
    files: tuple[FileRef, ...] = ()
    ui: dict[str, dict[str, list[Any]]] = {}
    failure: NodeFailure | None = None
    warnings: tuple[str, ...] = ()
    ours: tuple[str, int] | None = None
    unrun: tuple[str, ...] = ()


class Outcome(Value, frozen=True):
    """How a job ends: decided once, when it starts collecting.

    Attributes:
      state: done, failed or cancelled; as ``Row.why`` also queued: the attempt is ended only to be
        made again, elsewhere.
      reason: Why, unless done.
      message: One sentence a person can act on, unless done.
      detail: More for people and scripts: JSON values, bounded.

    """

    state: State
    reason: Reason | None = None
    message: str = ""
    detail: dict[str, Any] = {}


class Verdict(Value, frozen=True):
    """What one server said against a job that is then tried on another, in case it was the server.

    Attributes:
      outcome: How the job ends if no other server says otherwise.

    """

    server: ServerName
    origin: str
    outcome: Outcome


class LetDown(Value, frozen=True):
    """A server that was reached, and took no submission of a job or did not hand out its outputs.

    Attributes:
      server, origin: The last that did so.
      times: How often one did since a server last had a prompt of it.
      since_s: When one last did, or last had a prompt of it.
      said: What came of it, in a few words.

    """

    server: ServerName
    origin: str
    times: int
    since_s: float
    said: str


class Shelf(enum.IntEnum):
    """Kinds of queued jobs, which are kept apart so that none hides another. The journal's too."""

    FRESH = 0  # no server has said no to it, or let it down
    REFUSED = 1  # some server has said no to it
    LET_DOWN = 2  # some server has let it down, and none has said no


class Fence(Value, frozen=True):
    """An attempt that was given up without proof that it is over.

    Before anything new is sent to that server, it is deleted or interrupted there, or found to have
    finished: then the first success wins.
    """

    prompt_id: PromptId
    job: JobId
    server: ServerName
    origin: str


class Timeouts(Value, frozen=True):
    """Deadlines that a job sets for itself, in seconds; None: as configured.

    Attributes:
      run_s: From its start to its end on a server.
      stall_s: Without any message from it while it runs.

    """

    run_s: float | None = None
    stall_s: float | None = None


class Staged(Value, frozen=True):
    """A complete result in ``stage/``, not yet visible.

    Attributes:
      manifest_sha256: SHA-256 of its ``result.json`` or ``error.json``, in hex.
      outputs: How many files were downloaded.
      bytes: Their size together.

    """

    manifest_sha256: str
    outputs: int = 0
    bytes: int = 0


class Row(Value, frozen=True):
    """What the journal holds of a job: everything that must survive a crash.

    Attributes:
      version: Grows by one with every committed change; the compare-and-set key.
      seq: Arrival order, given at claim.
      payload: File name under ``claimed/``.
      sha256: Of the claimed bytes, in hex.
      attempt: Identities used so far: the current attempt's number, 0 before the first. No limit.
      charged: Attempts held against the job; ``max_attempts`` limits this one.
      dropped: Times a prompt vanished from a server that lived on (deleted by someone else).
      deaths: Servers that died in a row with this job on them. One that has any is sent alone.
      verdicts: What servers said against it; it is tried on those that have not said anything.
      unconfirmed: Times in a row that a server had a prompt of it and did not say that it accepted
        all of it.
      let_down: The last server that took no submission of it, or kept its outputs, if any did.
      crashes: Daemon crashes in a row with this job at hand in this same state.
      not_before: Not to be submitted earlier than this.
      server, origin: Where the current attempt is: the name, and the URL it had then.
      prompt_id, client_id: The identity of the attempt and of the connection it was sent for.
      why: The outcome to take once the prompt is stopped.
      record, outcome, staged: Set on entering collecting, collecting, publishing.
      abandoned: Attempts given up on without proof, as (server, origin, prompt_id); each began as a
        `Fence`.
      queue_s, queue_by: How long the job may wait for its start from the claim on, and until when
        that is; None for ever. Once it has started, queue_by is None.
      retired: The claimed file is gone.

    """

    job: JobId
    seq: int
    state: State = State.QUEUED
    version: int = 0
    priority: int = 0
    payload: str = ""
    sha256: str = ""
    key: str | None = None
    retry_of: JobId | None = None
    metadata: dict[str, Any] = {}
    drawn: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    max_attempts: int = 3
    accept_partial: bool = False
    attempt: int = 0
    charged: int = 0
    dropped: int = 0
    deaths: int = 0
    crashes: int = 0
    not_before: float = 0.0
    server: ServerName | None = None
    origin: str | None = None
    prompt_id: PromptId | None = None
    client_id: str | None = None
    number: float | None = None
    why: Outcome | None = None
    record: Record | None = None
    outcome: Outcome | None = None
    staged: Staged | None = None
    completion: Source | None = None
    abandoned: tuple[tuple[str, str, str], ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    unconfirmed: int = 0
    let_down: LetDown | None = None
    held: str = ""
    queue_s: float | None = None
    queue_by: float | None = None
    timeouts: Timeouts = Timeouts()
    claimed_at: float = 0.0
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    published_at: float | None = None
    retired: bool = False

    @property
    def over_at(self) -> float | None:
        """When it was published; None before."""
        if not self.state.final:
            return None
        return self.claimed_at if self.published_at is None else self.published_at

    @property
    def shelf(self) -> Shelf:
        """Where it is kept while it is queued."""
        if self.verdicts:
            return Shelf.REFUSED
        return Shelf.FRESH if self.let_down is None else Shelf.LET_DOWN
