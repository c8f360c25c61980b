"""The journal as plain dicts: the model every other store is compared with.

Serves simulations and the exhaustive explorer, so a copy is cheap and crashes can be played.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.model import Fence, JobId, PromptId, Row, Shelf, State
from comfyd.core.retention import Bounds, Kept, Past, Place, Tally, kept_of
from comfyd.journal.store import (
    FOUND_MAX,
    Alias,
    Batch,
    Change,
    Drop,
    Event,
    Forget,
    Insert,
    Keep,
    Lift,
    Pruned,
    Raise,
    Remember,
    Update,
    event_bytes,
    may_forget,
    may_replace,
    out_of,
    prompt_ids,
)


class MemoryStore:
    """A Store without a disk. Deliberately simple: every question but ``get`` looks at all rows.

    Attributes:
      rows_by_job: The rows as they are; frozen values, to be compared, never changed here.

    """

    def __init__(self, *, clean: bool = True) -> None:
        self.rows_by_job: dict[JobId, Row] = {}
        self._names: dict[str, JobId] = {}
        self._events: list[tuple[int, int, Event]] = []  # number, the size of all up to it
        self._kept: dict[JobId, Kept] = {}
        self._fences: dict[PromptId, Fence] = {}
        self._settings: dict[str, Any] = {}
        self._was_clean = clean
        self._clean = False

    def copy(self) -> MemoryStore:
        """Another store with the same content; what is done to one does not show in the other."""
        twin = MemoryStore(clean=self._was_clean)
        twin.rows_by_job = self.rows_by_job.copy()
        twin._names = self._names.copy()
        twin._events = self._events.copy()
        twin._kept = self._kept.copy()
        twin._fences = self._fences.copy()
        twin._settings = self._settings.copy()
        return twin

    def reopened(self) -> MemoryStore:
        """The store as the next owner finds it: after ``close``, or after a crash without it."""
        successor = self.copy()
        successor._was_clean = self._clean
        return successor

    def fingerprint(self) -> tuple[bytes, ...]:
        """A hashable value that is equal exactly when all rows, fences and settings are equal."""
        values = (*_by_seq(self.rows_by_job.values()), *self._fences.values(), self._settings)
        return tuple(msgspec.json.encode(value, order="sorted") for value in values)

    def commit(self, batch: Batch) -> tuple[bool, ...]:
        results = tuple(self._apply(change) for change in batch.changes)
        for event in batch.events:
            number, upto, _ = self._events[-1] if self._events else (0, 0, event)
            size = event_bytes(event, msgspec.json.encode(event.data))
            self._events.append((number + 1, upto + size, event))
        return results

    def prune_events(
        self, bounds: Bounds, now_s: float, *, after: int = 0, limit: int = 1000, dry: bool = False
    ) -> Pruned:
        looked = [each for each in self._events if each[0] > after][:limit]
        if not looked:
            return Pruned()
        newest, whole, _ = self._events[-1]

        def goes(number: int, upto: int, event: Event) -> bool:
            row = self.rows_by_job.get(event.job)
            if row is not None and not (row.state.final and row.retired):
                return False
            return out(number, upto, event)

        def out(number: int, upto: int, event: Event) -> bool:
            before = upto - event_bytes(event, msgspec.json.encode(event.data))
            newer = newest - number
            return out_of(bounds, now_s, at=event.at, newer=newer, bytes_from=whole - before)

        gone = [each for each in looked if goes(*each)]
        if not dry:
            self._events = [each for each in self._events if each not in gone]
        last = looked[-1][0]
        more = out(*looked[-1]) and last != newest
        return Pruned(forgotten=len(gone), next=last if more else None)

    def copy_to(self, target: Path, pause: Callable[[], object]) -> None:
        raise NotImplementedError("a store in memory has no file to copy")

    def active(self) -> tuple[Row, ...]:
        waiting = (State.QUEUED, State.HELD)
        rows = self.rows_by_job.values()
        return _by_seq(row for row in rows if row.state not in waiting and not row.retired)

    def candidates(self, count: int, now_s: float, shelf: Shelf) -> Candidates:
        queued = [row for row in self.rows_by_job.values() if row.state is State.QUEUED]
        due = [row for row in queued if row.not_before <= now_s and row.shelf is shelf]
        by_due = shelf is Shelf.LET_DOWN
        due.sort(key=lambda row: (row.not_before if by_due else -row.priority, row.seq))
        later = (row.not_before for row in queued if row.not_before > now_s)
        next_due_s = min(later, default=None)
        return Candidates(rows=tuple(due[:count]), shelf=shelf, next_due_s=next_due_s)

    def overdue(self, count: int, now_s: float) -> Overdue:
        limited = [
            (row.queue_by, row)
            for row in _by_seq(self.rows_by_job.values())
            if row.state is State.QUEUED and row.queue_by is not None
        ]
        past = sorted((each for each in limited if each[0] <= now_s), key=lambda each: each[0])
        later = (queue_by for queue_by, _ in limited if queue_by > now_s)
        return Overdue(rows=tuple(row for _, row in past[:count]), next_s=min(later, default=None))

    def fences(self) -> tuple[Fence, ...]:
        return tuple(self._fences.values())

    def remembered(self) -> dict[str, Any]:
        return self._settings.copy()

    def get(self, job: JobId) -> Row | None:
        return self.rows_by_job.get(job)

    def keyed(self, key: str) -> Row | None:
        found = _by_seq(row for row in self.rows_by_job.values() if row.key == key)
        return found[-1] if found else None

    def find(self, text: str) -> tuple[Row, ...]:
        if not text:
            return ()
        for job in (JobId(text), self._names.get(text)):
            if job in self.rows_by_job:
                return (self.rows_by_job[job],)
        jobs = sorted(self.rows_by_job, reverse=True)
        stems = [job for job in jobs if job.startswith(text + ".")]
        beginnings = [job for job in jobs if job.startswith(text)]
        return tuple(self.rows_by_job[job] for job in (stems or beginnings)[:FOUND_MAX])

    def rows(
        self, state: State | None = None, *, limit: int, after: int | None = None
    ) -> tuple[Row, ...]:
        page = [
            row
            for row in reversed(_by_seq(self.rows_by_job.values()))
            if (state is None or row.state is state) and (after is None or row.seq < after)
        ]
        return tuple(page[:limit])

    def latest(self, state: State, *, limit: int) -> tuple[Row, ...]:
        over = [row for row in self.rows_by_job.values() if row.state is state and state.final]
        return tuple(sorted(over, key=lambda row: (row.over_at, row.seq), reverse=True)[:limit])

    def events(self, job: JobId) -> tuple[Event, ...]:
        return tuple(event for _, _, event in self._events if event.job == job)

    def counts(self) -> dict[State, int]:
        counts = dict.fromkeys(State, 0)
        for row in self.rows_by_job.values():
            counts[row.state] += 1
        return counts

    def oldest(self, state: State) -> float | None:
        rows = _by_seq(row for row in self.rows_by_job.values() if row.state is state)
        return rows[0].claimed_at if rows else None

    def without_rows(self, jobs: Iterable[JobId]) -> set[JobId]:
        return {job for job in jobs if job not in self.rows_by_job}

    def last_seq(self) -> int:
        return max((row.seq for row in self.rows_by_job.values()), default=0)

    def kept(self, place: Place, *, limit: int, after: Kept | None = None) -> tuple[Kept, ...]:
        there = self._in(place)
        return tuple(k for k in there if after is None or k.order > after.order)[:limit]

    def newest_kept(
        self, place: Place, *, limit: int, before: Kept | None = None
    ) -> tuple[Kept, ...]:
        there = reversed(self._in(place))
        return tuple(k for k in there if before is None or k.order < before.order)[:limit]

    def tally(self, place: Place) -> Tally:
        there = self._in(place)
        return Tally(count=len(there), bytes=sum(kept.bytes for kept in there))

    def _in(self, place: Place) -> list[Kept]:
        there = (kept for kept in self._kept.values() if kept.place is place)
        return sorted(there, key=lambda kept: kept.order)

    def past(self, *, limit: int, after: int = 0) -> tuple[Past, ...]:
        rows = [row for row in _by_seq(self.rows_by_job.values()) if row.seq > after][:limit]
        return tuple(Past(row=row, told=bool(self.events(row.job))) for row in rows)

    def opened_cleanly(self) -> bool:
        return self._was_clean

    def close(self, *, clean: bool = True) -> None:
        self._clean = clean

    def _apply(self, change: Change) -> bool:
        was_final = False
        match change:
            case Insert(row=row):
                seqs = {known.seq for known in self.rows_by_job.values()}
                applied = row.job not in self.rows_by_job and row.seq not in seqs
            case Update(row=row, expected=expected):
                old = self.rows_by_job.get(row.job)
                was_final = old is not None and old.state.final
                applied = (
                    old is not None
                    and (old.seq, old.version) == (row.seq, expected)
                    and may_replace(old, row)
                )
            case Alias(name=name, job=job):
                known = name in self.rows_by_job or name in self._names
                applied = job in self.rows_by_job and not known
                if applied:
                    self._names[name] = job
                return applied
            case Raise(fence=fence):
                return self._fences.setdefault(fence.prompt_id, fence) is fence
            case Lift(prompt_id=prompt_id):
                return self._fences.pop(prompt_id, None) is not None
            case Remember(name=name, value=value):
                self._settings[name] = value
                return True
            case Keep(kept=kept):
                return self._kept.setdefault(kept.job, kept) is kept
            case Drop(job=job):
                return self._kept.pop(job, None) is not None
            case Forget(job=job, version=version):
                applied = may_forget(self.rows_by_job.get(job), version)
                if applied:
                    del self.rows_by_job[job]
                    self._kept.pop(job, None)
                    self._names = {n: j for n, j in self._names.items() if j != job}
                return applied
        if applied:
            result = kept_of(row)
            if result is not None and not was_final:
                self._kept.setdefault(row.job, result)
            self.rows_by_job[row.job] = row
            for known_as in prompt_ids(row):
                self._names.setdefault(known_as, row.job)
        return applied


def _by_seq(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.seq))
