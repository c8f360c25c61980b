"""The journal as one SQLite file: WAL, synchronous=FULL, one connection, held exclusively.

EXCLUSIVE before the first use of the WAL keeps its index in memory, not in a mapped ``-shm`` file
that a full disk can fault, and allows no second connection, without which the WAL-reset corruption
of SQLite before 3.51.3 cannot happen (sqlite.org/wal.html). A shell that looks while the daemon
lives is told "database is locked".
"""

from __future__ import annotations

import math
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from comfyd.core.facts import Candidates, Overdue
from comfyd.core.model import Fence, JobId, Row, Shelf, State
from comfyd.core.retention import Bounds, Kept, Past, Place, Tally, kept_of
from comfyd.errors import DiskFull, JournalDamaged, JournalError
from comfyd.journal import schema, wal
from comfyd.journal.copy import copy_journal
from comfyd.journal.file import connect, create, sync_folder, translate
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

_SEQ_MAX: Final = 2**63 - 1
# Job and prompt ids are ASCII without control characters: this ends the range of a beginning.
_AFTER_ALL: Final = "\x7f"
_NO_SUCH: Final = sqlite3.SQLITE_ERROR  # a table or a column is missing, or there already


class SqliteStore:
    """A Store in one file. Made by ``open`` or ``open_readonly`` only.

    May be used from any thread, by one at a time.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, *, writable: bool) -> None:
        self._db = db
        self._path = path
        self._writable = writable
        self._broken = ""
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(Row).decode
        self._was_clean = True
        self._files: tuple[int, ...] = ()  # once it is ours: the inodes of the file and its WAL

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the journal to own it; create it, and its folder, when missing.

        Reads the whole file once, to check it, every row included. The folder's lock must be held.

        Raises:
          JournalTooNew: A newer comfyd wrote it; neither the file nor its WAL was changed.
          SpoolBusy: Another program, e.g. an SQLite shell, has it open.
          DiskFull: There is no space even to open it.
          JournalDamaged: It is damaged, not a journal, or its WAL is damaged.
          JournalError: The disk fails.
          OSError: The folder or the file cannot be made or opened.

        """
        create(path)
        has_wal = wal.is_there(path)
        connect(path, "ro").close()  # refuses a newer one before anything can change it
        store = cls(connect(path, "rw"), path, writable=True)
        try:
            store._take_over(has_wal=has_wal)
        except BaseException:
            store.close(clean=False)
            raise
        return store

    def _take_over(self, *, has_wal: bool) -> None:
        with self._damage_told():
            [(mode,)] = self._db.execute("PRAGMA journal_mode=WAL")
            if mode != "wal":
                msg = f"{self._path}: this file system does not allow a write-ahead log"
                raise JournalError(msg)
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "cell_size_check=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            [(version,)] = self._db.execute("PRAGMA user_version")
            if finding := self._finding(has_wal=has_wal):
                raise JournalDamaged(self._path, finding)
        with self._damage_told(), self._transaction():
            for statement in chain.from_iterable(schema.MIGRATIONS[version:]):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={schema.VERSION}")
            self._check_rows()
            self._was_clean = self._closed()
            self._db.execute("UPDATE owner SET closed = 0")
        # The WAL is there from now on; SQLite syncs its name too, but passes over a failure of it.
        sync_folder(self._path.parent)
        self._files = self._inodes()

    def _inodes(self) -> tuple[int, ...]:
        return tuple(_inode(file) for file in (self._path, wal.of(self._path)))

    def _check_place(self) -> None:
        """Raise JournalError if the files we write are no longer those that a restart would find.

        If they were removed, a copy of all that was committed is put in their place before.
        """
        now = self._inodes()
        if now == (self._files or now):
            return
        self._broken = f"{self._path}: the journal was replaced while the daemon ran; start again"
        if now[0] in (0, self._files[0]):
            aside = self._path.with_name(f"{self._path.name}.saved")
            aside.unlink(missing_ok=True)
            try:
                self._db.execute("VACUUM INTO ?", (str(aside),))
                aside.chmod(0o600)
                with open(aside, "rb") as file:
                    os.fsync(file.fileno())
                wal.of(self._path).unlink(missing_ok=True)
                aside.rename(self._path)
                sync_folder(self._path.parent)
            except (sqlite3.Error, OSError) as error:
                self._broken = f"{self._path}: the journal was removed; no copy was made: {error}"
            else:
                self._broken = (
                    f"{self._path}: the journal was removed while the daemon ran; a copy with all"
                    " that was committed is in its place: start again"
                )
        raise JournalError(self._broken)

    def _finding(self, *, has_wal: bool) -> str:
        """What is wrong with the two files, "" if nothing is."""
        [(finding,)] = self._db.execute("PRAGMA integrity_check(1)")
        if finding != "ok":
            return str(finding)
        if has_wal:
            # It copies what is whole into the file, and says how many frames that were.
            [(_, frames, _)] = self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            return wal.finding(self._path, frames)
        return ""

    def _check_rows(self) -> None:
        """Raise JournalDamaged for a row that is not as it was written."""
        for data, crc, *columns in self._db.execute(schema.ALL):
            as_written = isinstance(data, bytes) and crc in (None, zlib.crc32(data))
            if not as_written:
                raise JournalDamaged(self._path, f"the row of {columns[1]} was changed")
            row = self._decode(data)
            if columns != [row.seq, row.job, row.state.value, row.version]:
                raise JournalDamaged(self._path, f"the columns of {row.job} were changed")
        self.remembered()

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        """While nothing but checked statements run: a table or a text that fails them is damage."""
        try:
            with self._translated():
                yield
        except msgspec.DecodeError as error:
            raise JournalDamaged(self._path, str(error)) from error
        except JournalError as error:
            code = getattr(error.__cause__, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if isinstance(error.__cause__, sqlite3.OperationalError) and code == _NO_SUCH:
                raise JournalDamaged(self._path, str(error.__cause__)) from error
            raise

    def _look_at(self) -> None:
        [(version,)] = self._fetch("PRAGMA user_version")
        if version < schema.VERSION:
            msg = f"{self._path}: not yet used by this version of comfyd: start the daemon once"
            raise JournalError(msg)
        self._was_clean = self._closed()

    def _closed(self) -> bool:
        return bool(self._fetch("SELECT max(closed) FROM owner")[0][0])

    def commit(self, batch: Batch) -> tuple[bool, ...]:
        moved: Counter[State] = Counter()
        if not self._broken:
            self._check_place()
        with self._transaction():
            results = tuple(self._apply(change, moved) for change in batch.changes)
            self._db.executemany(schema.INSERT_EVENT, map(self._event, batch.events))
            self._db.executemany(
                schema.COUNT, ((state.value, by) for state, by in moved.items() if by)
            )
        return results

    def _event(self, event: Event) -> tuple[Any, ...]:
        data = self._encode(event.data)
        return event.job, event.at, event.kind, data, event_bytes(event, data)

    def prune_events(
        self, bounds: Bounds, now_s: float, *, after: int = 0, limit: int = 1000, dry: bool = False
    ) -> Pruned:
        looked = self._fetch(schema.LAST_LOOKED, after, limit)
        if not looked:
            return Pruned()
        [(last, at, before)] = looked
        [(newest, upto)] = self._fetch(schema.LAST_EVENT)
        values = {
            "after": after,
            "last": last,
            "before": -math.inf if bounds.age_s is None else now_s - bounds.age_s,
            "to_id": -1 if bounds.count is None else newest - bounds.count,
            "to_bytes": -math.inf if bounds.bytes is None else upto - bounds.bytes,
        }
        if dry:
            with self._translated():
                [(forgotten,)] = self._db.execute(schema.PRUNABLE, values).fetchall()
        else:
            with self._transaction():
                forgotten = self._db.execute(schema.PRUNE, values).rowcount
        more = out_of(bounds, now_s, at=at, newer=newest - last, bytes_from=upto - before)
        return Pruned(forgotten=forgotten, next=last if more and last != newest else None)

    def active(self) -> tuple[Row, ...]:
        return self._rows(schema.ACTIVE)

    def candidates(self, count: int, now_s: float, shelf: Shelf) -> Candidates:
        later = self._fetch(schema.NEXT_DUE, now_s)
        if shelf is Shelf.LET_DOWN:
            rows = self._rows(schema.LET_DOWN, now_s, count)
        else:
            rows = self._rows(schema.CANDIDATES, shelf, now_s, count)
        return Candidates(
            rows=rows,
            shelf=shelf,
            next_due_s=later[0][0] if later else None,
        )

    def overdue(self, count: int, now_s: float) -> Overdue:
        later = self._fetch(schema.NEXT_DEADLINE, now_s)
        return Overdue(
            rows=self._rows(schema.OVERDUE, now_s, count),
            next_s=later[0][0] if later else None,
        )

    def fences(self) -> tuple[Fence, ...]:
        return tuple(
            Fence(prompt_id=prompt_id, job=job, server=server, origin=origin)
            for prompt_id, job, server, origin in self._fetch(schema.FENCES)
        )

    def remembered(self) -> dict[str, Any]:
        return {name: msgspec.json.decode(value) for name, value in self._fetch(schema.REMEMBERED)}

    def get(self, job: JobId) -> Row | None:
        return self._row(schema.GET, job)

    def keyed(self, key: str) -> Row | None:
        return self._row(schema.KEYED, key)

    def find(self, text: str) -> tuple[Row, ...]:
        if not text or not text.isascii():
            return ()
        row = self.get(JobId(text)) or self._row(schema.NAMED, text)
        if row is not None:
            return (row,)
        stem = text + "."
        return self._rows(schema.BEGINNING, stem, stem + _AFTER_ALL, FOUND_MAX) or self._rows(
            schema.BEGINNING, text, text + _AFTER_ALL, FOUND_MAX
        )

    def rows(
        self, state: State | None = None, *, limit: int, after: int | None = None
    ) -> tuple[Row, ...]:
        before = _SEQ_MAX if after is None else after
        if state is None:
            return self._rows(schema.PAGE, before, limit)
        return self._rows(schema.PAGE_OF_STATE, state.value, before, limit)

    def latest(self, state: State, *, limit: int) -> tuple[Row, ...]:
        return self._rows(schema.LATEST, state.value, limit)

    def events(self, job: JobId) -> tuple[Event, ...]:
        return tuple(
            Event(job=job, at=at, kind=kind, data=_story(data))
            for at, kind, data in self._fetch(schema.EVENTS, job)
        )

    def counts(self) -> dict[State, int]:
        counted = {State(state): jobs for state, jobs in self._fetch(schema.COUNTS)}
        return {state: counted.get(state, 0) for state in State}

    def oldest(self, state: State) -> float | None:
        found = self._fetch(schema.OLDEST, state.value)
        return found[0][0] if found else None

    def without_rows(self, jobs: Iterable[JobId]) -> set[JobId]:
        return {job for job in jobs if not self._fetch(schema.KNOWN, job)}

    def last_seq(self) -> int:
        return int(self._fetch(schema.LAST_SEQ)[0][0])

    def kept(self, place: Place, *, limit: int, after: Kept | None = None) -> tuple[Kept, ...]:
        at, job = (-math.inf, "") if after is None else after.order
        return _kept(place, self._fetch(schema.OLDEST_KEPT, place.value, at, job, limit))

    def newest_kept(
        self, place: Place, *, limit: int, before: Kept | None = None
    ) -> tuple[Kept, ...]:
        at, job = (math.inf, "") if before is None else before.order
        return _kept(place, self._fetch(schema.NEWEST_KEPT, place.value, at, job, limit))

    def tally(self, place: Place) -> Tally:
        [(count, size)] = self._fetch(schema.TALLY, place.value)
        return Tally(count=count, bytes=size)

    def past(self, *, limit: int, after: int = 0) -> tuple[Past, ...]:
        found = self._fetch(schema.PAST, after, limit)
        return tuple(Past(row=self._decoded(data), told=bool(told)) for data, told in found)

    def opened_cleanly(self) -> bool:
        return self._was_clean

    def copy_to(self, target: Path, pause: Callable[[], object]) -> None:
        with self._translated():
            copy_journal(self._db, target, pause)

    def close(self, *, clean: bool = True) -> None:
        try:
            if clean and self._writable and not self._broken:
                # Without space for the mark the end looks like a crash, and is dealt with as one.
                with suppress(DiskFull), self._transaction():
                    self._db.execute("UPDATE owner SET closed = 1")
        finally:
            self._db.close()

    def _apply(self, change: Change, moved: Counter[State]) -> bool:
        match change:
            case Insert(row=row):
                if not self._db.execute(schema.INSERT, self._columns(row)).rowcount:
                    return False
                moved[row.state] += 1
                named = prompt_ids(row)
                self._keep(kept_of(row))
            case Update(row=row, expected=expected):
                old = self._replaceable(row, expected)
                if old is None:
                    return False
                self._db.execute(schema.UPDATE, self._columns(row))
                moved[old.state] -= 1
                moved[row.state] += 1
                named = prompt_ids(row) - prompt_ids(old)
                if not old.state.final:
                    self._keep(kept_of(row))
            case Alias(name=name, job=job):
                return bool(self._db.execute(schema.ALIAS, {"name": name, "job": job}).rowcount)
            case Raise(fence=fence):
                values = (fence.prompt_id, fence.job, fence.server, fence.origin)
                return bool(self._db.execute(schema.RAISE, values).rowcount)
            case Lift(prompt_id=prompt_id):
                return bool(self._db.execute(schema.LIFT, (prompt_id,)).rowcount)
            case Remember(name=name, value=value):
                self._db.execute(schema.REMEMBER, (name, self._encode(value)))
                return True
            case Keep(kept=kept):
                return self._keep(kept)
            case Drop(job=job):
                return bool(self._db.execute(schema.DROP, (job,)).rowcount)
            case Forget(job=job, version=version):
                old = self.get(job)
                if old is None or not may_forget(old, version):
                    return False
                for statement in (schema.UNNAME, schema.DROP, schema.FORGET):
                    self._db.execute(statement, (job,))
                moved[old.state] -= 1
                return True
        for name in named:
            self._db.execute(schema.NAME, (name, row.job))
        return True

    def _keep(self, kept: Kept | None) -> bool:
        if kept is None:
            return False
        values = (kept.job, kept.place.value, kept.at, kept.bytes)
        return bool(self._db.execute(schema.KEEP, values).rowcount)

    def _replaceable(self, row: Row, expected: int) -> Row | None:
        """The row that *row* may replace, or None."""
        old = self._row(schema.AT_VERSION, row.job, row.seq, expected)
        return old if old is not None and may_replace(old, row) else None

    def _columns(self, row: Row) -> tuple[Any, ...]:
        data = self._encode(row)
        return (
            row.state.value,
            row.version,
            row.priority,
            row.not_before,
            row.claimed_at,
            row.retired,
            row.key,
            row.server,
            row.prompt_id,
            row.queue_by,
            row.shelf,
            row.over_at,
            data,
            zlib.crc32(data),
            row.seq,
            row.job,
        )

    def _rows(self, query: str, *values: object) -> tuple[Row, ...]:
        return tuple(self._decoded(data) for (data,) in self._fetch(query, *values))

    def _decoded(self, data: bytes) -> Row:
        try:
            return self._decode(data)
        except msgspec.DecodeError as error:
            damage = JournalDamaged(self._path, str(error))
            self._broken = str(damage)
            raise damage from error

    def _row(self, query: str, *values: object) -> Row | None:
        rows = self._rows(query, *values)
        return rows[0] if rows else None

    def _fetch(self, query: str, *values: object) -> list[Any]:
        with self._translated():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise what SQLite reports as ours; nothing is trusted after a JournalError."""
        if self._broken:
            raise JournalError(self._broken)
        try:
            yield
        except sqlite3.Error as error:
            ours = translate(self._path, error)
            if not isinstance(ours, DiskFull):
                self._broken = str(ours)
            raise ours from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, durable at the end.

        DiskFull means that a page could not be written, be it when a statement allocated it or when
        COMMIT appended it to the WAL: the commit frame, which is last, is incomplete, and the next
        transaction overwrites it. Were it complete by accident, a crash right now would look like
        one right after COMMIT, and nobody has acted on either. So it is a refusal. Every other
        failure, above all that of an fsync, leaves unknown what is on disk.
        """
        with self._translated():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


def _kept(place: Place, found: Iterable[Any]) -> tuple[Kept, ...]:
    return tuple(Kept(job=job, place=place, at=at, bytes=size) for job, at, size in found)


def _inode(path: Path) -> int:
    """The inode of *path*, 0 if it is not there."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _story(data: bytes) -> dict[str, Any]:
    """The data of an event; none if it was damaged: nothing depends on it."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def open_readonly(path: Path) -> SqliteStore:
    """Open the journal to read it while no daemon runs; the folder's lock must be held shared.

    Raises:
      JournalTooNew, SpoolBusy: As for ``SqliteStore.open``.
      JournalError: As there; also when there is no journal yet, or an older one: a daemon of this
        version must have run once.

    """
    store = SqliteStore(connect(path, "ro"), path, writable=False)
    try:
        store._look_at()
    except BaseException:
        store.close()
        raise
    return store
