"""What is special about a server's entry: its URL, its headers and the secrets in them."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

from comfyd.config import values
from comfyd.config.document import Mapping as MappingNode
from comfyd.config.document import Node
from comfyd.config.values import (
    Context,
    Failed,
    Refused,
    Secrets,
    attempt,
    child,
    mapping_of,
    text,
)

MAX_SECRET_BYTES: Final = 16_384  # header lines over 8 to 16 KiB are refused by most servers
_UNIT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.\\-]*(?:@[A-Za-z0-9:_.\\-]*)?\.service")
_UNIT_MAX: Final = 255  # systemd.unit(5)
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
# The HTTP and WebSocket libraries set these; an Origin makes ComfyUI answer 403 (its server.py).
_OURS: Final = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "origin", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)


# A configuration file is shown to colleagues, and kept in version control. In a header's name, but
# for authors and keywords:
_SECRET: Final = re.compile(
    r"auth(?!or(?!i[sz]))|bearer|cookie|credential|key(?!word)|passw|secret|token", re.IGNORECASE
)


class Secret:
    """A text that must not be shown. Printing, formatting or logging it gives ``***``.

    Attributes:
      file: Where it was read; None if nowhere. Two secrets of one text are equal all the same.

    """

    __slots__ = ("_value", "file")

    def __init__(self, value: str, file: Path | None = None) -> None:
        self._value = value
        self.file = file

    def reveal(self) -> str:
        """The text itself; call this only where it goes over the wire."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


# Stands for one that was not read: to be sent by nobody.
UNREAD: Final = Secret("unread")


def host_of(url: str) -> str:
    """The host of a URL that was checked, without brackets."""
    return urlsplit(url).hostname or ""


def is_loopback(host: str) -> bool:
    """Whether *host* is this machine, without asking a resolver."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def url(node: Node, path: str, ctx: Context) -> str:
    """An http or https address, without credentials, query, fragment or trailing slash."""
    value = text(node, path, ctx)
    wanted = "must be an address such as http://127.0.0.1:8188"
    if not value.isascii() or not re.fullmatch(r"[^\s\\]+", value):
        raise Refused(f"{wanted}, without spaces or letters outside ASCII", node)
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Refused(wanted, node) from None  # its text may quote a password
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise Refused(wanted, node)
    if "@" in parts.netloc:
        raise Refused("must not hold credentials; put them in headers, from a file", node)
    if "?" in value or "#" in value:
        raise Refused("must not have a query or a fragment", node)
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def unit(node: Node, path: str, ctx: Context) -> str:
    """The name of a systemd service; nothing that a command could take for an option."""
    value = text(node, path, ctx)
    if not _UNIT.fullmatch(value) or len(value) > _UNIT_MAX:
        raise Refused("must be the name of a systemd service, such as comfyui.service", node)
    return value


def window(node: Node, path: str, ctx: Context) -> int | None:
    """``auto`` (None) or a number of prompts."""
    try:
        if text(node, path, ctx) == "auto":
            return None
    except Refused:
        return values.integer(1, 1000)(node, path, ctx)
    raise Refused("must be auto or a whole number from 1 to 1000", node)


def headers(node: Node, path: str, ctx: Context) -> Mapping[str, Secret]:
    """Header names with a text, ``{file: PATH}`` or ``{credential: NAME}`` each."""
    found: dict[str, Secret] = {}
    mapping = mapping_of(node, "header names to values")
    for name, value_node in mapping.values.items():
        here = child(path, name)
        if not _HEADER_NAME.fullmatch(name) or name.lower().startswith("sec-websocket-"):
            ctx.report(here, "is not a header that can be set", mapping.keys[name])
        elif name.lower() in _OURS:
            ctx.report(here, "is set by comfyd itself", mapping.keys[name])
        elif name.lower() in {other.lower() for other in found}:
            ctx.report(here, "is given twice; header names ignore case", mapping.keys[name])
        else:
            if _SECRET.search(name) and not isinstance(value_node, MappingNode):
                problem = (
                    "is a secret: say {file: PATH} or {credential: NAME}, not the secret itself"
                )
                ctx.report(here, problem, value_node)
                continue
            secret = attempt(_header_value, value_node, here, ctx)
            if not isinstance(secret, Failed):
                found[name] = secret
    return MappingProxyType(found)


def _header_value(node: Node, path: str, ctx: Context) -> Secret:
    place: Path | None = None
    if isinstance(node, MappingNode):
        [(kind, source)] = node.values.items() if len(node.values) == 1 else [("", node)]
        if kind == "file":
            place = values.folder(source, path, ctx)
        elif kind == "credential":
            place = _credential(source, path, ctx)
        else:
            raise Refused("must be a text, {file: PATH} or {credential: NAME}", node)
        if place is None or ctx.secrets is Secrets.NONE:
            return UNREAD
        value = _read_secret(place, source)
    else:
        value = text(node, path, ctx)
    if not _HEADER_VALUE.fullmatch(value):
        raise Refused("must be printable ASCII, without blanks around it, not empty", node)
    return Secret(value, place)


def _credential(node: Node, path: str, ctx: Context) -> Path | None:
    """Where systemd has put it; None if it has not, and need not have."""
    name = text(node, path, ctx)
    if "/" in name or name in (".", ".."):
        raise Refused("must be a credential's name, not a path", node)
    directory = ctx.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        if ctx.secrets is not Secrets.ALL:
            return None
        raise Refused(
            "needs systemd: set LoadCredential= in the unit, or use {file: PATH}"
            " (CREDENTIALS_DIRECTORY is not set)",
            node,
        )
    return Path(directory) / name


def _read_secret(path: Path, node: Node) -> str:
    """The file's text without its last line break. Opening a FIFO must not wait for a writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refused(f"{path} is not a regular file", node)
            data = file.read(MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a possible path"
        raise Refused(f"cannot read {path}: {reason}", node) from None
    if len(data) > MAX_SECRET_BYTES:
        raise Refused(f"{path} is larger than {MAX_SECRET_BYTES} bytes", node)
    return data.decode("latin-1").removesuffix("\n").removesuffix("\r")
