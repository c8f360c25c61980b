"""Snapshots: copies of a journal, made while it is in use, that a restart can carry on from."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from comfyd.errors import DiskFull, JournalError
from comfyd.journal.file import sync_folder, translate
from comfyd.journal.schema import WHOLE

_REFUSED: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
PAGES: Final = 256  # in one piece: 1 MiB, about a millisecond in which nobody else has the store
# Copies that wait in state/ for whoever asked for them to take them away.
SNAPSHOTS: Final = ".snapshot-"


def new_snapshot(state: Path) -> Path:
    """A path in ``state/`` that no snapshot has."""
    return state / f"{SNAPSHOTS}{os.urandom(8).hex()}.db"


def is_snapshot(name: str) -> bool:
    """Whether `new_snapshot` makes such names."""
    return re.fullmatch(re.escape(SNAPSHOTS) + r"[0-9a-f]{16}\.db", name) is not None


def copy_journal(source: sqlite3.Connection, target: Path, pause: Callable[[], object]) -> None:
    """See ``Store.copy_to``. *source* may be read-only, and used in *pause*.

    It is SQLite's own online backup: what this connection writes meanwhile goes into the copy too.

    Raises:
      DiskFull, JournalError: Of the copy; *target* is removed.
      sqlite3.Error: Of *source*; the same.
      FileExistsError: There is such a file.

    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    os.close(os.open(target, flags, 0o600))
    try:
        with closing(sqlite3.connect(target, 0, isolation_level=None)) as copy:
            try:
                source.backup(copy, pages=PAGES, progress=lambda status, left, total: pause())
                # One file, without a log beside it; the next owner turns the log on again.
                copy.execute("PRAGMA journal_mode=DELETE")
                # The spool goes on without the copy: what became of its jobs is to be looked up.
                copy.execute("DELETE FROM settings WHERE name = ?", (WHOLE,))
            except sqlite3.Error as error:
                raise translate(target, error) from error
        with open(target, "rb") as file:
            os.fsync(file.fileno())
        sync_folder(target.parent)
    except OSError as error:
        target.unlink(missing_ok=True)
        told = f"{target}: the copy cannot be written: {error.strerror or error}"
        raise (DiskFull if error.errno in _REFUSED else JournalError)(told) from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def check_copy(target: Path) -> None:
    """Read the whole copy; it needs nothing of the journal, and may take as long as the copying.

    Raises:
      JournalError: It is damaged; *target* is removed.

    """
    try:
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            [(finding,)] = copy.execute("PRAGMA integrity_check(1)")
    except sqlite3.Error as error:
        finding = str(error)
    if finding != "ok":
        target.unlink(missing_ok=True)
        raise JournalError(f"{target}: the copy is damaged: {finding}")
