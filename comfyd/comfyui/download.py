"""A file on its way in: bounded, hashed and handed on in pieces that are worth a thread hop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from comfyd.errors import AnswerTooLong

CHUNK_BYTES: Final = 256 * 2**10  # a hop costs 0.05 ms: one a piece, not one a packet
HEAD_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A file that came whole.

    Attributes:
      sha256: In hex.
      head: Its first 512 bytes, to tell what it is.

    """

    size_bytes: int
    sha256: str
    head: bytes


class Download:
    """Collects a body. ``add`` belongs to the event loop, ``flush`` and ``finish`` to a thread.

    Args:
      sink: Gets the pieces, in order; what it raises is passed on as it is.
      max_bytes: More than this is an error.

    """

    def __init__(self, sink: Callable[[bytes], object], max_bytes: int) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._size_bytes = 0
        self._digest = hashlib.sha256()
        self._head = b""

    def add(self, chunk: bytes) -> bool:
        """Take *chunk*; whether it is time to flush.

        Raises:
          AnswerTooLong: That is more than ``max_bytes``.

        """
        self._size_bytes += len(chunk)
        if self._size_bytes > self._max_bytes:
            raise AnswerTooLong(f"the file is longer than {self._max_bytes} bytes")
        self._buffer += chunk
        return len(self._buffer) >= CHUNK_BYTES

    def flush(self) -> None:
        """Hash what is buffered and hand it to the sink."""
        chunk = bytes(self._buffer)
        self._buffer.clear()
        self._head = self._head or chunk[:HEAD_BYTES]
        self._digest.update(chunk)
        self._sink(chunk)

    def finish(self) -> Downloaded:
        """Flush the rest: the body is complete."""
        if self._buffer:
            self.flush()
        return Downloaded(self._size_bytes, self._digest.hexdigest(), self._head)
