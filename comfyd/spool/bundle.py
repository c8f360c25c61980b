"""Folders that hold a job: looked through without following anything, hashed, copied.

Whoever dropped a bundle may still have it open, so nothing in it is trusted for longer than one
call: every name is opened relative to its folder's descriptor, links are never followed, and what
was opened is checked again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from comfyd.core.model import JobId
from comfyd.core.strictjson import quoted
from comfyd.errors import JobFileError
from comfyd.spool.layout import (
    ULID_BYTES,
    Spool,
    fsync_dir,
    full_disk_told,
    job_id_for,
    new_ulid,
)

# ComfyUI takes 100 MB in one request unless told otherwise, and one file is in memory while it is
# uploaded.
MAX_BYTES: Final = 256 * 2**20
MAX_ENTRIES: Final = 1000  # files and folders
MAX_DEPTH: Final = 8  # so many folders are open at once

# The file's own fault, or its sectors': it would fail again at every start. Anything else (such
# as no descriptors left) is not.
UNREADABLE: Final = frozenset({errno.EPERM, errno.EACCES, errno.EIO, errno.ELOOP, errno.ENXIO})

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK_BYTES: Final = 1 << 20


class Piece(NamedTuple):
    """One file of a bundle, as it was read."""

    size_bytes: int
    sha256: str


class Found(NamedTuple):
    """Something in a bundle: its relative name, and where it is while it is looked at."""

    name: str
    folder_fd: int
    base: str
    stat: os.stat_result


def entries(folder_fd: int) -> Generator[Found, None, None]:
    """Everything in a folder by name, each folder before what it holds.

    Raises:
      JobFileError: Too much, too deep, or a folder that cannot be read.
      FileNotFoundError: Something vanished meanwhile.

    """
    seen = 0

    def walk(fd: int, prefix: str, depth: int) -> Generator[Found, None, None]:
        nonlocal seen
        with os.scandir(fd) as scan:
            names = sorted(entry.name for entry in islice(scan, MAX_ENTRIES + 1 - seen))
        for base in names:
            seen += 1
            if seen > MAX_ENTRIES:
                raise JobFileError(f"The bundle holds more than {MAX_ENTRIES} files and folders.")
            found = os.stat(base, dir_fd=fd, follow_symlinks=False)
            name = prefix + base
            yield Found(name, fd, base, found)
            if not stat.S_ISDIR(found.st_mode):
                continue
            if depth == MAX_DEPTH:
                raise JobFileError(f"The bundle is nested deeper than {MAX_DEPTH} folders.")
            with _blamed(name):
                inner_fd = os.open(base, _FOLDER, dir_fd=fd)
            try:
                yield from walk(inner_fd, f"{name}/", depth + 1)
            finally:
                os.close(inner_fd)

    yield from walk(folder_fd, "", 1)


def newest(folder_fd: int) -> tuple[int, int]:
    """When anything in a folder last changed (ctime, nanoseconds), and how many bytes it holds.

    As far as it can be seen: what cannot be read, or is too much, is left out.
    """
    found = os.fstat(folder_fd)
    ctime_ns, size_bytes = found.st_ctime_ns, 0
    with contextlib.suppress(JobFileError, OSError), contextlib.closing(entries(folder_fd)) as all_:
        for each in all_:
            ctime_ns = max(ctime_ns, each.stat.st_ctime_ns)
            size_bytes += each.stat.st_size
    return ctime_ns, size_bytes


def read(
    folder_fd: int, *, into: Path | None = None, linked: bool = False, removable: bool = False
) -> dict[str, Piece]:
    """Read every file of a bundle, by relative name; folders count only for what they hold.

    Args:
      into: An empty folder of ours that gets a copy of all of it, its files synced.
      linked: Whether files may have other names (hard links).
      removable: Whether to make sure that the daemon can take each folder apart later.

    Raises:
      JobFileError: Something is no regular file, or too much, or cannot be read.
      DiskFull: There is no space for the copy.

    """
    pieces: dict[str, Piece] = {}
    room_bytes = MAX_BYTES
    try:
        with contextlib.closing(entries(folder_fd)) as all_:
            for found in all_:
                if not found.name.isprintable():
                    raise JobFileError(
                        f"The name {quoted(found.name)} in the bundle is not printable text;"
                        " rename it."
                    )
                if stat.S_ISDIR(found.stat.st_mode):
                    if removable:
                        check_removable(found.base, found.folder_fd, found.name)
                    continue
                target = None if into is None else into / found.name
                piece = _read_file(found, room_bytes, target, linked=linked)
                room_bytes -= piece.size_bytes
                pieces[found.name] = piece
    except FileNotFoundError:
        raise JobFileError(
            "The bundle changed while it was read; drop it when it is complete."
        ) from None
    return pieces


def digest(sha256s: Mapping[str, str]) -> str:
    """The SHA-256 of a bundle, in hex, of its files' names and hashes."""
    whole = hashlib.sha256(b"comfyd bundle\0")
    for name in sorted(sha256s):
        whole.update(os.fsencode(name) + b"\0" + bytes.fromhex(sha256s[name]))
    return whole.hexdigest()


def read_piece(folder_fd: int, name: str, piece: Piece) -> bytes:
    """The content of one file of a bundle that was read before.

    Raises:
      JobFileError: It is no longer what it was.

    """
    *folders, base = name.split("/")
    changed = JobFileError(f"{quoted(name)} in the bundle was changed by someone else.")
    try:
        with opened(folder_fd, folders) as fd, open(os.open(base, _FILE, dir_fd=fd), "rb") as file:
            now = os.fstat(file.fileno())
            if not stat.S_ISREG(now.st_mode) or now.st_size != piece.size_bytes:
                raise changed
            data = file.read(piece.size_bytes + 1)
    except OSError as error:
        if error.errno not in UNREADABLE | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
            raise
        raise changed from error
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise changed
    return data


@contextlib.contextmanager
def opened(folder_fd: int, names: list[str], *, make: bool = False) -> Iterator[int]:
    """The folder that *names* lead to, one into the other; no link is followed.

    Args:
      make: Whether to make those that are missing.

    Raises:
      OSError: One of them is no folder (ENOTDIR, ELOOP), or not there.

    """
    fd = os.dup(folder_fd)
    try:
        for name in names:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
            inner_fd = os.open(name, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner_fd
        yield fd
    finally:
        os.close(fd)


def check_removable(base: str, folder_fd: int, name: str) -> None:
    """Refuse a folder that we could not take apart.

    Raises:
      JobFileError: Says what to do.

    """
    wanted = os.R_OK | os.W_OK | os.X_OK
    if not os.access(base, wanted, dir_fd=folder_fd, effective_ids=True):
        raise JobFileError(
            f"The folder {quoted(name)} may not be changed by the daemon, so it could not be"
            " cleared away; let its group read and write it (chmod -R g+rwX), and drop it again."
        )


def sync_folders(folder: Path, *, mode: int, file_mode: int) -> None:
    """Give a copied bundle these modes, and make it survive a power cut; its files are synced."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.chmod(os.path.join(path, name), file_mode)
        os.chmod(path, mode)
        fsync_dir(Path(path))


def drop_bundle(spool: Spool, name: str, fill: Callable[[Path], None]) -> JobId:
    """Submit a folder as a bundle called *name*; the id is known at once, daemon or not.

    Args:
      fill: Puts everything into the folder it is given, and syncs the files.

    Raises:
      DiskFull: Nothing was submitted.
      OSError: There is no such spool, or we may not write there.

    """
    ulid = new_ulid(time.time(), os.urandom(ULID_BYTES))
    job = job_id_for(f"{name}.folder", ulid, used=lambda job: True)
    aside = spool.tmp / f".{job}.part"
    try:
        with full_disk_told():
            aside.mkdir(0o700)
            fill(aside)
            # The daemon takes it apart in the end: with the group's right, unless it is root's.
            sync_folders(aside, mode=0o2770, file_mode=0o640)
            aside.rename(spool.new / job)
            fsync_dir(spool.new)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return job


def _read_file(found: Found, room_bytes: int, target: Path | None, *, linked: bool) -> Piece:
    _check(found.name, found.stat, linked=linked)
    with _blamed(found.name):
        fd = os.open(found.base, _FILE, dir_fd=found.folder_fd)
    with open(fd, "rb", buffering=0) as file:
        now = os.fstat(fd)
        _check(found.name, now, linked=linked)
        if now.st_size > room_bytes:
            raise _too_large()
        if target is None:
            return _pump(found.name, file.read, _nowhere, room_bytes)
        with full_disk_told():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as copy:
                piece = _pump(found.name, file.read, copy.write, room_bytes)
                copy.flush()
                os.fsync(copy.fileno())
        return piece


def _pump(
    name: str,
    read_some: Callable[[int], bytes | None],
    write: Callable[[bytes], object],
    room_bytes: int,
) -> Piece:
    size_bytes, sha256 = 0, hashlib.sha256()
    while True:
        with _blamed(name):
            chunk = read_some(_CHUNK_BYTES)
        if not chunk:
            return Piece(size_bytes, sha256.hexdigest())
        size_bytes += len(chunk)
        if size_bytes > room_bytes:  # it grows while it is read
            raise _too_large()
        sha256.update(chunk)
        write(chunk)


def _nowhere(chunk: bytes) -> None:
    """Keep nothing."""


def _check(name: str, found: os.stat_result, *, linked: bool) -> None:
    """Refuse everything but one file of its own."""
    if stat.S_ISLNK(found.st_mode):
        raise JobFileError(
            f"{quoted(name)} in the bundle is a symbolic link; put a copy of the file itself there."
        )
    if not stat.S_ISREG(found.st_mode):
        raise JobFileError(f"{quoted(name)} in the bundle is no regular file; leave it out.")
    if found.st_nlink != 1 and not linked:
        raise JobFileError(
            f"{quoted(name)} in the bundle has other names (hard links); put a copy there."
        )


def _too_large() -> JobFileError:
    return JobFileError(f"The bundle holds more than {MAX_BYTES} bytes.")


@contextlib.contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Turn what is the fault of the file *name* into a sentence about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNREADABLE | {errno.ENOTDIR}:
            raise
        raise JobFileError(
            f"{quoted(name)} in the bundle cannot be read ({error.strerror}); make it readable for"
            " the daemon."
        ) from None
