"""What the boards ask Prometheus for, read off their JSON as Grafana would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

FOLDER: Final = Path(__file__).parents[2] / "grafana" / "dashboards"

# By board and title, what has no data even while everything goes wrong, and why that is right.
RIGHTLY_EMPTY: Final[dict[tuple[str, str], str]] = {}

_SPANS: Final = {"__rate_interval": "20s", "__interval": "5s", "__range": "10m"}
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")


class Query(NamedTuple):
    board: str
    title: str
    expr: str


def boards() -> list[dict[str, Any]]:
    """Every board there is."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def queries(board: dict[str, Any]) -> Iterator[Query]:
    """Those of *board*'s panels, in rows too, and of its annotations."""
    panels = list(board.get("panels", ()))
    while panels:
        panel = panels.pop(0)
        panels[:0] = panel.get("panels", ())
        for target in panel.get("targets", ()):
            yield Query(board["title"], panel["title"], target["expr"])
    for mark in board.get("annotations", {}).get("list", ()):
        if "expr" in mark:
            yield Query(board["title"], f"annotation: {mark['name']}", mark["expr"])


def asked(expr: str) -> str:
    """*expr* with every variable filled in: all daemons, all servers."""
    return _VARIABLE.sub(lambda found: _SPANS.get(found[1] or found[2], ".+"), expr)


def is_data(series: list[dict[str, Any]]) -> bool:
    """Whether an answer to a range query has anything to draw."""
    return any(value != "NaN" for one in series for _, value in one["values"])
