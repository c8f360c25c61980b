"""Facts the core is told. Past tense, frozen, no behaviour.

Three kinds: *answers* to one order carry its token, and one whose token is not current is dropped
and counted; *hints* name a prompt and only ever make the core look; *news* is about a server, a
person's wish, or time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from comfyd.core.model import Fence, JobId, PromptId, Record, Row, ServerName, Shelf, Staged, State
from comfyd.core.policy import Policy
from comfyd.core.server import Server


@dataclass(frozen=True, slots=True)
class Token:
    """Names one order: the job, the attempt it is about, and its sequence number."""

    job: JobId
    attempt: int
    seq: int


# --- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """POST /prompt answered 200. *node_errors* is not empty when some outputs were dropped.
    *uploaded*: the server took files of this job before."""

    token: Token
    number: float | None = None
    uploaded: bool = False
    node_errors: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The server refused the prompt for good; *message* says why to a person."""

    token: Token
    message: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotSent:
    """Provably nothing reached the server's queue (refused, or turned away before it).

    Attributes:
      operation: What failed: submit, or an upload before it.
      reached: The server was there: it answered, or broke off.
      status: Of its answer, if one came.
      said: What came instead of success, in a few words.

    """

    token: Token
    reason: str
    operation: str = "submit"
    reached: bool = False
    status: int | None = None
    said: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitUnknown:
    """No usable answer to the POST: it may or may not be queued, now or later.

    Attributes:
      status: Of the answer, if one came.
      said: What came instead of a usable one, in a few words.

    """

    token: Token
    reason: str
    status: int | None = None
    said: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsendable:
    """The claimed file no longer gives a graph to send (damaged, or gone)."""

    token: Token
    message: str


class Presence(enum.Enum):
    """What /queue, then /history/{id} said about one prompt."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    ABSENT = "absent"
    UNKNOWN = "unknown"
    REFUSED = "refused"  # the address refused the connection: its memory is gone, if that lasts
    UNREADABLE = "unreadable"  # not in the queue, and its record is answered with nonsense or a 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Answer to Probe and Stop. *record* is there exactly when *presence* is FINISHED."""

    token: Token
    presence: Presence
    record: Record | None = None
    reason: str = ""


class FetchResult(enum.Enum):
    FOUND = "found"
    EMPTY = "empty"  # a well-formed answer without the record
    ERROR = "error"  # no well-formed answer after all tries
    UNREADABLE = "unreadable"  # an answer that names the record but does not decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Answer to Fetch: GET /history/{id} with its own retries."""

    token: Token
    result: FetchResult
    record: Record | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The result is complete in ``stage/``, fsynced."""

    token: Token
    staged: Staged


class Uncollected(enum.Enum):
    MISSING = "missing"  # a stable 404: the server no longer has an output it named
    INVALID = "invalid"  # the bytes are not what the record promised
    SERVER = "server"  # the server failed or could not be reached; worth another try
    DISK = "disk"  # no space here; worth another try


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectFailed:
    """*again* is False where making the outputs again would end the same: they are too large."""

    token: Token
    cause: Uncollected
    message: str
    again: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """``done/<job>`` or ``failed/<job>`` is there, or a consumer already took it."""

    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishConflict:
    """Something that is not ours stands where the result should go."""

    token: Token
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishDelayed:
    """The rename could not be made now (no space); nothing is visible, nothing is lost."""

    token: Token
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """The claimed file is gone."""

    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """Answer to `orders.Fence`: what is left of an abandoned attempt, after it was to be ended.

    *record* is there exactly when *presence* is FINISHED.
    """

    prompt_id: PromptId
    presence: Presence
    record: Record | None = None
    reason: str = ""


Answer = (
    Accepted
    | Rejected
    | NotSent
    | SubmitUnknown
    | Unsendable
    | Probed
    | Fetched
    | Collected
    | CollectFailed
    | Published
    | PublishConflict
    | PublishDelayed
    | Retired
)


# --- hints (from the WebSocket) ------------------------------------------------------------------


class Sign(enum.Enum):
    """What a message said of a prompt, weakest first; a weaker one never hides a stronger."""

    ALIVE = "alive"  # progress, executed, a node: the prompt is running
    ENDING = "ending"  # execution_success, _error or _interrupted: about to be recorded
    ENDED = "ended"  # executing with node null and this prompt_id: the end signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """The strongest sign since the last one taken from the mailbox."""

    server: ServerName
    prompt_id: PromptId
    sign: Sign


# --- news ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A dropped file was taken: *row* is its first row, queued, or collecting if it is invalid."""

    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Answer to Refill: the next due rows, and when the next delayed one, of any kind, is due."""

    rows: tuple[Row, ...]
    shelf: Shelf = Shelf.FRESH
    next_due_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The tracker's WebSocket is open and the server said hello; prompts may carry *client_id*."""

    server: ServerName
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The tracker's connection ended. *cause*: closed, ping_timeout, deaf, error, or reload, if we
    ended it to connect with other headers."""

    server: ServerName
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledPublisher:
    """Two deaf verdicts in a row: the server sends no events; work by polling (*stalled* True)."""

    server: ServerName
    stalled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSeen:
    """The server's own count of pending and running prompts, others' included."""

    server: ServerName
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """A health probe's result. *refusal* is a sentence when this server must not be used."""

    server: ServerName
    ok: bool
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLooked:
    """How many prompts run and wait on a server, by one GET /queue."""

    server: ServerName
    running: int
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSeen:
    """Whether the spool's file system has the space that ``outputs.min_free_bytes`` keeps."""

    enough: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckAsked:
    """A person asked for an audit of this job now."""

    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    """A person wants this job gone, wherever it is."""

    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAsked:
    """A person lets a held job go on."""

    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldAsked:
    """A person wants this job out of the queue; it has no effect once it was sent."""

    job: JobId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LateSuccess:
    """An attempt that was given up has succeeded all the same: the first success wins."""

    job: JobId
    fence: Fence
    record: Record


Wish = CheckAsked | CancelAsked | ReleaseAsked | HoldAsked


@dataclass(frozen=True, slots=True, kw_only=True)
class Summoned:
    """Answer to `orders.Summon`: the rows of those jobs that are known, and what it was for."""

    rows: tuple[Row, ...]
    purposes: tuple[Wish | LateSuccess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overdue:
    """Answer to `orders.Expire`: queued rows past their deadline, and the next one's after that."""

    rows: tuple[Row, ...]
    next_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseAsked:
    """A person stops the intake, or lets it go on."""

    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """A person wants nothing more sent to this server; what is there may finish."""

    server: ServerName


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeAsked:
    """A person says that this server may be used again: drained or wedged no more."""

    server: ServerName


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetAsked:
    """A person says that this server is gone for good: what is there is given up now."""

    server: ServerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """Rows of jobs that are over were removed from the journal; they were in these states."""

    states: tuple[State, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconfigured:
    """A new configuration holds: these servers, as nothing was known of them yet, and numbers."""

    servers: tuple[Server, ...]
    policy: Policy


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline passed."""


News = (
    Claimed
    | Candidates
    | Connected
    | Disconnected
    | StalledPublisher
    | QueueSeen
    | Health
    | QueueLooked
    | SpaceSeen
    | Fenced
    | Wish
    | Summoned
    | Overdue
    | PauseAsked
    | DrainAsked
    | ResumeAsked
    | ForgetAsked
    | Forgotten
    | Reconfigured
    | Tick
)
Fact = Answer | Hint | News
