"""``comfyd gc`` and ``comfyd snapshot``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from comfyd.cli.exits import Exit, Refused, Unreachable
from comfyd.cli.place import configured
from comfyd.cli.reading import ask_daemon
from comfyd.cli.screen import counted, put, put_json, say, size
from comfyd.config import Config
from comfyd.errors import SpoolBusy
from comfyd.journal.copy import check_copy, is_snapshot, new_snapshot
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import open_readonly
from comfyd.spool.layout import fsync_dir
from comfyd.web.control_client import DaemonUnreachable

LONG_S: Final = 310.0  # the daemon itself gives a verb up after 300 s
# What file systems say that have no hard links.
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def gc(args: argparse.Namespace) -> int:
    """Apply retention now, or say what that would remove; exit 1 if something could not be."""
    config, _ = configured(args)
    try:
        report = ask_daemon(config, {"verb": "gc", "dry_run": args.dry_run}, LONG_S)
    except DaemonUnreachable as error:
        hint = "" if error.sent else " To gc needs the running daemon."
        raise Unreachable(f"{error}{hint}") from None
    report.pop("ok")
    if args.json:
        put_json({"dry_run": args.dry_run, **report})
    else:
        for each in report["results"]:
            told = f"{size(each['bytes'])}, of {each['published']}, over {each['bound']}"
            put(f"{each['folder']}  {told}")
    if report["more"]:
        say(f"comfyd: and {report['more']} more results")
    results = counted(len(report["results"]) + report["more"], "result")
    events, rows = counted(report["events"], "event"), counted(report["rows"], "job")
    done = "would remove" if args.dry_run else f"forgot {rows}, removed"
    say(f"comfyd: {done} {results} with {size(report['bytes'])} of outputs, and {events}")
    for problem in report["problems"]:
        say(f"comfyd: {problem}")
    return Exit.FAILED if report["problems"] else Exit.OK


def snapshot(args: argparse.Namespace) -> int:
    """Copy the journal to a new file, whether the daemon runs or not."""
    config, _ = configured(args)
    target: Path = args.file
    if os.path.lexists(target):
        raise Refused(f"{target} exists; a snapshot replaces nothing: name another file")
    if not target.absolute().parent.is_dir():
        raise Refused(f"{target.absolute().parent} is no folder; make it first")
    with _copy(config) as fd:
        _put_there(fd, target)
    written = target.stat().st_size
    if args.json:
        put_json({"file": str(target.absolute()), "bytes": written})
    else:
        put(str(target))
        say(f"comfyd: the journal was copied: {size(written)}")
    return Exit.OK


@contextlib.contextmanager
def _copy(config: Config) -> Iterator[int]:
    """A copy of the journal in ``state/``, made by the daemon or, if none runs, here; open.

    Whoever asks may be root, and the daemon be taken over: the copy is a file of the name and in
    the place that copies have, and only that is read and removed.

    Raises:
      Unreachable: A daemon runs and does not answer, or this user may not ask it.
      Refused: What the daemon names is no copy.
      JournalError, DiskFull: The journal cannot be copied.

    """
    try:
        name = Path(ask_daemon(config, {"verb": "snapshot"}, LONG_S)["path"]).name
    except DaemonUnreachable as error:
        if error.sent:
            raise Unreachable(str(error)) from None
        name = _copied_here(config, str(error))
    if not is_snapshot(name):
        raise Refused("what the daemon names is no copy of its journal")
    state_fd = os.open(config.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _opened(name, state_fd)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=state_fd)
        os.close(state_fd)


def _opened(name: str, state_fd: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=state_fd)
    except OSError as error:
        raise Refused(f"the copy of the journal cannot be read: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise Refused("what the daemon names is no copy of its journal")
    return fd


def _copied_here(config: Config, why: str) -> str:
    journal = config.state / "comfyd.db"
    try:
        if not journal.exists():
            raise Refused(f"there is no journal to copy: {journal} is not there")
        with StateLock(config.state / "lock").acquire_shared():
            reads = open_readonly(journal)
            path = new_snapshot(config.state)
            with contextlib.closing(reads):
                reads.copy_to(path, lambda: None)
            check_copy(path)
            return path.name
    except SpoolBusy:
        raise Unreachable(f"a daemon owns {config.state} but does not answer: {why}") from None
    except PermissionError as error:
        message = f"{why} Its journal may not be copied either: {error.strerror}"
        raise Unreachable(message) from None


def _put_there(copy_fd: int, target: Path) -> None:
    """Make *target* a durable file with what *copy_fd* gives: whole or not at all, 0600."""
    aside = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        with open(copy_fd, "rb") as source:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(fd)
        _name(aside, target)
        fsync_dir(target.absolute().parent)
    except FileExistsError:
        raise Refused(f"{target} exists by now; a snapshot replaces nothing") from None
    except OSError as error:
        raise Refused(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _name(aside: Path, target: Path) -> None:
    """Give the file *aside* the name *target*, which nothing has."""
    try:
        os.link(aside, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        aside.rename(target)
