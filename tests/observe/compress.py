"""The alert rules in fast motion: the same expressions, with every span of time cut down."""

from __future__ import annotations

import re
from typing import Any, Final

_UNITS_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SPAN: Final = r"(?:\d+(?:ms|[smhd]))+"
# `[5m]` and `offset 5m`; a number that is compared with seconds is no span, and stays.
_IN_QUERY: Final = re.compile(rf"(?<=\[){_SPAN}(?=\])|(?<=\boffset ){_SPAN}\b")


def milliseconds(span: str) -> int:
    """A span as Prometheus writes it, such as ``1h30m``.

    Raises:
      ValueError: It is none.

    """
    if not re.fullmatch(_SPAN, span):
        raise ValueError(f"{span!r} is no span of time")
    return sum(int(n) * _UNITS_MS[unit] for n, unit in re.findall(r"(\d+)(ms|[smhd])", span))


def shorter(span: str, factor: int) -> str:
    """*span*, *factor* times shorter.

    Raises:
      ValueError: It is no span, or nothing would be left of it.

    """
    left_ms = milliseconds(span) // factor
    if milliseconds(span) and not left_ms:
        raise ValueError(f"{span!r} is too short to be cut down by {factor}")
    return f"{left_ms}ms"


def compressed(rules: dict[str, Any], factor: int) -> dict[str, Any]:
    """*rules*, a rules file as read, *factor* times faster: ``for``, ranges, offsets, intervals.

    Args:
      factor: 1 or more.

    """

    def rule(one: dict[str, Any]) -> dict[str, Any]:
        expr = _IN_QUERY.sub(lambda span: shorter(span[0], factor), one["expr"])
        wait = {"for": shorter(one["for"], factor)} if "for" in one else {}
        return {**one, "expr": expr, **wait}

    def group(one: dict[str, Any]) -> dict[str, Any]:
        pace = {"interval": shorter(one["interval"], factor)} if "interval" in one else {}
        return {**one, **pace, "rules": [rule(each) for each in one["rules"]]}

    return {**rules, "groups": [group(each) for each in rules["groups"]]}
