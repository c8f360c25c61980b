"""Reading what was claimed, a file or a bundle: checked before it is opened, and again after."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from comfyd.errors import JobFileError
from comfyd.spool import bundle
from comfyd.spool.bundle import UNREADABLE, Piece
from comfyd.spool.jobfile import DOCUMENT_NAMES


@dataclass(frozen=True, slots=True)
class Claim:
    """What was claimed, found to be one regular file, or a folder of such with a job in it.

    Attributes:
      document: The job document, or whatever the single file is.
      name: Its file name, which says whether it is YAML.
      pieces: All files of a bundle, the document too, by relative name; None for a single file.
      sha256: Of the file, or of the bundle as a whole (see ``bundle.digest``), in hex.

    """

    document: bytes
    name: str
    pieces: Mapping[str, Piece] | None
    sha256: str

    @property
    def beside(self) -> set[str] | None:
        """The names of what a job document may refer to; None beside a single file."""
        return None if self.pieces is None else self.pieces.keys() - {self.name}


def read_claim(folder_fd: int, payload: str, *, max_bytes: int, linked: bool = False) -> Claim:
    """Read all of a claimed file or bundle.

    Args:
      folder_fd: The open folder ``claimed/``.
      max_bytes: Of the job document; what else a bundle may hold is bounded by itself.
      linked: Whether hard links are fine.

    Raises:
      JobFileError: It is something else, or cannot be read; nothing but a regular file is opened.
      FileNotFoundError: It is gone, by an operator's hand.
      OSError: Anything that is not the file's fault.

    """
    found = os.stat(payload, dir_fd=folder_fd, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        data = _read_file(folder_fd, payload, found, max_bytes)
        return Claim(data, payload, None, hashlib.sha256(data).hexdigest())
    if not linked:
        bundle.check_removable(payload, folder_fd, payload)
    with opened_bundle(folder_fd, payload) as fd:
        pieces = bundle.read(fd, linked=linked, removable=not linked)
        names = [name for name in DOCUMENT_NAMES if name in pieces]
        if not names:
            raise JobFileError(
                "The folder holds no job.yaml or job.json, so there is no job in it."
            )
        if len(names) > 1:
            raise JobFileError("The folder holds a job.yaml and a job.json; leave one of them out.")
        (name,) = names
        if pieces[name].size_bytes > max_bytes:
            raise JobFileError(
                f"{name} has {pieces[name].size_bytes} bytes; jobs.max_file_bytes allows"
                f" {max_bytes}."
            )
        document = bundle.read_piece(fd, name, pieces[name])
    sha256 = bundle.digest({name: piece.sha256 for name, piece in pieces.items()})
    return Claim(document, name, pieces, sha256)


@contextlib.contextmanager
def opened_bundle(folder_fd: int, payload: str) -> Iterator[int]:
    """The bundle *payload* itself, never where a link leads.

    Raises:
      JobFileError: It is no folder, or may not be opened.

    """
    try:
        with bundle.opened(folder_fd, [payload]) as fd:
            yield fd
    except (NotADirectoryError, PermissionError) as error:
        raise JobFileError(f"The folder cannot be read ({error.strerror}).") from None


def _read_file(folder_fd: int, payload: str, found: os.stat_result, max_bytes: int) -> bytes:
    _check(found, max_bytes)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(payload, flags, dir_fd=folder_fd)
        with open(fd, "rb") as file:
            _check(os.fstat(fd), max_bytes)
            data = file.read(max_bytes + 1)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise JobFileError(
            f"The file cannot be read ({error.strerror}); make it readable for the daemon."
        ) from None
    if len(data) > max_bytes:
        raise JobFileError("The file grew while it was read; drop it when it is complete.")
    return data


def _check(found: os.stat_result, max_bytes: int) -> None:
    """Refuse everything but one file of its own, small enough."""
    if stat.S_ISLNK(found.st_mode):
        raise JobFileError("A symbolic link was dropped; drop a copy of the file itself.")
    if not stat.S_ISREG(found.st_mode):
        raise JobFileError("What was dropped is no regular file; drop a copy of its content.")
    if found.st_nlink != 1:
        raise JobFileError(
            "The file has other names (hard links); drop a copy that has only this one."
        )
    if found.st_size > max_bytes:
        raise JobFileError(
            f"The file has {found.st_size} bytes; jobs.max_file_bytes allows {max_bytes}."
        )
