"""How things look: aligned text for pipes, rich tables for terminals, nothing hostile in either.

A table is a value; which of the two it becomes is decided where it is written.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GOOD: Final = frozenset({"ok", "up", "done", "running", "connected", "verified"})
BAD: Final = frozenset({"problem", "down", "wedged", "failed", "cancelled"})
DOUBTFUL: Final = frozenset({"warning", "deaf", "draining", "held", "stale"})

GAP: Final = 2  # between columns
FOLDED: Final = 28  # a sentence can still be read in a column of this width
TINY: Final = 8


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under heads.

    Attributes:
      toned: The column whose cells are words that have a colour.
      spare: Columns that a narrow terminal can do without, the first one first.

    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    toned: str = "STATE"
    spare: Sequence[str] = ()

    def widths(self) -> list[int]:
        """Of each column, in characters."""
        return [max(map(len, column)) for column in zip(self.heads, *self.rows, strict=True)]

    def needs(self, folded: int) -> int:
        """The width it takes with its last column folded to *folded* characters."""
        *fixed, last = self.widths()
        return sum(fixed) + GAP * len(fixed) + min(last, folded)

    def fitted(self, width: int) -> Table:
        """Without as many spare columns as do not fit in *width*; the last column can be folded."""
        table = self
        for head in self.spare:
            if table.needs(FOLDED) <= width:
                break
            at = table.heads.index(head)
            heads, *rows = ([*row[:at], *row[at + 1 :]] for row in (table.heads, *table.rows))
            table = replace(table, heads=heads, rows=rows)
        return table


def plain(value: object) -> str:
    """*value* as one inert line: no control, no direction mark, no half of a character."""
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if c in "\n\t\r" else _shown(c) for c in text)


def _shown(character: str) -> str:
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character)[0] == "C" else character


def span(seconds: float | None) -> str:
    """*seconds* for people: ``0.4 s``, ``42 s``, ``3 min``, ``2 h``, ``5 d``; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.1f} s"
    for unit, size_s, limit in (("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def size(count: int | None) -> str:
    """*count* bytes for people: ``812 B``, ``3.4 KiB``; nothing for None."""
    if count is None:
        return ""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if amount < 1024 or unit == "TiB":
            break
    return f"{amount:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """``1 file``, ``3 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tone(word: str) -> str:
    """The colour of a state, "" for none."""
    if word in GOOD:
        return "green"
    return "red" if word in BAD else "yellow" if word in DOUBTFUL else ""


# --- writing -------------------------------------------------------------------------------------


def say(sentence: str) -> None:
    """Talk: one line on stderr."""
    print(plain(sentence), file=sys.stderr, flush=True)


def put_json(value: Any) -> None:
    """Data for scripts: one line of ASCII JSON, whatever the encoding of the terminal."""
    print(json.dumps(value, allow_nan=False), flush=True)


def put(*parts: str | Table) -> None:
    """Data for people on stdout; lines and tables in turn."""
    if is_terminal(sys.stdout):
        made = console(sys.stdout)
        for part in parts:
            made.print(rendered(part, made.width))
    else:
        for part in parts:
            for line in lines_of(part):
                print(line)
    sys.stdout.flush()


def lines_of(part: str | Table) -> Iterable[str]:
    """*part* as plain text; the columns of a table are aligned."""
    if isinstance(part, str):
        return [plain(part)]
    table = _inert(part)
    widths = table.widths()
    return [
        (" " * GAP).join(map(str.ljust, row, widths)).rstrip() for row in (table.heads, *table.rows)
    ]


def _inert(table: Table) -> Table:
    return replace(table, rows=[[plain(cell) for cell in row] for row in table.rows])


# --- terminals -----------------------------------------------------------------------------------


def is_terminal(stream: TextIO) -> bool:
    """Whether *stream* is a screen that tables and progress make sense on."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def console(stream: TextIO) -> Console:
    """A rich console; NO_COLOR takes its colours, never its tables."""
    from rich.console import Console

    return Console(file=stream, highlight=False, no_color=bool(os.environ.get("NO_COLOR")))


def rendered(part: str | Table, width: int) -> RenderableType:
    """*part* for a rich console of that *width*. Nothing in it is markup."""
    from rich.text import Text

    if isinstance(part, str):
        return Text(plain(part))
    from rich import box
    from rich.table import Table as RichTable

    table = _inert(part).fitted(width)
    if table.needs(TINY) > width:  # the terminal's own line breaks lose nothing
        return Text("\n".join(lines_of(table)), no_wrap=True, overflow="ignore")
    made = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0)
    )
    last = len(table.heads) - 1
    for index, head in enumerate(table.heads):
        made.add_column(Text(head, "bold"), no_wrap=index < last, overflow="fold")
    for row in table.rows:
        cells = [
            Text(cell, tone(cell.partition(" ")[0]) if head == table.toned else "")
            for head, cell in zip(table.heads, row, strict=True)
        ]
        made.add_row(*cells)
    return made
