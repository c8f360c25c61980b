"""YAML text -> a tree that knows where everything stands; nothing is interpreted here.

Built from the parser's flat event stream, so nesting costs no recursion. Aliases, tags, duplicate
keys and keys that are not text are refused: a configuration says each thing once, where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import yaml

from comfyd.errors import ConfigError

MAX_CHARS: Final = 1_000_000  # a thousand servers with their comments fit in a tenth of this
MAX_DEPTH: Final = 16  # the deepest setting is at five

_TYPES: Final = {
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}
_resolver: Final = yaml.resolver.Resolver()  # YAML 1.1's rules, as every PyYAML user knows them


@dataclass(frozen=True, slots=True)
class Scalar:
    """A word or a text. *plain*: written without quotes. Lines and columns are 1-based."""

    text: str
    plain: bool
    line: int
    col: int

    @property
    def kind(self) -> str:
        """What YAML takes it for: text, a boolean, a number, a date or nothing."""
        if not self.plain:
            return "text"
        tag = _resolver.resolve(yaml.ScalarNode, self.text, (True, False))  # type: ignore[no-untyped-call]
        return _TYPES.get(tag, "text")


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list of values."""

    line: int
    col: int
    items: list[Node] = field(default_factory=list)
    kind: str = "a list"


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys with values; ``keys`` holds each key itself, for its place in the file."""

    line: int
    col: int
    values: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Scalar] = field(default_factory=dict)
    kind: str = "a mapping"


Node = Scalar | Sequence | Mapping


def is_null(node: Node) -> bool:
    """Whether *node* is YAML's null: ``null``, ``~`` or nothing at all."""
    return isinstance(node, Scalar) and node.kind == "nothing"


def parse(text: str) -> Node | None:
    """Read one YAML document.

    Returns:
      Its root, or None if there is nothing in it.

    Raises:
      ConfigError: It is no YAML, or uses what a configuration may not; without the file's name.

    """
    if len(text) > MAX_CHARS:
        raise ConfigError("", f"is larger than {MAX_CHARS} characters; is this the right file?")
    try:
        return _build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            "",
            f"is not valid YAML: {error.problem or error.context}",
            line=mark.line + 1 if mark else None,
            col=mark.column + 1 if mark else None,
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            "",
            f"holds a character that YAML does not allow: {text[error.position]!a}",
            line=text.count("\n", 0, error.position) + 1,
            col=error.position - text.rfind("\n", 0, error.position),
        ) from None
    except ValueError:  # PyYAML does int() and chr() on what it finds in directives and escapes
        raise ConfigError("", "is not valid YAML: a number in it is out of range") from None


class _Frame:
    """A list or mapping still being read."""

    def __init__(self, node: Sequence | Mapping, path: str) -> None:
        self.node = node
        self.path = path
        self.key: Scalar | None = None

    def next_path(self) -> str:
        """Dotted path of the value that comes next."""
        if isinstance(self.node, Sequence):
            return f"{self.path}[{len(self.node.items)}]"
        if self.key is None:
            return self.path
        return f"{self.path}.{self.key.text}" if self.path else self.key.text

    def wants_key(self) -> bool:
        return isinstance(self.node, Mapping) and self.key is None

    def add(self, node: Node) -> None:
        if isinstance(self.node, Sequence):
            self.node.items.append(node)
        elif self.key is not None:
            self.node.values[self.key.text] = node
            self.key = None
        else:
            self._add_key(node)

    def _add_key(self, node: Node) -> None:
        if not isinstance(node, Scalar) or node.kind != "text":
            raise _problem(self.path, f"a key must be text, this is {node.kind}", node)
        first = self.node.keys.get(node.text) if isinstance(self.node, Mapping) else None
        self.key = node
        if first is not None:
            problem = f"is given twice, first in line {first.line}"
            raise _problem(self.next_path(), problem, node)
        if isinstance(self.node, Mapping):
            self.node.keys[node.text] = node


def _problem(path: str, problem: str, at: Node) -> ConfigError:
    return ConfigError(path, problem, line=at.line, col=at.col)


def _build(events: Iterator[yaml.Event]) -> Node | None:
    stack: list[_Frame] = []
    root: Node | None = None
    for event in events:
        mark = event.start_mark
        line, col = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        path = stack[-1].next_path() if stack else ""
        node: Node
        match event:
            case yaml.DocumentStartEvent() if root is not None:
                raise ConfigError("", "holds more than one document", line=line, col=col)
            case yaml.AliasEvent():
                problem = "refers to an anchor (*); write the value out"
                raise ConfigError(path, problem, line=line, col=col)
            case yaml.ScalarEvent():
                node = Scalar(event.value, event.implicit[0] and not event.style, line, col)
            case yaml.SequenceStartEvent():
                node = Sequence(line, col)
            case yaml.MappingStartEvent():
                node = Mapping(line, col)
            case yaml.CollectionEndEvent():
                node = stack.pop().node
                if stack:
                    stack[-1].add(node)
                continue
            case _:
                continue
        if event.anchor is not None:
            raise _problem(path, "has an anchor (&); write the value out where it is used", node)
        if event.tag is not None:
            raise _problem(path, "has a tag (!); the type follows from the setting", node)
        if stack and stack[-1].wants_key() and not isinstance(node, Scalar):
            raise _problem(path, f"a key must be text, this is {node.kind}", node)
        root = node if root is None else root
        if not isinstance(node, Scalar):
            if len(stack) == MAX_DEPTH:
                raise _problem("", f"nests deeper than {MAX_DEPTH} levels", node)
            stack.append(_Frame(node, path))
        elif stack:
            stack[-1].add(node)
    return root
