"""What a journal is: the values that change it and the calls every store answers alike.

A store is the only authority for a job's state. It is synchronous and has one owner;
``comfyd.journal.thread`` gives it an async face. The conformance suite in ``tests/journal`` holds
every store to the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.model import Fence, JobId, PromptId, Row, Shelf, State, Value
from comfyd.core.retention import Bounds, Kept, Past, Place, Tally

# Enough for a person to pick the right one; a longer answer would only be cut by the terminal.
FOUND_MAX: Final = 20


class Event(Value, frozen=True):
    """One line of a job's story, for people; nothing is ever decided by it.

    Attributes:
      at: Seconds since the epoch, UTC.
      kind: A short name, e.g. ``submitted``.
      data: JSON values.

    """

    job: JobId
    at: float
    kind: str
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class Insert(Value, frozen=True):
    """Add a row. Not applied if its job id, or its ``seq``, is known already."""

    row: Row


class Update(Value, frozen=True):
    """Replace the row whose job and seq are the same, if its version is still *expected*.

    Not applied either if the row there is final and differs in more than ``retired``.

    Args:
      row: The whole new row; its version is ``expected + 1``.
      expected: The version this change was decided on.

    Raises:
      ValueError: The row's version does not follow *expected*.

    """

    row: Row
    expected: int

    def __post_init__(self) -> None:
        if self.row.version != self.expected + 1:
            msg = f"{self.row.job}: version {self.row.version} does not follow {self.expected}"
            raise ValueError(msg)


class Alias(Value, frozen=True):
    """Make *name* another way to find *job*: the id of a drop absorbed by its idempotency key.

    Not applied if *name* is known already, or *job* is not.
    """

    name: JobId
    job: JobId


class Raise(Value, frozen=True):
    """Keep a fence until it is lifted. Not applied if there is one for its prompt already."""

    fence: Fence


class Lift(Value, frozen=True):
    """Drop the fence of this prompt. Not applied if there is none."""

    prompt_id: PromptId


class Remember(Value, frozen=True):
    """Keep a setting that outlives the daemon, in place of an older one. Always applied.

    Attributes:
      value: A JSON value.

    """

    name: str
    value: Any


class Keep(Value, frozen=True):
    """Note that a result lies in ``done/`` or ``failed/``; not applied if that is known.

    Only for results without a row: those of rows are noted when the row becomes final.
    """

    kept: Kept


class Drop(Value, frozen=True):
    """The result of *job* is gone from its folder. Not applied if none was noted."""

    job: JobId


class Forget(Value, frozen=True):
    """Remove the row of *job*, its names and the note of its result.

    Not applied if its version is another one, it is not final and retired, or it has a key.
    """

    job: JobId
    version: int


Change = Insert | Update | Alias | Raise | Lift | Remember | Keep | Drop | Forget


class Batch(Value, frozen=True):
    """Changes and events that are written together or not at all.

    Changes are tried in order and each sees those before it. The events are written whether or not
    every change applies.
    """

    changes: tuple[Change, ...] = ()
    events: tuple[Event, ...] = ()


class Pruned(Value, frozen=True):
    """Attributes: *forgotten* is how many events were; *next* where to go on, None if no more can
    be out of bounds, as far as the times of events follow their order."""

    forgotten: int = 0
    next: int | None = None


class Reads(Protocol):
    """What can be asked of a journal, by its owner or, when no daemon runs, by anyone.

    Every call may raise JournalError: the file is damaged or the disk fails.
    """

    def active(self) -> tuple[Row, ...]:
        """Every row that waits for something of ours, by seq: not queued, not held, not retired."""
        ...

    def candidates(self, count: int, now_s: float, shelf: Shelf) -> Candidates:
        """The next *count* rows of *shelf* due at *now_s* (UTC, from 0), and when another will be.

        Highest priority first, then by seq; of the let down, those first that are due for longest.
        """
        ...

    def overdue(self, count: int, now_s: float) -> Overdue:
        """The first *count* queued rows whose ``queue_by`` has come, and the next one to come.

        Earliest first, then by seq; *now_s* is UTC.
        """
        ...

    def fences(self) -> tuple[Fence, ...]:
        """Every fence, in the order raised."""
        ...

    def remembered(self) -> dict[str, Any]:
        """Every setting, by its name."""
        ...

    def get(self, job: JobId) -> Row | None:
        """The row of exactly this job, if there is one. Aliases are not followed."""
        ...

    def keyed(self, key: str) -> Row | None:
        """The newest row with this idempotency key: a retry takes its key over."""
        ...

    def find(self, text: str) -> tuple[Row, ...]:
        """The rows that *text*, typed by a person, may mean; at most FOUND_MAX.

        The first that gives any: a job id; an alias or the prompt id of a current or past attempt;
        a whole stem; the beginning of a job id. Of several, the last in job id order come first:
        for one stem these are the newest.
        """
        ...

    def rows(
        self, state: State | None = None, *, limit: int, after: int | None = None
    ) -> tuple[Row, ...]:
        """One page of rows, newest first.

        Args:
          state: Only rows in this state.
          limit: At most so many, from 1.
          after: The seq of the last row of the page before.

        """
        ...

    def latest(self, state: State, *, limit: int) -> tuple[Row, ...]:
        """The rows in *state*, a final one, that were published last, the last one first."""
        ...

    def events(self, job: JobId) -> tuple[Event, ...]:
        """The job's story in the order it was written."""
        ...

    def counts(self) -> dict[State, int]:
        """How many rows are in each state, zeros included."""
        ...

    def oldest(self, state: State) -> float | None:
        """``claimed_at`` of the first that arrived of those now in *state*."""
        ...

    def without_rows(self, jobs: Iterable[JobId]) -> set[JobId]:
        """Those of *jobs* that have no row. Microseconds each: ask for some thousands at a time."""
        ...

    def last_seq(self) -> int:
        """The highest seq ever given, 0 before the first."""
        ...

    def kept(self, place: Place, *, limit: int, after: Kept | None = None) -> tuple[Kept, ...]:
        """The oldest results in *place*, as far as is known, in ``Kept.order``; those after one."""
        ...

    def newest_kept(
        self, place: Place, *, limit: int, before: Kept | None = None
    ) -> tuple[Kept, ...]:
        """The same from the other end: the newest first."""
        ...

    def tally(self, place: Place) -> Tally:
        """How many results are known to be in *place*, and their size together."""
        ...

    def past(self, *, limit: int, after: int = 0) -> tuple[Past, ...]:
        """The next *limit* rows after the seq *after*, in order, and whether each has a story."""
        ...

    def opened_cleanly(self) -> bool:
        """Whether the owner before this one closed the journal; True for a new one."""
        ...

    def close(self, *, clean: bool = True) -> None:
        """End the use of the journal. Nothing may be called afterwards.

        Args:
          clean: Whether the next owner shall see an orderly end; False after a bug.

        """
        ...


class Store(Reads, Protocol):
    """A journal in the hands of its one owner."""

    def commit(self, batch: Batch) -> tuple[bool, ...]:
        """Write *batch* in one transaction, durable on return.

        Returns:
          Whether each change was applied, in order. One that was not has changed nothing.

        Raises:
          DiskFull: There was no space; nothing was written and the store is as before.
          JournalError: What is on disk is unknown; every further call raises it too.

        """
        ...

    def prune_events(
        self, bounds: Bounds, now_s: float, *, after: int = 0, limit: int = 1000, dry: bool = False
    ) -> Pruned:
        """Forget events that are out of *bounds*: in the order written, *limit* looked at.

        The story of a job that is not final and retired is kept, whatever its age.

        Args:
          after: Where to begin: ``Pruned.next`` of the call before.
          dry: Only count.

        Raises:
          DiskFull, JournalError: As for commit.

        """
        ...

    def copy_to(self, target: Path, pause: Callable[[], object]) -> None:
        """Copy the journal to the new file *target* (0600), whole and durable; a snapshot, which
        ``copy.check_copy`` then reads through.

        What is committed meanwhile is in it or not, but never in part. Whoever opens it as a
        journal makes it whole from the spool first, for the spool has gone on.

        Args:
          pause: Called every few milliseconds; everything else may be done with the store in it.

        Raises:
          DiskFull, JournalError: *target* is removed.
          FileExistsError: There is such a file.

        """
        ...


def may_replace(old: Row, new: Row) -> bool:
    """Whether *new* may follow *old*: a final row never changes, except that it is retired."""
    if not old.state.final:
        return True
    return msgspec.structs.replace(old, retired=new.retired, version=new.version) == new


def may_forget(row: Row | None, version: int) -> bool:
    """Whether `Forget` applies to *row*."""
    return (
        row is not None
        and row.version == version
        and row.state.final
        and row.retired
        and row.key is None
    )


def event_bytes(event: Event, data: bytes) -> int:
    """The size of *event* as far as bounds go; *data* is its data as stored."""
    return len(event.job) + len(event.kind) + len(data)


def out_of(bounds: Bounds, now_s: float, *, at: float, newer: int, bytes_from: int) -> bool:
    """Whether an event is out of *bounds*.

    Args:
      newer: How many are newer, at most.
      bytes_from: The size of it and all that are newer.

    """
    return (
        (bounds.age_s is not None and at < now_s - bounds.age_s)
        or (bounds.count is not None and newer >= bounds.count)
        or (bounds.bytes is not None and bytes_from > bounds.bytes)
    )


def prompt_ids(row: Row) -> frozenset[str]:
    """Every prompt id that *row* itself knows of: the current one and those abandoned."""
    current = frozenset() if row.prompt_id is None else frozenset({row.prompt_id})
    return current | {prompt_id for _, _, prompt_id in row.abandoned}
