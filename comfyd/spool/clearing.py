"""Removes whole folders that strangers filled: as much of them as we may, and without an error.

A producer can make folders that nobody but root may empty, can nest them endlessly, and may still
change them while they are removed. So no link is followed, no name is looked up twice from afar,
and what cannot go hinders nothing beside it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from comfyd.spool.layout import full_disk_told, open_dir

DEPTH: Final = 16  # deeper folders are moved up first: each level costs a descriptor
MOVES: Final = 10_000  # no longer against somebody who goes on nesting


def cleared(path: Path) -> str:
    """Remove a file, or a folder with all that is in it, wherever its producer lets us. Blocking.

    Returns:
      Why something of it is left, "" if nothing is.

    Raises:
      DiskFull: The disk takes no changes now.

    """
    parent_fd = open_dir(path.parent)
    try:
        return _removed(path.name, parent_fd, None)
    finally:
        os.close(parent_fd)


@dataclass(slots=True)
class _Top:
    """The folder that is to go.

    Attributes:
      deep: Names in it of folders that were moved up, and are still to go.
      moves: How many there were.

    """

    fd: int
    deep: list[str]
    moves: int = 0


def _removed(name: str, parent_fd: int, top: _Top | None, depth: int = 0) -> str:
    """Args: top: None for the top itself."""
    try:
        with full_disk_told():
            found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=parent_fd)
                return ""
            if top is not None and depth == DEPTH:
                return _moved_up(name, parent_fd, top)
            left = _emptied(name, parent_fd, top, depth)
            if not left:
                os.rmdir(name, dir_fd=parent_fd)
            return left
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)


def _emptied(name: str, parent_fd: int, top: _Top | None, depth: int) -> str:
    fd = _opened(name, parent_fd)
    try:
        left, here = "", top or _Top(fd, [])
        for each in os.listdir(fd):
            left = _removed(each, fd, here, depth + 1) or left
        while top is None and here.deep:
            left = _removed(here.deep.pop(), fd, here, 1) or left
        return left
    finally:
        os.close(fd)


def _opened(name: str, parent_fd: int) -> int:
    """A descriptor of a folder; what is ours is made ours to empty first, whatever its mode."""
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    pinned = os.open(name, flags | os.O_PATH, dir_fd=parent_fd)
    try:
        found = os.fstat(pinned)
        if found.st_uid == os.geteuid() and found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            # By its descriptor: by its name, a link that was put there would be followed.
            os.chmod(f"/proc/self/fd/{pinned}", stat.S_IRWXU)
        return os.open(".", flags | os.O_RDONLY, dir_fd=pinned)
    finally:
        os.close(pinned)


def _moved_up(name: str, parent_fd: int, top: _Top) -> str:
    if top.moves == MOVES:
        return "it is nested too deeply"
    top.moves += 1
    aside = f".deep-{os.urandom(6).hex()}"
    os.rename(name, aside, src_dir_fd=parent_fd, dst_dir_fd=top.fd)
    top.deep.append(aside)
    return ""
