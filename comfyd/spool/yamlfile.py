"""YAML job files as JSON values: the part of YAML that means the same to everyone.

Plain words follow the YAML 1.2 core schema, so ``no`` and ``2024-01-01`` are text; aliases, anchors
and tags are refused. The parser's events are walked with a stack of our own: no depth can crash it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from comfyd.core.strictjson import (
    MAX_DEPTH,
    check_encodable,
    parse_float,
    parse_int,
    quoted,
    text_of,
)
from comfyd.errors import JobFileError

# PyYAML takes seconds for a megabyte where libyaml is missing; generated graphs can be JSON.
MAX_BYTES: Final = 2 * 1024 * 1024

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_BASED = re.compile(r"0(?:x[0-9a-fA-F]+|o[0-7]+)")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class _Open:
    """A list or mapping whose end has not come yet."""

    def __init__(self, value: list[Any] | dict[str, Any]) -> None:
        self.value = value
        self.key: str | None = None

    def add(self, item: Any, line: int) -> None:
        if isinstance(self.value, list):
            self.value.append(item)
            return
        if self.key is not None:
            self.value[self.key] = item
            self.key = None
        else:
            if not isinstance(item, str):
                raise JobFileError(
                    f"The key on line {line} is not text; put it in quotes, as in "
                    f'"{item if isinstance(item, int | float) else "3"}".'
                )
            if item in self.value:
                raise JobFileError(f"The key {quoted(item)} is given again on line {line}.")
            self.key = item


def parse(data: bytes) -> Any:
    """Parse one YAML document.

    Raises:
      JobFileError: Not UTF-8, larger than MAX_BYTES, not YAML, or more of YAML than we take.

    """
    if len(data) > MAX_BYTES:
        raise JobFileError(
            f"A YAML job file may have {MAX_BYTES // 1024**2} MiB at most; write it as JSON."
        )
    text = text_of(data)
    try:
        value = _build(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise JobFileError(f"The file is not valid YAML: {error.problem}{where}.") from None
    except yaml.YAMLError as error:
        raise JobFileError(f"The file is not valid YAML: {_first_line(error)}.") from None
    check_encodable(value)
    return value


def _build(text: str) -> Any:
    roots: list[Any] = []
    stack = [_Open(roots)]
    documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        match event:
            case yaml.DocumentStartEvent():
                documents += 1
                if documents > 1:
                    raise JobFileError(f"A second YAML document starts on line {line}; drop one.")
            case yaml.AliasEvent():
                raise JobFileError(
                    f"Line {line} uses a YAML alias (*{event.anchor}); write it out."
                )
            case yaml.ScalarEvent():
                _check_plain(event, line)
                plain = event.implicit[0] and not event.style  # libyaml says "", PyYAML None
                stack[-1].add(_scalar(event.value, line) if plain else event.value, line)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                _check_plain(event, line)
                if len(stack) > MAX_DEPTH:
                    raise JobFileError(f"The file is nested deeper than {MAX_DEPTH} levels.")
                value: list[Any] | dict[str, Any] = (
                    [] if isinstance(event, yaml.SequenceStartEvent) else {}
                )
                stack[-1].add(value, line)
                stack.append(_Open(value))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                stack.pop()
            case _:
                pass  # the stream's and the document's other ends
    if not documents:
        raise JobFileError("The file is empty.")
    return roots[0]


def _check_plain(
    event: yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent, line: int
) -> None:
    if event.anchor is not None:
        raise JobFileError(f"Line {line} has a YAML anchor (&{event.anchor}); remove it.")
    if event.tag is not None:
        raise JobFileError(f"Line {line} has the YAML tag {quoted(event.tag)}; remove it.")


def _scalar(word: str, line: int) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if _INT.fullmatch(word):
        return parse_int(word)
    if _FLOAT.fullmatch(word):
        return parse_float(word)
    if _BASED.fullmatch(word):
        return parse_int(word, base=0)
    if _NOT_FINITE.fullmatch(word):
        raise JobFileError(f"Line {line} holds {word}, which is not a finite number.")
    return word


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
