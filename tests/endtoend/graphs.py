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


def slow(number: int, seconds: float) -> Graph:
    """One picture that takes its time."""
    return {
        **picture(number),
        "2": node("SimSleep", image=["1", 0], seconds=seconds, preview=False),
        "9": node("SaveImage", images=["2", 0], filename_prefix="slow"),
    }


def failing(number: int) -> Graph:
    """Passes validation; the blur raises, for its radius is larger than the picture."""
    return {
        **picture(number),
        "2": node("ImageBlur", image=["1", 0], blur_radius=31, sigma=1.0),
        "9": node("SaveImage", images=["2", 0], filename_prefix="failing"),
    }


def partial(number: int) -> Graph:
    """Two outputs, one of which fails validation."""
    return {
        **picture(number),
        "2": node("EmptyImage", width=8, height=8, batch_size=1, color=-1),
        "8": node("SaveImage", images=["2", 0], filename_prefix="partial"),
    }


def mixed(number: int) -> Graph:
    """Two pictures, an animated WEBP and a text."""
    return {
        "1": node("EmptyImage", width=8, height=8, batch_size=2, color=number),
        "9": node("SaveImage", images=["1", 0], filename_prefix="mixed"),
        "10": node(
            "SaveAnimatedWEBP",
            images=["1", 0],
            filename_prefix="mixed",
            fps=6.0,
            lossless=True,
            quality=80,
            method="default",
        ),
        "12": node("PreviewAny", source=f"text {number}"),
    }
