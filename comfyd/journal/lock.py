"""Who owns a folder: ``state/lock`` and ``spool/.lock``, one flock each.

The kernel frees a lock when its holder dies, however that happens; what the file holds is ignored.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from comfyd.errors import SpoolBusy


class StateLock:
    """A lock on one folder, by a file in it that daemons create when missing and never remove.

    A reader holds it shared for the moment of its reading, so a daemon that finds it busy at start
    should try again for a few seconds before it believes that another daemon is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> Self:
        """Take it for a daemon, without waiting.

        Raises:
          SpoolBusy: Someone else holds it.
          OSError: The file cannot be opened or created.

        """
        return self._acquire(fcntl.LOCK_EX, "another comfyd uses this folder")

    def acquire_shared(self) -> Self:
        """Take it for reading, without waiting, together with other readers.

        The file is not created: nobody owns a folder without one, and made by a reader, such as
        root, it might be none that the daemon can open.

        Raises:
          SpoolBusy: A daemon holds it: ask that daemon instead.
          OSError: The file cannot be opened.

        """
        try:
            return self._acquire(fcntl.LOCK_SH, "a running comfyd owns this folder")
        except FileNotFoundError:
            return self

    def release(self) -> None:
        """Give it back; does nothing if it is not held."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _acquire(self, mode: int, why_not: str) -> Self:
        if self._fd is not None:
            msg = f"{self._path} is already held by this object"
            raise RuntimeError(msg)
        # Not for writing: that would keep the file system from being remounted read-only.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        if mode == fcntl.LOCK_EX:
            flags |= os.O_CREAT
        fd = os.open(self._path, flags, 0o600)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            msg = f"{self._path.parent}: {why_not}"
            raise SpoolBusy(msg) from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self
