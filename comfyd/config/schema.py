"""Every setting with its type and default: one frozen dataclass a section.

The YAML key is the field's name without the unit suffix ``_s``: ``tracker.deaf_after`` is
``config.tracker.deaf_after_s``. All durations are float seconds above zero, all sizes bytes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from comfyd.config import server as server_values
from comfyd.config import values
from comfyd.config.document import Mapping as MappingNode
from comfyd.config.document import Node, Scalar, Sequence
from comfyd.config.section import read_section, reader_of, seconds, section, setting, tries
from comfyd.config.server import Secret
from comfyd.config.values import Context, Failed, Refused, attempt
from comfyd.config.web import WebConfig, web_config

_RESTART_MIN_S: Final = 180.0  # longer than services.unit waits for one restart
_SERVER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """``tracker``: one server's WebSocket."""

    connect_timeout_s: float = seconds(10.0)
    ping_interval_s: float = seconds(20.0)
    ping_timeout_s: float = seconds(20.0)
    deaf_after_s: float = seconds(5.0)
    reconnect_first_s: float = seconds(0.5)
    reconnect_max_s: float = seconds(30.0)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together, as (key, problem)."""
        if self.reconnect_first_s > self.reconnect_max_s:
            yield "reconnect_first", "must not be longer than reconnect_max"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """``history``: one look at /history/{prompt_id}."""

    timeout_s: float = seconds(15.0)
    attempts: int = tries(3)
    backoff_s: float = seconds(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """``completion``: fetches after one end signal; then the auditor owns the prompt."""

    attempts: int = tries(3)
    backoff_s: float = seconds(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """``audit``: when to look without having been told."""

    interval_s: float = seconds(30.0)
    stale_after_s: float = seconds(300.0)
    orphan_interval_s: float = seconds(2.0)
    lost_grace_s: float = seconds(15.0)
    abandon_after_s: float = seconds(600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """``client``: deadlines of HTTP exchanges; each covers the whole exchange with its body."""

    connect_timeout_s: float = seconds(10.0)
    submit_timeout_s: float = seconds(60.0)
    upload_timeout_s: float = seconds(300.0)
    download_idle_timeout_s: float = seconds(30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """``health``: the periodic probe of a server."""

    interval_s: float = seconds(10.0)
    timeout_s: float = seconds(15.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """``watch``: the spool's new/ folder."""

    settle_s: float = seconds(2.0)
    rescan_s: float = seconds(10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Keep what is within all limits given; None is no limit of that kind."""

    age_s: float | None = setting(values.duration, None)
    count: int | None = setting(values.integer(0, 10**12), None)
    bytes: int | None = setting(values.size(0), None)


def _retention(node: Node, path: str, ctx: Context) -> Retention:
    """``{age: 14d, count: 10000, bytes: 50GiB}``; a duration alone is an age."""
    if not isinstance(node, MappingNode):
        return Retention(age_s=values.duration(node, path, ctx))
    if not node.values:
        raise Refused("must hold at least one of age, count and bytes; or be null", node)
    return read_section(Retention, node, path, ctx)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retentions:
    """``retention``: how long things are kept; None is for ever."""

    done: Retention | None = setting(values.optional(_retention), None)
    failed: Retention | None = setting(values.optional(_retention), None)
    events: Retention | None = setting(values.optional(_retention), Retention(age_s=30 * 86400.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """``jobs``: limits of every job; None is no limit."""

    max_attempts: int = tries(3)
    run_timeout_s: float = seconds(7200.0)
    stall_timeout_s: float = seconds(900.0)
    queue_timeout_s: float | None = setting(values.optional(values.duration), None)
    max_file_bytes: int = setting(values.size(), 16 * 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """``outputs``: what is downloaded, and the disk space it must leave."""

    max_bytes: int = setting(values.size(), 4 * 2**30)
    min_free_bytes: int = setting(values.size(0), 2**30)
    include_temp: bool = setting(values.boolean, False)
    unique_prefix: bool = setting(values.boolean, True)


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on; port 0 lets the system choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _listen(node: Node, path: str, ctx: Context) -> Listen:
    """``host:port``, with an IPv6 address in brackets."""
    wanted = "must be host:port, such as 127.0.0.1:9818 or [::1]:9818"
    # Two numbers with a colon are a base-60 number to YAML 1.1, so any plain word is looked at.
    value = node.text if isinstance(node, Scalar) else values.text(node, path, ctx)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", value)
    if match is None or int(match[3]) > 65535:
        raise Refused(wanted, node)
    try:
        host = str(ipaddress.IPv6Address(match[1])) if match[1] else match[2]
    except ValueError:
        raise Refused(wanted, node) from None
    return Listen(host, int(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """``metrics``: where HTTP is served."""

    listen: Listen = setting(_listen, Listen("127.0.0.1", 9818))
    web_config: WebConfig | None = setting(values.optional(web_config), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """``log``: what is told, and in which form."""

    level: str = setting(values.choice("debug", "info", "warning", "error"), "info")
    format: str = setting(values.choice("auto", "logfmt", "json", "journald", "console"), "auto")


def _server_name(node: Node, path: str, ctx: Context) -> str:
    value = values.text(node, path, ctx)
    if not _SERVER_NAME.fullmatch(value):
        raise Refused("must be 1 to 32 of a-z, 0-9 and -, not starting with -", node)
    return value


def _no_headers() -> Mapping[str, Secret]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One of ``servers``.

    Attributes:
      name: Its label in metrics and logs; unique.
      url: Normalised: lower-case host, no trailing slash; unique.
      window: Prompts kept there at once, 1 to 1000; None is auto.
      headers: Sent with every request.
      ca_file: Trust only the authorities in this file; None is the system's.
      insecure: Plain http to a host that is not loopback was asked for.
      restart_unit: The systemd unit to restart when the server is wedged; None: none.
      restart_interval_s: Not more often than once in so long.

    """

    name: str = setting(_server_name)
    url: str = setting(server_values.url)
    window: int | None = setting(server_values.window, None)
    headers: Mapping[str, Secret] = setting(server_values.headers, factory=_no_headers)
    ca_file: Path | None = setting(values.optional(values.authorities), None)
    insecure: bool = setting(values.boolean, False)
    restart_unit: str | None = setting(values.optional(server_values.unit), None)
    restart_interval_s: float = seconds(1800.0)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together, as (key, problem)."""
        plain = self.url.startswith("http:")
        if plain and not self.insecure and not server_values.is_loopback(self.host):
            yield "url", "sends everything in clear text; use https, or say insecure: true"
        if self.restart_interval_s < _RESTART_MIN_S:
            yield "restart_interval", "must be at least 3m: one restart may take so long"
        if plain and self.ca_file is not None:
            yield "ca_file", "has no effect with http"
        if not plain and self.insecure:
            yield "insecure", "has no effect with https: certificates are always checked"

    @property
    def host(self) -> str:
        """The host of the URL, without brackets."""
        return server_values.host_of(self.url)


def _servers(node: Node, path: str, ctx: Context) -> tuple[Server, ...]:
    if not isinstance(node, Sequence) or not node.items:
        raise Refused("must be a list of at least one server", node)
    found: dict[int, Server] = {}
    for index, item in enumerate(node.items):
        here = f"{path}[{index}]"
        server = attempt(reader_of(Server), item, here, ctx)
        if isinstance(server, Failed):
            continue
        for what in ("name", "url"):
            value = getattr(server, what)
            twin = next((i for i, other in found.items() if getattr(other, what) == value), None)
            if twin is not None and isinstance(item, MappingNode):
                ctx.report(f"{here}.{what}", f"is that of {path}[{twin}] too", item.values[what])
        found[index] = server
    return tuple(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that can be configured. Relative paths have become absolute."""

    spool: Path = setting(values.folder)
    state: Path = setting(values.folder)
    servers: tuple[Server, ...] = setting(
        _servers, (Server(name="local", url="http://127.0.0.1:8188"),)
    )
    tracker: Tracker = section(Tracker)
    history: History = section(History)
    completion: Completion = section(Completion)
    audit: Audit = section(Audit)
    client: Client = section(Client)
    health: Health = section(Health)
    watch: Watch = section(Watch)
    retention: Retentions = section(Retentions)
    jobs: Jobs = section(Jobs)
    outputs: Outputs = section(Outputs)
    workflows: Path | None = setting(values.optional(values.folder), None)
    metrics: Metrics = section(Metrics)
    log: Log = section(Log)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together, as (key, problem)."""
        if self.spool == self.state:
            yield "state", "must be another folder than spool"
