"""Rename that never replaces anything: the one step by which a result becomes visible."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import Final

_NOREPLACE: Final = 1  # RENAME_NOREPLACE, <linux/fs.h>
# A folder of this mode, ours and empty, is the fallback's own, left by a crash before its rename.
_RESERVED_MODE: Final = 0o1700
# Not known to this kernel, C library or file system (NFS, some FUSE): renameat(2).
_MISSING: Final = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}

_libc = ctypes.CDLL(None, use_errno=True)


def rename_folder(source_dir: int, target_dir: int, name: str) -> None:
    """Move the folder *name* from one open folder to another, if nothing has that name there.

    Raises:
      FileExistsError: Something has.
      FileNotFoundError: There is no such folder.
      OSError: As rename(2).

    """
    try:
        _renameat2(source_dir, target_dir, name)
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        _reserve(target_dir, name)
        os.rename(name, name, src_dir_fd=source_dir, dst_dir_fd=target_dir)


def _renameat2(source_dir: int, target_dir: int, name: str) -> None:
    call = getattr(_libc, "renameat2", None)  # glibc 2.28; musl has none
    path = os.fsencode(name)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), name)
    if call(source_dir, path, target_dir, path, _NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _reserve(target_dir: int, name: str) -> None:
    """Make an empty folder that rename(2) may replace, or find the one we made before a crash."""
    try:
        os.mkdir(name, _RESERVED_MODE, dir_fd=target_dir)
        os.chmod(
            name, _RESERVED_MODE, dir_fd=target_dir
        )  # whatever the umask and setgid made of it
    except FileExistsError:
        there = os.stat(name, dir_fd=target_dir, follow_symlinks=False)
        ours = stat.S_ISDIR(there.st_mode) and there.st_uid == os.geteuid()
        mode = stat.S_IMODE(there.st_mode) & ~stat.S_ISGID  # inherited
        if not ours or mode != _RESERVED_MODE:
            raise
        # Not empty any more? Then rename(2) refuses it: ENOTEMPTY.
