"""What /system_stats says of the server, and whether its version will do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from comfyd.core.wire.tolerant import Malformed, decode, line
from comfyd.errors import ServerProtocol

MIN_VERSION: Final = (0, 3, 57)
"""The first ComfyUI that takes our prompt_id and interrupts by it (pull request #9607)."""

MAX_DEVICES = 64

_VERSION = re.compile(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?!\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    type: str
    index: int | None
    vram_total_bytes: int
    vram_free_bytes: int


@dataclass(frozen=True, slots=True)
class SystemStats:
    """*version* is "" when the server does not say; *version_tuple* None when unreadable."""

    version: str
    version_tuple: tuple[int, int, int] | None
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionVerdict:
    """*refusal*: this server must not be used, and why. *warning*: it may not work. Else good."""

    refusal: str = ""
    warning: str = ""


class _Stats(msgspec.Struct):
    system: dict[str, Any]
    devices: Any = None


_stats = msgspec.json.Decoder(_Stats)


def decode_stats(body: bytes) -> SystemStats:
    """Decode GET /system_stats; odd devices are left out.

    Raises:
      ServerProtocol: Not the answer of a ComfyUI.

    """
    try:
        stats, _ = decode(body, _stats)
    except Malformed as error:
        raise ServerProtocol(f"the answer to GET /system_stats does not decode: {error}") from None
    said = stats.system.get("comfyui_version")
    version = line(said, 64) if isinstance(said, str) else ""
    listed = stats.devices if isinstance(stats.devices, list) else []
    devices = tuple(_device(item) for item in listed[:MAX_DEVICES] if isinstance(item, dict))
    return SystemStats(version, parse_version(version), devices)


def _device(item: dict[str, Any]) -> Device:
    def text(key: str) -> str:
        value = item.get(key)
        return line(value, 128) if isinstance(value, str) else ""

    def count(key: str) -> int:
        value = item.get(key)
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        return value if good and isinstance(value, int) else 0

    index = item.get("index")
    number = index if isinstance(index, int) and not isinstance(index, bool) else None
    return Device(text("name"), text("type"), number, count("vram_total"), count("vram_free"))


def parse_version(version: str) -> tuple[int, int, int] | None:
    """``"0.3.64"``, ``"v0.3.64-2-gabc"`` or ``"0.4"`` as numbers; None if it is no such thing."""
    match = _VERSION.match(version.strip())
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def version_verdict(version: str) -> VersionVerdict:
    """Whether a server that calls itself *version* can be used."""
    needed = ".".join(map(str, MIN_VERSION))
    parsed = parse_version(version)
    if parsed is None:
        shown = f"calls its version {line(version, 64)!r}" if version else "tells no version"
        return VersionVerdict(
            warning=f"the server {shown}; it is used as if it were ComfyUI {needed} or newer"
        )
    if parsed < MIN_VERSION:
        return VersionVerdict(
            refusal=f"ComfyUI {line(version, 64)} is too old: it cannot be told a prompt's id or "
            f"interrupt one prompt alone; update it to {needed} or newer"
        )
    return VersionVerdict()
