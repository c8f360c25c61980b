"""How a YAML mapping becomes a frozen dataclass: the fields say what is read, and by what."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from comfyd.config import values
from comfyd.config.document import Mapping as MappingNode
from comfyd.config.document import Node, is_null
from comfyd.config.values import Context, Failed, Reader, Reported, attempt, child

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_MANY: Final = 100  # tries of anything; more is a loop, not a policy


@runtime_checkable
class _Cautious(Protocol):
    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together, as (key, problem)."""


def setting(
    reader: Reader[Any], default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING
) -> Any:
    """A field that *reader* reads; required if it has neither *default* nor *factory*."""
    return dataclasses.field(default=default, default_factory=factory, metadata={"reader": reader})


def seconds(default: float) -> Any:
    """A field for a duration."""
    return setting(values.duration, default)


def tries(default: int) -> Any:
    """A field for a number of attempts, the first one included."""
    return setting(values.integer(1, _MANY), default)


def section(cls: type[DataclassInstance]) -> Any:
    """A field for a whole section; every setting in it has a default."""
    return setting(reader_of(cls), factory=cls)


def reader_of(cls: type[T]) -> Reader[T]:
    """A reader of *cls*; nothing at all means all its defaults."""

    def read(node: Node, path: str, ctx: Context) -> T:
        return read_section(cls, node, path, ctx)

    return read


def read_section(
    cls: type[T], node: Node, path: str, ctx: Context, defaults: Mapping[str, Any] | None = None
) -> T:
    """Read *node* as a *cls*, reporting every problem in it.

    Args:
      defaults: Values, by field, for required settings that may be missing all the same.

    Raises:
      Refused: It is no mapping.
      Reported: A setting was reported as wrong or missing, so there is nothing to return.

    """
    mapping = MappingNode(node.line, node.col)
    if not is_null(node):
        mapping = values.mapping_of(node, "settings")
    fields = {field.name.removesuffix("_s"): field for field in dataclasses.fields(cls)}
    found = dict(defaults or {})
    before = len(ctx.problems)
    for key, value_node in mapping.values.items():
        if key not in fields:
            problem = "is not a setting" + _did_you_mean(key, fields)
            ctx.report(child(path, key), problem, mapping.keys[key])
            continue
        field = fields[key]
        value = attempt(field.metadata["reader"], value_node, child(path, key), ctx)
        if not isinstance(value, Failed):
            found[field.name] = value
    for key, field in fields.items():
        if key not in mapping.values and field.name not in found and _is_required(field):
            ctx.report(child(path, key), "is missing", node)
    if len(ctx.problems) > before:
        raise Reported
    made = cls(**found)
    whole: object = made
    if isinstance(whole, _Cautious):
        for key, problem in whole.conflicts():
            ctx.report(child(path, key), problem, mapping.values.get(key, node))
    return made


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    if close := difflib.get_close_matches(key[:80], known, n=1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}"
