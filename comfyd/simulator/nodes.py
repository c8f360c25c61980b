"""What a node class is, and what it may ask of the execution it is part of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from comfyd.simulator.files import Files

Values = dict[str, Any]
InputSpec = list[Any]


def choices_of(spec: InputSpec) -> list[str] | None:
    """The values that an input may have; None if it is no list of choices."""
    # A COMBO with `options`, the newer way to write it, is not checked by ComfyUI 0.3.64.
    return spec[0] if isinstance(spec[0], list) else None


def without_choices(spec: InputSpec, gone: frozenset[str]) -> InputSpec:
    """*spec* without those of *gone* among its choices."""
    choices = choices_of(spec)
    if choices is None:
        return spec
    return [[choice for choice in choices if choice not in gone], *spec[1:]]


class NodeError(Exception):
    """A node raised; *kind* is the exception's name as ComfyUI would report it."""

    def __init__(self, message: str, kind: str = "RuntimeError") -> None:
        super().__init__(message)
        self.kind = kind


class ServerCrashError(Exception):
    """A node took the whole server down."""


@dataclass(frozen=True, slots=True)
class Image:
    """A batch of equal pictures of one colour."""

    width_px: int
    height_px: int
    frames: int
    rgb: tuple[int, int, int]

    def __str__(self) -> str:
        return f"tensor({self.frames}x{self.height_px}x{self.width_px}, {self.rgb})"


@dataclass(frozen=True, slots=True)
class Sound:
    """Silence of some length."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Latent:
    """A batch of latent pictures, all zero; sides in latent pixels."""

    width: int
    height: int
    batch: int


@dataclass(frozen=True, slots=True)
class Video:
    """Pictures at a pace."""

    images: Image
    fps: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a node returned: its output slots, and its ui dict if it has one."""

    slots: tuple[Any, ...] = ()
    ui: dict[str, list[Any]] = field(default_factory=dict)


class Run(Protocol):
    """What a node may ask of the execution it is part of."""

    files: Files
    prompt: dict[str, Any]
    extra_pnginfo: dict[str, Any] | None
    temp_tag: str

    async def sleep(self, seconds: float) -> None:
        """Wait; an interrupt ends the wait early, and the next tick raises."""

    def tick(self, value: int, total: int, preview: bytes | None) -> None:
        """Report progress; raises if the prompt was interrupted."""


@dataclass(frozen=True, slots=True)
class NodeClass:
    """One class of nodes.

    Attributes:
      changed: What the cache key must contain besides the inputs, e.g. a file's hash.
      check: A sentence if the inputs are wrong in a way that the specs cannot say, else None; it
        replaces the check of the input named *checked*.

    """

    name: str
    required: dict[str, InputSpec]
    run: Callable[[Run, Values], Awaitable[Result]]
    optional: dict[str, InputSpec] = field(default_factory=dict)
    returns: tuple[str, ...] = ()
    is_output: bool = False
    changed: Callable[[Files, Values], str] | None = None
    check: Callable[[Files, Values], str | None] | None = None
    checked: str = ""
    category: str = "image"

    def info(self) -> dict[str, Any]:
        """As GET /object_info/{class} shows it."""
        inputs: dict[str, dict[str, Any]] = {"required": self.required}
        if self.optional:
            inputs["optional"] = self.optional
        return {
            "input": inputs,
            "input_order": {key: list(specs) for key, specs in inputs.items()},
            "output": list(self.returns),
            "output_is_list": [False] * len(self.returns),
            "output_name": list(self.returns),
            "name": self.name,
            "display_name": self.name,
            "description": "",
            "python_module": "nodes",
            "category": self.category,
            "output_node": self.is_output,
        }
