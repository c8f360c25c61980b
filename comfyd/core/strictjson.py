"""JSON that a person or a program dropped: only what every reader would understand alike.

Not for what servers send; that is repaired instead (see ``wire.tolerant``).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

from comfyd.errors import JobFileError

MAX_DEPTH: Final = 200  # ComfyUI's own json module gives up at about 1000
MAX_INT_DIGITS: Final = 300  # more than any node takes; Python itself refuses more than 4300

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def quoted(text: str, limit: int = 60) -> str:
    """*text* in quotes for a sentence: one line, printable, *limit* characters at most."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return '"' + "".join(c if c.isprintable() else "�" for c in short) + '"'


def text_of(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
      JobFileError: Empty, UTF-16 or UTF-32, or not UTF-8.

    """
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"} or b"\0" in data[:4]:
        raise JobFileError("The file is UTF-16 or UTF-32 text (or binary); save it as UTF-8.")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobFileError(f"Line {line} is not UTF-8 text; save the file as UTF-8.") from None
    if not text or text.isspace():
        raise JobFileError("The file is empty.")
    return text


def parse_json(data: bytes) -> Any:
    """Parse strict JSON: what any other reader would agree on.

    Raises:
      JobFileError: Not UTF-8, not JSON, NaN or Infinity, nested deeper than MAX_DEPTH, an integer
        of more than MAX_INT_DIGITS digits, half a surrogate pair, or a key given twice.

    """
    text = text_of(data)
    if _too_deep(data):
        raise JobFileError(f"The file is nested deeper than {MAX_DEPTH} levels.")
    try:
        value = json.loads(
            text,
            parse_int=parse_int,
            parse_float=parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise JobFileError(f"The file is not valid JSON: {error.msg} at {where}.") from None
    if _SURROGATE.search(text):
        check_encodable(value)
    return value


def parse_int(digits: str, *, base: int = 10) -> int:
    """An integer of MAX_INT_DIGITS at most; *base* as for ``int``."""
    if len(digits) > MAX_INT_DIGITS:
        raise JobFileError(f"The file holds an integer of more than {MAX_INT_DIGITS} digits.")
    return int(digits, base)


def parse_float(digits: str) -> float:
    """A JSON number that is finite once read."""
    value = float(digits)
    if not math.isfinite(value):
        raise JobFileError(f"The number {quoted(digits, 30)} is too large to be read exactly.")
    return value


def check_encodable(value: Any) -> None:
    """Refuse halves of surrogate pairs anywhere in *value*: nothing could send them on."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JobFileError(
            "The file holds half of a surrogate pair (such as \\ud800), which is no character."
        ) from None


def _too_deep(data: bytes) -> bool:
    """Whether the brackets outside strings nest too deeply for a recursive parser."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, _NOT_BRACKETS):
        if bracket == 0x5B or bracket == 0x7B:  # [ {
            depth += 1
            if depth > MAX_DEPTH:
                return True
        else:
            depth -= 1
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise JobFileError(f"The file holds {name}, which is not a JSON number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JobFileError(f"The key {quoted(key)} is given twice in one object.")
            seen.add(key)
    return value
