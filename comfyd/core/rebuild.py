"""What the rows of a lost journal must have been, as far as folders and servers still tell. Pure.

The same for a journal that is a snapshot, put back: what became since of the jobs that it knows.
``docs/decisions/009-rebuilding-a-lost-journal.md`` and ``014-snapshots.md`` say what cannot be
known, and what is done.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec

from comfyd.core.model import (
    Fence,
    JobId,
    Outcome,
    PromptId,
    Reason,
    Row,
    ServerName,
    Source,
    Staged,
    State,
    prompt_id_of,
)

# If a server could not be asked, it may hold an attempt of a job that was found nowhere: the next
# one gets a number that no job ever reaches by itself.
UNASKED_ATTEMPTS: Final = 1000


class Seen(enum.IntEnum):
    """Where an attempt was found."""

    PENDING = 1
    RUNNING = 2
    FINISHED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One attempt that a server still knows of."""

    job: JobId
    attempt: int
    server: ServerName
    origin: str
    seen: Seen
    number: float | None = None
    client_id: str | None = None

    @property
    def prompt_id(self) -> PromptId:
        return prompt_id_of(self.job, self.attempt)


def ours(prompt_id: str, tag: tuple[str, int] | None) -> tuple[JobId, int] | None:
    """The job and attempt of a prompt, if it bears our mark and the id that goes with it."""
    if tag is None or prompt_id != prompt_id_of(JobId(tag[0]), tag[1]):
        return None
    return JobId(tag[0]), tag[1]


def arrival(job: JobId) -> tuple[str, str]:
    """Sorts jobs as they arrived: by the time in their ULIDs."""
    return job.rpartition(".")[2], job


# --- results -------------------------------------------------------------------------------------


class _Manifest(msgspec.Struct):
    """What is read back from ``result.json`` and ``error.json``; see ``comfyd.core.result``."""

    job: str
    state: State
    server: str | None = None
    prompt_id: str | None = None
    attempts: int = 0
    completion: Source | None = None
    times: dict[str, str | None] = {}
    reason: Reason | None = None
    message: str = ""
    detail: dict[str, Any] = {}
    outputs: list[Any] = []
    drawn: dict[str, int] = {}
    warnings: list[str] = []
    metadata: dict[str, Any] = {}


_decode = msgspec.json.Decoder(_Manifest).decode
_UNREAD: Final = "Its manifest could not be read when the journal was rebuilt."


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result folder, published or complete in ``stage/``.

    Attributes:
      done: Whether it lies in ``done/``, or in the stage with a ``result.json``.
      manifest: The bytes of its manifest; b"" if there is none.
      sha256: Of those bytes, in hex.

    """

    done: bool
    manifest: bytes
    sha256: str = ""


def finished(row: Row, result: Result) -> Row:
    """*row*, as it was first, of a job whose result is published: final, whatever else is found."""
    row = _with_result(row, result)
    assert row.outcome is not None
    return msgspec.structs.replace(
        row, state=row.outcome.state, retired=not row.payload, queue_by=None
    )


def staged(row: Row, result: Result) -> Row | None:
    """*row* of a job whose result is complete and unpublished; None if it is not to be used."""
    row = _with_result(row, result)
    assert row.outcome is not None
    if row.outcome.message == _UNREAD:
        return None
    return msgspec.structs.replace(
        row, state=State.PUBLISHING, published_at=None, retired=False, queue_by=None
    )


def _with_result(row: Row, result: Result) -> Row:
    stage = Staged(manifest_sha256=result.sha256)
    fallback = State.DONE if result.done else State.FAILED
    try:
        told = _decode(result.manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        told = None
    if told is None or told.job != row.job or (told.state is State.DONE) != result.done:
        outcome = Outcome(state=fallback, message=_UNREAD)
        return msgspec.structs.replace(row, outcome=outcome, staged=stage)
    if not told.state.final:
        told.state = fallback
    return msgspec.structs.replace(
        row,
        outcome=Outcome(
            state=told.state, reason=told.reason, message=told.message, detail=told.detail
        ),
        staged=msgspec.structs.replace(
            stage, outputs=len(told.outputs), bytes=sum(map(_bytes_of, told.outputs))
        ),
        attempt=max(told.attempts, 0),
        server=None if told.server is None else ServerName(told.server),
        prompt_id=None if told.prompt_id is None else PromptId(told.prompt_id),
        completion=told.completion,
        drawn=told.drawn,
        warnings=tuple(told.warnings),
        metadata=told.metadata,
        claimed_at=_at(told, "claimed") or row.claimed_at,
        submitted_at=_at(told, "submitted"),
        started_at=_at(told, "started"),
        ended_at=_at(told, "ended"),
        published_at=_at(told, "published"),
    )


def _bytes_of(output: Any) -> int:
    size = output.get("bytes") if isinstance(output, dict) else None
    return size if isinstance(size, int) and size > 0 else 0


def _at(told: _Manifest, name: str) -> float | None:
    try:
        return datetime.fromisoformat(told.times.get(name) or "").timestamp()
    except (ValueError, OverflowError):
        return None


# --- attempts ------------------------------------------------------------------------------------


def taken_up(row: Row, found: Iterable[Found], *, all_asked: bool, now_s: float) -> Row:
    """*row*, as it was first, of a job without a result: on its server, or to be sent anew.

    The latest attempt is taken up, so that the next one has a number of its own; ``fences`` gives
    what is to become of the others.

    Args:
      found: Its attempts.
      all_asked: Whether every server told what it holds.
      now_s: The time, for what is not known.

    """
    if row.state is not State.QUEUED:
        return row  # it is no job that can run, and needs no server to fail
    latest = max(found, key=lambda each: (each.attempt, each.seen), default=None)
    if latest is None:
        return row if all_asked else msgspec.structs.replace(row, attempt=UNASKED_ATTEMPTS)
    return msgspec.structs.replace(
        row,
        state=State.SUBMITTED,
        attempt=latest.attempt,
        server=latest.server,
        origin=latest.origin,
        prompt_id=latest.prompt_id,
        client_id=latest.client_id or latest.prompt_id,
        number=latest.number,
        unconfirmed=1,
        submitted_at=now_s,
        started_at=now_s if latest.seen is Seen.RUNNING else None,
    )


_TAKEN: Final = (
    "It ended after the snapshot that was put back, and its result was taken away since: how it"
    " ended is not known."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lying:
    """What lies of a job in the spool.

    Attributes:
      claimed: What was submitted.
      stage: A folder for its result, complete or not.
      published: Its result.
      staged: Its result, complete in the stage.

    """

    claimed: bool = False
    stage: bool = False
    published: Result | None = None
    staged: Result | None = None


def carried_on(
    row: Row, lying: Lying, found: Iterable[Found], *, all_asked: bool, now_s: float
) -> Row:
    """*row* of a snapshot, as it is now: its job may have gone on, or ended, since then.

    A claimed file is there until its result was published, so a job that has neither is over.

    Returns:
      *row* itself if nothing is to be changed; else one of the next version.

    """
    new = _carried_on(row, lying, found, all_asked=all_asked, now_s=now_s)
    return row if new == row else msgspec.structs.replace(new, version=row.version + 1)


def _carried_on(
    row: Row, lying: Lying, found: Iterable[Found], *, all_asked: bool, now_s: float
) -> Row:
    if row.state.final:
        return row
    if lying.published is not None:
        done = finished(row, lying.published)
        attempt = max(done.attempt, row.attempt)
        return msgspec.structs.replace(done, attempt=attempt, retired=not lying.claimed)
    if not lying.claimed and not lying.stage:
        return msgspec.structs.replace(
            row,
            state=State.DONE,
            outcome=Outcome(state=State.DONE, message=_TAKEN),
            staged=row.staged or Staged(manifest_sha256=""),
            queue_by=None,
            retired=True,
        )
    if lying.staged is not None and (ready := staged(row, lying.staged)):
        return msgspec.structs.replace(ready, attempt=max(ready.attempt, row.attempt))
    later = [each for each in found if each.attempt > row.attempt]
    if later:
        afresh = msgspec.structs.replace(
            row, state=State.QUEUED, why=None, record=None, outcome=None, staged=None,
            completion=None, held="", ended_at=None, published_at=None, queue_by=None,
        )  # fmt: skip
        return taken_up(afresh, later, all_asked=all_asked, now_s=now_s)
    if not all_asked and row.state in {State.QUEUED, State.HELD}:
        return msgspec.structs.replace(row, attempt=max(row.attempt, UNASKED_ATTEMPTS))
    return row


def fences_since(row: Row, before: Row, found: Iterable[Found]) -> tuple[Fence, ...]:
    """As `fences`, for a row that was *before* in a snapshot: what that knew of is dealt with."""
    news = (
        each for each in found if each.attempt > before.attempt or each.seen is not Seen.FINISHED
    )
    return fences(row, news)


def fences(row: Row, found: Iterable[Found]) -> tuple[Fence, ...]:
    """The attempts of *row*'s job that it does not follow, and that are not over for it."""
    return tuple(
        Fence(prompt_id=each.prompt_id, job=each.job, server=each.server, origin=each.origin)
        for each in found
        if (each.prompt_id, each.server) != (row.prompt_id, row.server)
        and not (row.state.final and each.seen is Seen.FINISHED)
    )
