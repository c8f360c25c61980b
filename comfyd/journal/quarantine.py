"""A damaged journal is moved aside, whole and for good; a new one takes its place."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import structlog

from comfyd.errors import JournalDamaged
from comfyd.journal import wal
from comfyd.journal.file import sync_folder
from comfyd.journal.sqlite import SqliteStore

_log = structlog.get_logger("comfyd.journal")


def open_or_begin_anew(path: Path) -> SqliteStore:
    """Open the journal to own it, as ``SqliteStore.open``; one that is damaged is set aside first.

    Raises:
      JournalTooNew, SpoolBusy, DiskFull, JournalError, OSError: As there; nothing was moved.

    """
    try:
        return SqliteStore.open(path)
    except JournalDamaged as error:
        aside = set_aside(path)
        _log.error(
            "journal_quarantined",
            problem=error.finding,
            journal=str(path),
            moved_to=str(aside),
            follows="a new journal is built from the spool's folders and the servers",
        )
    return SqliteStore.open(path)


def set_aside(path: Path) -> Path:
    """Rename the journal and its WAL to ``<name>.damaged-<UTC time>``; returns the new name."""
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.damaged-{at}")
    # The WAL first: a journal that is left without it, by a crash right now, is found out.
    if wal.of(path).exists():
        wal.of(path).rename(wal.of(aside))
    path.rename(aside)
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)  # an index of the WAL, made anew
    sync_folder(path.parent)
    return aside
