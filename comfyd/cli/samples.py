"""Sample jobs for the demo: core nodes only, so that any ComfyUI runs them without a model.

Colours are drawn anew for each demo: a graph that a server has seen would be answered from its
cache, and show nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

SIDE_PX: Final = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """A job file and what must come of it.

    Attributes:
      name: Stem of the job id.
      document: A job document, JSON values.
      images: How many pictures it saves.
      text: What its node ``TEXT_NODE`` must say, "" if it has none.

    """

    name: str
    document: dict[str, Any]
    images: int
    text: str = ""


TEXT_NODE: Final = "12"


def samples(count: int, chance: random.Random) -> list[Sample]:
    """*count* samples, the kinds in turn."""
    return [_KINDS[index % len(_KINDS)](chance) for index in range(count)]


def _node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _empty(chance: random.Random, *, batch_size: int = 1, side_px: int = SIDE_PX) -> dict[str, Any]:
    colour = chance.randrange(1 << 24)
    return _node("EmptyImage", width=side_px, height=side_px, batch_size=batch_size, color=colour)


def _save(source: str, prefix: str) -> dict[str, Any]:
    return _node("SaveImage", images=[source, 0], filename_prefix=prefix)


def _plain(chance: random.Random) -> Sample:
    graph = {"1": _empty(chance), "9": _save("1", "plain")}
    return Sample("plain", {"workflow": graph}, images=1)


def _inverted(chance: random.Random) -> Sample:
    graph = {
        "1": _empty(chance),
        "2": _node("ImageInvert", image=["1", 0]),
        "9": _save("2", "inverted"),
    }
    return Sample("inverted", {"workflow": graph, "metadata": {"demo": True}}, images=1)


def _scaled(chance: random.Random) -> Sample:
    scale = {"upscale_method": "bilinear", "width": 384, "height": 128, "crop": "disabled"}
    graph = {
        "1": _empty(chance),
        "2": _node("ImageScale", image=["1", 0], **scale),
        "9": _save("2", "scaled"),
    }
    return Sample("scaled", {"workflow": graph}, images=1)


def _batch(chance: random.Random) -> Sample:
    graph = {"1": _empty(chance, batch_size=3), "9": _save("1", "batch")}
    return Sample("batch", {"workflow": graph}, images=3)


def _blurred(chance: random.Random) -> Sample:
    graph = {
        "1": _empty(chance, side_px=128),
        "2": _node("ImageBlur", image=["1", 0], blur_radius=5, sigma=2.0),
        "3": _node("ImageBlur", image=["2", 0], blur_radius=9, sigma=3.0),
        "9": _save("3", "blurred"),
    }
    return Sample("blurred", {"workflow": graph, "priority": 1}, images=1)


def _captioned(chance: random.Random) -> Sample:
    text = f"a picture of one colour, number {chance.randrange(1 << 20)}"
    graph = {
        "1": _empty(chance),
        "9": _save("1", "captioned"),
        TEXT_NODE: _node("PreviewAny", source=text),
    }
    return Sample("captioned", {"workflow": graph}, images=1, text=text)


def _twins(chance: random.Random) -> Sample:
    graph = {
        "1": _empty(chance),
        "2": _node("ImageInvert", image=["1", 0]),
        "8": _save("1", "twin"),
        "9": _save("2", "other"),
    }
    return Sample("twins", {"workflow": graph}, images=2)


def _filled(chance: random.Random) -> Sample:
    graph = {"1": _empty(chance), "9": _save("1", "set")}
    colour = chance.randrange(1 << 24)
    return Sample("set", {"workflow": graph, "set": {"1.color": colour}}, images=1)


_KINDS: Final[tuple[Callable[[random.Random], Sample], ...]] = (
    _plain, _inverted, _scaled, _captioned, _batch, _blurred, _twins, _filled,
)  # fmt: skip
