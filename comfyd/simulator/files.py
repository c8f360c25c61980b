"""The server's input, output and temp folders, in memory or on disk."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Final, Protocol

FOLDERS: Final = ("input", "output", "temp")


class Files(Protocol):
    """Where the simulator keeps files; *folder* is one of FOLDERS, *subfolder* may be ""."""

    def read(self, folder: str, subfolder: str, name: str) -> bytes | None:
        """The content, or None if there is no such file."""

    def write(self, folder: str, subfolder: str, name: str, content: bytes) -> None:
        """Create or replace a file; the subfolder is made."""

    def delete(self, folder: str, subfolder: str, name: str) -> None:
        """Remove a file; it need not exist."""

    def names(self, folder: str, subfolder: str) -> list[str]:
        """The files in one subfolder, sorted."""

    def clear(self, folder: str) -> None:
        """Remove all files of *folder*."""


class MemoryFiles:
    """Files that live as long as the object."""

    def __init__(self) -> None:
        self._contents: dict[tuple[str, str, str], bytes] = {}

    def read(self, folder: str, subfolder: str, name: str) -> bytes | None:
        return self._contents.get((folder, _plain(subfolder), name))

    def write(self, folder: str, subfolder: str, name: str, content: bytes) -> None:
        self._contents[folder, _plain(subfolder), name] = content

    def delete(self, folder: str, subfolder: str, name: str) -> None:
        self._contents.pop((folder, _plain(subfolder), name), None)

    def names(self, folder: str, subfolder: str) -> list[str]:
        wanted = (folder, _plain(subfolder))
        return sorted(key[2] for key in self._contents if key[:2] == wanted)

    def clear(self, folder: str) -> None:
        for key in [key for key in self._contents if key[0] == folder]:
            del self._contents[key]


class DiskFiles:
    """Files below *directory*, one folder each for input, output and temp."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for folder in FOLDERS:
            (directory / folder).mkdir(parents=True, exist_ok=True)

    def _folder(self, folder: str, subfolder: str) -> Path:
        return self._directory / folder / _plain(subfolder)

    def read(self, folder: str, subfolder: str, name: str) -> bytes | None:
        path = self._folder(folder, subfolder) / name
        return path.read_bytes() if path.is_file() else None

    def write(self, folder: str, subfolder: str, name: str, content: bytes) -> None:
        place = self._folder(folder, subfolder)
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    def delete(self, folder: str, subfolder: str, name: str) -> None:
        (self._folder(folder, subfolder) / name).unlink(missing_ok=True)

    def names(self, folder: str, subfolder: str) -> list[str]:
        place = self._folder(folder, subfolder)
        if not place.is_dir():
            return []
        return sorted(entry.name for entry in place.iterdir() if entry.is_file())

    def clear(self, folder: str) -> None:
        for path in sorted((self._directory / folder).rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def is_inside(subfolder: str) -> bool:
    """Whether *subfolder* stays in its folder."""
    plain = posixpath.normpath(posixpath.join("/base", subfolder))
    return plain == "/base" or plain.startswith("/base/")


def split_annotated(name: str, default: str) -> tuple[str, str]:
    """Split `NAME [input]` into the name and its folder (ComfyUI's folder_paths.py)."""
    for folder in FOLDERS:
        mark = f"[{folder}]"
        if name.endswith(mark):
            return name[: -len(mark) - 1], folder
    return name, default


def _plain(subfolder: str) -> str:
    plain = posixpath.normpath(subfolder)
    return "" if plain == "." else plain
