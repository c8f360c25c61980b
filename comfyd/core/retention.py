"""What is kept, and what goes: results in ``done/`` and ``failed/``, stories, and rows. Pure.

Results go oldest first, as soon as one of the bounds is exceeded. A row goes once its result is
gone, be it by us or taken by a consumer, and its story is forgotten: what it still protects from
is that its id, or its key, is used a second time. So a row with a key stays, and of the ids of the
others only the time is kept up to which they may have been forgotten (`is_forgotten`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from comfyd.core.model import JobId, Row, State, Value

# A file may have waited in new/ for so long, with an id of its own, and still get that id.
FORGET_AFTER_S: Final = 86400.0

FORGOTTEN: Final = "forgotten_until"
"""The setting that says: ids made up to this time (UTC) may be those of forgotten jobs."""

Why = Literal["age", "count", "bytes"]
_CROCKFORD: Final = {c: n for n, c in enumerate("0123456789ABCDEFGHJKMNPQRSTVWXYZ")}


class Place(enum.Enum):
    """Where results lie: the folder's name."""

    DONE = "done"
    FAILED = "failed"


class Kept(Value, frozen=True):
    """A result that lies in its place, as far as is known: a consumer may have taken it.

    Attributes:
      at: When it was published; seconds since the epoch.
      bytes: The size of its outputs together.

    """

    job: JobId
    place: Place
    at: float
    bytes: int = 0

    @property
    def order(self) -> tuple[float, str]:
        """Sorts results as they are removed."""
        return self.at, self.job


class Past(Value, frozen=True):
    """A row, and whether anything of its story is left."""

    row: Row
    told: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is kept is within all of these; None is no limit of that kind.

    Attributes: *age_s* in seconds, since it was published or written.
    """

    age_s: float | None = None
    count: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many results, and their size."""

    count: int = 0
    bytes: int = 0

    def plus(self, kept: Kept) -> Tally:
        return Tally(count=self.count + 1, bytes=self.bytes + kept.bytes)

    def exceeds(self, bounds: Bounds) -> Why | None:
        """Which of the bounds that limit a number is exceeded, if one is."""
        if bounds.count is not None and self.count > bounds.count:
            return "count"
        if bounds.bytes is not None and self.bytes > bounds.bytes:
            return "bytes"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The newest result that there is no room for: it and all older ones go."""

    order: tuple[float, str]
    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Results counted so far, the newest first, until one is too many."""

    bounds: Bounds
    tally: Tally = Tally()
    cut: Cut | None = None

    def counted(self, page: Iterable[Kept]) -> Count:
        """The count after *page*, the next older results that are really there."""
        count = self
        for kept in page:
            if count.cut is not None:
                break
            tally = count.tally.plus(kept)
            why = tally.exceeds(self.bounds)
            cut = None if why is None else Cut(order=kept.order, why=why)
            count = replace(count, tally=tally, cut=cut)
        return count


def why_removed(kept: Kept, bounds: Bounds, cut: Cut | None, *, now_s: float) -> Why | None:
    """By which bound *kept* goes; None if it stays, and with it all that are newer."""
    if bounds.age_s is not None and kept.at < now_s - bounds.age_s:
        return "age"
    return cut.why if cut is not None and kept.order <= cut.order else None


def kept_of(row: Row) -> Kept | None:
    """The result of *row*, if it is final."""
    if not row.state.final:
        return None
    return Kept(
        job=row.job,
        place=Place.DONE if row.state is State.DONE else Place.FAILED,
        at=row.claimed_at if row.published_at is None else row.published_at,
        bytes=0 if row.staged is None else row.staged.bytes,
    )


# --- rows ----------------------------------------------------------------------------------------


def minted_s(job: JobId) -> float | None:
    """When the ULID of *job* was made, by its own word; None if it has none."""
    digits = job.rpartition(".")[2][:10]
    if len(digits) < 10 or any(digit not in _CROCKFORD for digit in digits):
        return None
    number = 0
    for digit in digits:
        number = number * 32 + _CROCKFORD[digit]
    return number / 1000


def may_go(past: Past, *, fenced: bool, now_s: float) -> bool:
    """Whether the row may be forgotten, provided that nothing of its job lies in the spool.

    Args:
      fenced: An attempt of it may still be on a server.

    """
    row, minted = past.row, minted_s(past.row.job)
    result = kept_of(row)
    if result is None or not row.retired or row.key is not None or past.told or fenced:
        return False
    # An id from the future would make the ids of today those of forgotten jobs.
    return minted is not None and max(minted, result.at) <= now_s - FORGET_AFTER_S


def forgotten_until(until_s: float, jobs: Iterable[JobId]) -> float:
    """FORGOTTEN once *jobs* are forgotten too; *until_s* is what it was."""
    return max([until_s, *filter(None, map(minted_s, jobs))])


def is_forgotten(job: JobId, until_s: float) -> bool:
    """Whether *job* may be one that was forgotten: its id must not be used again."""
    minted = minted_s(job)
    return minted is not None and minted <= until_s
