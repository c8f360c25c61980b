"""What the run did and saw, as it happens, and as a page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

WIDTH: Final = 160
LINES: Final = 12  # of one command's output


class Transcript:
    """Prints as it goes; keeps the lines, with the seconds since the start, for the page."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._lines: list[str] = []

    def step(self, title: str) -> None:
        self._put("")
        self._put(f"[{self.seconds():5.1f} s] == {title}")

    def command(self, command: str) -> None:
        first, *more = command.splitlines()
        self._put(f"# {first}")
        for line in more:
            self._put(line)

    def output(self, text: str) -> None:
        lines = text.rstrip().splitlines()
        for line in lines[:LINES]:
            self._put(f"  {line if len(line) <= WIDTH else line[:WIDTH] + ' ...'}".rstrip())
        if len(lines) > LINES:
            self._put(f"  ... ({len(lines) - LINES} more lines)")

    def holds(self, what: str) -> None:
        self._put(f"  ok: {what}")

    def note(self, text: str) -> None:
        self._put(f"  -- {text}")

    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    def _put(self, line: str) -> None:
        self._lines.append(line)
        print(line, flush=True)

    def write(self, page: Path, head: str) -> None:
        body = "\n".join(self._lines).strip()
        page.write_text(f"{head}\n```text\n{body}\n```\n", encoding="utf-8")
