"""Workflows for the tests: cheap, and no two alike, so that no cache answers for the server."""

from __future__ import annotations

from typing import Any

Graph = dict[str, Any]


def node(class_type: str, **inputs: object) -> Graph:
    return {"class_type": class_type, "inputs": inputs}


def picture(number: int, *, side_px: int = 8) -> Graph:
    """One picture in a colour of its own."""
    return {
        "1": node(
            "EmptyImage", width=side_px, height=side_px, batch_size=1, color=number % (1 << 24)
        ),
        "9": node("SaveImage", images=["1", 0], filename_prefix="test"),
    }
