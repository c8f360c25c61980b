"""The commands of docs/install.md, read from the page: what is told there is what is tried."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "install.md"


def commands(heading: str, number: int = 0) -> list[str]:
    """The commands of a console block under *heading*; a here-document is one with its command."""
    page = PAGE.read_text(encoding="utf-8")
    section = re.split(r"^## ", page.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    block = re.findall(r"^```console\n(.*?)^```$", section, re.M | re.S)[number]
    found: list[str] = []
    inside = False
    for line in block.splitlines():
        if inside:
            found[-1] += f"\n{line}"
            inside = line != "END"
        else:
            found.append(line)
            inside = "<<'END'" in line
    return found
