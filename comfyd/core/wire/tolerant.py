"""JSON as ComfyUI really sends it: strict where possible, repaired where not.

Python's ``json`` writes bare ``NaN`` and ``Infinity``, lone surrogates and integers of any size;
custom nodes put all of these into messages and records. msgspec is right to refuse them; ``repair``
turns such a document into one it accepts.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# Beyond this, text is no answer to a question but a burden on whoever must read or store it.
MAX_LINE_CHARS = 2000


class Malformed(ValueError):
    """The input is not JSON, or not of the shape asked for. Its text is fit for people."""


def decode(
    source: bytes | str, decoder: msgspec.json.Decoder[T], *, lax: bool = True
) -> tuple[T, int]:
    """Decode *source*, repairing it first if need be (and if *lax*).

    Returns:
      The value, and how many numbers had to become null (NaN, infinities).

    Raises:
      Malformed: Not JSON, nested too deeply, or not what *decoder* expects.

    """
    try:
        return decoder.decode(source), 0
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        if not lax:
            raise Malformed(line(str(error), 200)) from None
    try:
        repaired, nulled = repair(source)
        return decoder.decode(repaired), nulled
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise Malformed(line(str(error), 200) or "not JSON") from None


def repair(source: bytes | str) -> tuple[bytes, int]:
    """Rewrite lax JSON as strict JSON; non-finite numbers become null and are counted.

    Raises:
      ValueError: Not even lax JSON.
      RecursionError: Nested too deeply.

    """
    text = source if isinstance(source, str) else source.decode("utf-8", "replace")
    nulled = 0

    def clean(value: Any) -> Any:
        nonlocal nulled
        if isinstance(value, str):
            return plain(value)
        if isinstance(value, float) and not math.isfinite(value):
            nulled += 1
            return None
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            return clean(float(value)) if abs(value) < 10**300 else clean(math.inf)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {plain(key): clean(item) for key, item in value.items()}
        return value

    return msgspec.json.encode(clean(json.loads(text))), nulled


def plain(text: str) -> str:
    """*text* without lone surrogates, which no encoder accepts."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def line(text: str, limit: int = MAX_LINE_CHARS) -> str:
    """*text* on one printable line of at most *limit* characters."""
    # The slice comes first: hostile text may be megabytes long.
    words = "".join(c if c.isprintable() else " " for c in text[: limit * 4]).split()
    joined = " ".join(words)
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"
