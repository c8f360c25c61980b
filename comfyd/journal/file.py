"""The journal's file: how it is made and opened, and what SQLite's errors mean to us."""

from __future__ import annotations

import errno
import os
import pwd
import shlex
import sqlite3
from pathlib import Path
from typing import Final, Literal

from comfyd.errors import (
    ConfigError,
    DiskFull,
    JournalDamaged,
    JournalError,
    JournalTooNew,
    SpoolBusy,
)
from comfyd.journal.schema import APPLICATION_ID, VERSION

# Of the journal, and of the index of its WAL, which is made when it is opened.
_WRITES: Final = {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_PROBE_BYTES: Final = 64 << 10
# Far more versions than there will ever be: such a number was not written by any comfyd.
_VERSIONS: Final = 10_000


def connect(path: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Connect to a journal that this program understands; ``rw`` keeps everyone else out.

    A new or unfinished file has no tables and passes, at schema version 0.

    Raises:
      JournalTooNew, JournalDamaged, SpoolBusy, DiskFull, JournalError: As for
        ``SqliteStore.open``.

    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        # Each call is a transaction of its own, or inside one that we began (isolation_level).
        db = sqlite3.connect(uri, 0, isolation_level=None, check_same_thread=False, uri=True)
        try:
            db.execute("PRAGMA trusted_schema=OFF")
            if mode == "rw":
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
            _understand(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise translate(path, error) from error
    return db


def _understand(db: sqlite3.Connection, path: Path) -> None:
    [(owner,)] = db.execute("PRAGMA application_id")
    [(version,)] = db.execute("PRAGMA user_version")
    [(tables,)] = db.execute("SELECT count(*) FROM sqlite_master")
    if tables and owner != APPLICATION_ID:
        raise JournalDamaged(path, "an SQLite database, but not a journal of comfyd")
    if not 0 <= version < _VERSIONS:
        raise JournalDamaged(path, f"schema version {version}")
    if version > VERSION:
        msg = (
            f"{path}: written by a newer comfyd (schema {version}, this one knows {VERSION});"
            " nothing was changed. Run that version or a later one"
        )
        raise JournalTooNew(msg)


def translate(path: Path, error: sqlite3.Error) -> DiskFull | SpoolBusy | JournalError:
    """What *error* means to whoever must act."""
    # The module's own errors, e.g. of a closed connection, have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE)
    match code & 0xFF:  # the rest tells the same error more precisely
        case sqlite3.SQLITE_FULL:
            return DiskFull(f"{path}: no space left to write the journal")
        case sqlite3.SQLITE_IOERR if code in _WRITES and (why := _refusal(path.parent)):
            return DiskFull(f"{path}: the journal cannot be written: {why}")
        case sqlite3.SQLITE_BUSY:
            return SpoolBusy(f"{path}: another program has the journal open; close it")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return JournalDamaged(path, str(error))
        case _:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            return JournalError(f"{path}: the journal cannot be used: {error} ({name})")


def _refusal(folder: Path) -> str:
    """Why a write there is refused, if it is for want of space, quota or permission to write.

    SQLite tells ENOSPC apart from other failed writes, but neither EDQUOT nor EROFS.
    """
    probe = folder / ".journal-space"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, bytes(_PROBE_BYTES), 0)
        finally:
            os.close(fd)
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            return os.strerror(error.errno)
    return ""


def prepare_state(folder: Path) -> None:
    """Make the state folder if it is missing, and see that what is in it is ours to write.

    Raises:
      ConfigError: It cannot be made, or something there belongs to someone else.
      DiskFull: There is no space for an empty folder.

    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("lock", *(f"comfyd.db{ending}" for ending in ("", "-wal", "-shm"))):
            path = folder / name
            if path.exists():
                os.close(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        may = os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
        if not may and not os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        where = error.filename or folder
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"{where}: {error.strerror}") from error
        if error.errno == errno.EROFS and folder.is_dir():
            return  # a pause, when it is written to
        remedy = ""
        if isinstance(error, PermissionError):
            remedy = f"; run: {_handed_over(folder)}"
        problem = f"the state folder cannot be used: {where}: {error.strerror}{remedy}"
        raise ConfigError("state", problem) from error


def _handed_over(folder: Path) -> str:
    """What root runs to make *folder*, and what is in it, the daemon's to write."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    name = shlex.quote(str(folder))
    if not os.path.isdir(folder):  # Path.is_dir raises where nobody may look
        return f"install -d -m 700 -o {user} {name}"
    return f"chown -R {user} {name} && chmod -R u+rwX {name}"


def create(path: Path) -> None:
    """Make an empty file (0600) in its folder (0700), durably, unless they are there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    else:
        sync_folder(path.parent.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        return
    os.close(fd)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable.

    Raises:
      JournalError: The disk failed: they may be gone after a power loss.

    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        msg = f"{folder}: cannot be made durable: {error.strerror}"
        raise JournalError(msg) from error
    finally:
        os.close(fd)
