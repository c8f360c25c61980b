"""Reading what was claimed: checked before it is opened, and again on what was opened."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from comfyd.errors import JobFileError

# The file's own fault, or its sectors': it would fail again at every start. Anything else (such
# as no descriptors left) is not.
_UNREADABLE: Final = {errno.EPERM, errno.EACCES, errno.EIO, errno.ELOOP, errno.ENXIO}


def read_claimed(claimed_fd: int, payload: str, *, max_bytes: int) -> bytes:
    """The content of a claimed file, if it is one regular file of its own and small enough.

    Args:
      claimed_fd: The open folder ``claimed/``.

    Raises:
      JobFileError: It is something else, or cannot be read; nothing but a regular file is opened.
      FileNotFoundError: It is gone, by an operator's hand.
      OSError: Anything that is not the file's fault.

    """
    _check(os.stat(payload, dir_fd=claimed_fd, follow_symlinks=False), max_bytes)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(payload, flags, dir_fd=claimed_fd)
        with open(fd, "rb") as file:
            _check(os.fstat(fd), max_bytes)
            data = file.read(max_bytes + 1)
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise JobFileError(
            f"The file cannot be read ({error.strerror}); make it readable for the daemon."
        ) from None
    if len(data) > max_bytes:
        raise JobFileError("The file grew while it was read; drop it when it is complete.")
    return data


def _check(found: os.stat_result, max_bytes: int) -> None:
    """Refuse everything but one file of its own, small enough."""
    if stat.S_ISDIR(found.st_mode):
        raise JobFileError(
            "A folder was dropped; this version of comfyd takes single job files, not bundles."
        )
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
