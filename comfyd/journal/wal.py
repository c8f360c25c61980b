"""What SQLite does not say of a write-ahead log: whether committed frames follow a damaged one.

SQLite takes the WAL up to the first frame whose checksum is wrong: after a crash that is where the
last, unfinished transaction ends. If a commit of the same log follows, it is where someone damaged
it, and jobs would silently become what they were some seconds ago (sqlite.org/fileformat2.html,
section 4).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

_HEADER: Final = struct.Struct(">8I")  # magic, version, page size, sequence, 2 salts, 2 checksums
_FRAME: Final = struct.Struct(">6I")  # page, pages after a commit or 0, 2 salts, 2 checksums
_MAGIC: Final = 0x377F0682  # the lowest bit says that the checksums' words are big-endian


def of(path: Path) -> Path:
    """The WAL of the journal *path*."""
    return path.with_name(path.name + "-wal")


def is_there(path: Path) -> bool:
    """Whether the journal has a WAL with anything in it."""
    try:
        return of(path).stat().st_size > 0
    except FileNotFoundError:
        return False


def finding(path: Path, frames: int) -> str:
    """What is wrong with the WAL of which SQLite took the first *frames*; "" if nothing is."""
    with open(of(path), "rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not _is_header(head):
            return f"{of(path).name} has no valid header"
        _, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(head)
        if _commit_follows(file, frames, page_bytes, salts):
            return f"{of(path).name} is damaged after frame {frames}"
    return ""


def _is_header(head: bytes) -> bool:
    magic, *_, sum_1, sum_2 = _HEADER.unpack(head)
    if magic & ~1 != _MAGIC:
        return False
    words = struct.unpack(">6I" if magic & 1 else "<6I", head[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return (first, second) == (sum_1, sum_2)


def _commit_follows(file: BinaryIO, frames: int, page_bytes: int, salts: list[int]) -> bool:
    """Whether a whole frame after *frames* belongs to this log and ends a transaction."""
    step = _FRAME.size + page_bytes
    at = _HEADER.size + frames * step
    while True:
        file.seek(at)
        frame = file.read(step)
        if len(frame) < step:  # nobody relies on a commit that a full disk cut off
            return False
        _, pages, *found, _, _ = _FRAME.unpack(frame[: _FRAME.size])
        if pages and found == salts:
            return True
        at += step
