"""Readers: one located YAML value -> one typed setting, or a problem and what would be right."""

from __future__ import annotations

import enum
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final, TypeVar, final

from comfyd.config import document
from comfyd.config.document import Node, Scalar
from comfyd.errors import ConfigError

T = TypeVar("T")

MAX_BYTES: Final = 2**63 - 1
_DURATION_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MAX_DURATION_S: Final = 3650 * 86400.0  # ten years; beyond that it is a slip of the pen
_SIZE_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_QUANTITY: Final = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)")
_INTEGER: Final = re.compile(r"0|[1-9][0-9]{0,18}")


class Secrets(enum.Enum):
    """Which of the files that a configuration names are read: secrets, certificates.

    Only what uses them may need them: others may not even be allowed to read them.
    """

    ALL = "all"  # what the daemon does
    REACHABLE = "reachable"  # all but systemd's credentials, where systemd has not put them
    NONE = "none"


@dataclass(slots=True)
class Context:
    """What readers share: where the file is, and the problems found so far.

    Attributes:
      file: Name of the file, for messages; None if there is none.
      base: Absolute folder that relative paths start from.
      environ: Where ``CREDENTIALS_DIRECTORY`` is looked up.
      secrets: What is read besides the file itself.

    """

    file: Path | None
    base: Path
    environ: Mapping[str, str]
    problems: list[ConfigError]
    secrets: Secrets = Secrets.ALL

    def report(self, path: str, problem: str, at: Node) -> None:
        """Note that *path* is wrong; reading goes on, to find all problems in one run."""
        self.problems.append(ConfigError(path, problem, file=self.file, line=at.line, col=at.col))


class Refused(Exception):
    """A reader cannot use its value."""

    def __init__(self, problem: str, at: Node) -> None:
        super().__init__(problem)
        self.problem = problem
        self.at = at


class Reported(Exception):
    """A value is of no use, and why has been reported already."""


# A reader: the value, its dotted path, the context. It may report problems inside the value itself;
# it raises Refused or Reported when there is nothing to return.
Reader = Callable[[Node, str, Context], T]


def child(path: str, key: str) -> str:
    """Dotted path of *key* under *path*; keys that would read as a path are quoted."""
    shown = key if re.fullmatch(r"[\w-]{1,80}", key) else repr(key[:80])
    return f"{path}.{shown}" if path else shown


def _scalar(node: Node, wanted: str, *kinds: str) -> str:
    if not isinstance(node, Scalar) or node.kind not in kinds:
        got = node.kind if not isinstance(node, Scalar) or not node.text else repr(node.text[:80])
        raise Refused(f"must be {wanted}, not {got}", node)
    return node.text


def text(node: Node, path: str, ctx: Context) -> str:
    """Printable text; what YAML takes for a number, boolean or date must be quoted."""
    if isinstance(node, Scalar) and node.kind not in ("text", "nothing"):
        raise Refused(f"must be text, not {node.kind}; put it in quotes", node)
    value = _scalar(node, "text", "text")
    if not value or not value.isprintable():
        raise Refused("must be printable text, not empty", node)
    return value


def boolean(node: Node, path: str, ctx: Context) -> bool:
    """``true`` or ``false``."""
    value = _scalar(node, "true or false", "a boolean")
    if value not in ("true", "false"):  # YAML 1.1 takes yes, on and more for booleans
        raise Refused(f"must be true or false, not {value!r}", node)
    return value == "true"


def duration(node: Node, path: str, ctx: Context) -> float:
    """A time such as ``500ms``, ``15s``, ``5m``, ``2h`` or ``30d``, as seconds above zero."""
    wanted = "a time such as 500ms, 15s, 5m, 2h or 30d"
    value = _scalar(node, wanted, "text", "a number")
    found_s = seconds_of(value)
    if found_s is None:
        raise Refused(f"must be {wanted}, not {value[:80]!r}", node)
    if not 0.001 <= found_s <= MAX_DURATION_S:
        raise Refused(f"must be between 1ms and 3650d, not {value[:80]!r}", node)
    return found_s


def seconds_of(text: str) -> float | None:
    """The seconds that *text* such as ``1.5h`` stands for, from 0; None if it is no time."""
    match = _QUANTITY.fullmatch(text)
    unit_s = _DURATION_UNITS_S.get(match[2]) if match else None
    return None if match is None or unit_s is None else float(match[1]) * unit_s


def size(minimum: int = 1) -> Reader[int]:
    """A reader of sizes such as ``16MiB``, ``500kB`` or a plain number of bytes."""
    wanted = "a size such as 16MiB, 4GiB, 500kB or a number of bytes"

    def read(node: Node, path: str, ctx: Context) -> int:
        value = _scalar(node, wanted, "text", "a number")
        match = _QUANTITY.fullmatch(value)
        factor = _SIZE_UNITS.get(match[2] or "B") if match else None
        if match is None or factor is None or ("." in match[1] and factor == 1):
            raise Refused(f"must be {wanted}, not {value[:80]!r}", node)
        count = int(Decimal(match[1]) * factor)
        if not minimum <= count <= MAX_BYTES:
            raise Refused(f"must be at least {minimum} and below 2^63 bytes, not {value!r}", node)
        return count

    return read


def integer(minimum: int, maximum: int) -> Reader[int]:
    """A reader of whole numbers from *minimum* to *maximum*, both included."""
    wanted = f"a whole number from {minimum} to {maximum}"

    def read(node: Node, path: str, ctx: Context) -> int:
        value = _scalar(node, wanted, "a number")
        if not _INTEGER.fullmatch(value) or not minimum <= int(value) <= maximum:
            raise Refused(f"must be {wanted}, not {value[:80]!r}", node)
        return int(value)

    return read


def choice(*words: str) -> Reader[str]:
    """A reader of one of *words*."""
    wanted = f"one of {', '.join(words)}"

    def read(node: Node, path: str, ctx: Context) -> str:
        value = _scalar(node, wanted, "text")
        if value not in words:
            raise Refused(f"must be {wanted}, not {value[:80]!r}", node)
        return value

    return read


def optional(reader: Reader[T]) -> Reader[T | None]:
    """*reader*, or None for null."""

    def read(node: Node, path: str, ctx: Context) -> T | None:
        return None if document.is_null(node) else reader(node, path, ctx)

    return read


def folder(node: Node, path: str, ctx: Context) -> Path:
    """A path, absolute or relative to the configuration file."""
    value = text(node, path, ctx)
    if value.startswith("~"):
        raise Refused("must be written out: ~ is not expanded", node)
    return ctx.base / value


def existing_file(node: Node, path: str, ctx: Context) -> Path:
    """As ``folder``, and a file is there."""
    value = folder(node, path, ctx)
    if ctx.secrets is not Secrets.NONE and not value.is_file():
        raise Refused(f"must name a file that exists, not {value}", node)
    return value


def authorities(node: Node, path: str, ctx: Context) -> Path:
    """As ``existing_file``, with certificates of authorities to trust in it (PEM)."""
    value = existing_file(node, path, ctx)
    if ctx.secrets is not Secrets.NONE:
        try:
            ssl.create_default_context(cafile=value)
        except (OSError, ssl.SSLError) as error:
            problem = f"holds no usable certificates (PEM): {error.strerror or error}"
            raise Refused(problem, node) from None
    return value


def mapping_of(node: Node, what: str) -> document.Mapping:
    """*node* as a mapping.

    Raises:
      Refused: It is none.

    """
    if not isinstance(node, document.Mapping):
        raise Refused(f"must be a mapping of {what}, not {node.kind}", node)
    return node


@final
class Failed:
    """Stands for a value that was reported as wrong."""


def attempt(reader: Reader[T], node: Node, path: str, ctx: Context) -> T | Failed:
    """Read *node*; a refusal is reported and becomes ``Failed``."""
    try:
        return reader(node, path, ctx)
    except Refused as refused:
        ctx.report(path, refused.problem, refused.at)
    except Reported:
        pass
    return Failed()
