"""A link: everything that talks to one server, wired together."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypedDict

import structlog
import trio

from comfyd.comfyui.client import Client
from comfyd.comfyui.listener import Cause, Result, Timings
from comfyd.comfyui.tracker import Tracker
from comfyd.config import Config
from comfyd.config import Server as ServerConfig
from comfyd.core.facts import Connected, Disconnected, Hint, QueueSeen, Sign, StalledPublisher
from comfyd.core.model import PromptId, ServerName
from comfyd.core.notes import Note
from comfyd.errors import ConfigError
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.health import HealthProbe
from comfyd.services.inbox import Inbox
from comfyd.services.prober import Prober
from comfyd.services.progress import ProgressBoard

# Submissions at once to one server: its event loop validates them one after the other anyway.
SUBMITS: Final = 4

_log: Any = structlog.get_logger("comfyd.server")


def client_of(server: ServerConfig, config: Config) -> Client:
    """A client of *server*, to be closed."""
    return Client(
        server.url,
        headers=_headers(server),
        ca_file=server.ca_file,
        **_timeouts(config),
    )


class _Timeouts(TypedDict):
    connect_timeout_s: float
    submit_timeout_s: float
    history_timeout_s: float
    health_timeout_s: float
    upload_timeout_s: float
    download_idle_timeout_s: float


def _timeouts(config: Config) -> _Timeouts:
    return {
        "connect_timeout_s": config.client.connect_timeout_s,
        "submit_timeout_s": config.client.submit_timeout_s,
        "history_timeout_s": config.history.timeout_s,
        "health_timeout_s": config.health.timeout_s,
        "upload_timeout_s": config.client.upload_timeout_s,
        "download_idle_timeout_s": config.client.download_idle_timeout_s,
    }


def _timings(config: Config) -> Timings:
    tracker = config.tracker
    return Timings(
        connect_timeout_s=tracker.connect_timeout_s,
        ping_interval_s=tracker.ping_interval_s,
        ping_timeout_s=tracker.ping_timeout_s,
        deaf_after_s=tracker.deaf_after_s,
        reconnect_first_s=tracker.reconnect_first_s,
        reconnect_max_s=tracker.reconnect_max_s,
    )


def _headers(server: ServerConfig) -> dict[str, str]:
    return {name: secret.reveal() for name, secret in server.headers.items()}


def authorities_of(server: ServerConfig) -> bytes:
    """Which authorities are trusted for *server*, as its ``ca_file`` says now; b"" if none does.

    Raises:
      ConfigError: The file cannot be read.

    """
    if server.ca_file is None:
        return b""
    try:
        return hashlib.sha256(server.ca_file.read_bytes()).digest()
    except OSError as error:
        where = f"servers.{server.name}.ca_file"
        raise ConfigError(where, f"cannot be read: {error.strerror}") from error


class Users:
    """Who is using something now; it is closed when nobody is."""

    def __init__(self) -> None:
        self._count = 0
        self._none = trio.Event()

    def join(self) -> None:
        if not self._count:
            self._none = trio.Event()
        self._count += 1

    def leave(self) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def gone(self) -> None:
        """Until nobody is there."""
        if self._count:
            await self._none.wait()


class Link:
    """Everything that talks to one server: client, tracker, prober, health probe.

    Attributes:
      server: Its settings, as it was made with: to be reached in another way takes another link.
      authorities: What ``ca_file`` held then.
      users: Whoever uses its client: orders, and its own tasks.

    """

    def __init__(
        self, server: ServerConfig, config: Config, inbox: Inbox, metrics: Metrics, clock: Clock
    ) -> None:
        self.name = ServerName(server.name)
        self.origin = server.url
        self.server = server
        self.authorities = authorities_of(server)
        self.users = Users()
        self.submits = trio.CapacityLimiter(SUBMITS)
        self.client = client_of(server, config)
        self.health = HealthProbe(
            self.name,
            self.client,
            interval_s=config.health.interval_s,
            tell=inbox.put,
            on_stats=partial(metrics.system, self.name),
            on_health=self._on_health,
            silent_s=self._silent_s,
        )
        self.progress = ProgressBoard(inbox.is_ours)
        self.prober = Prober(self.name, self.client, inbox.put)
        self._inbox, self._metrics, self._clock = inbox, metrics, clock
        self._heard_at = -math.inf
        self._up = self._connected = False
        self.tracker = Tracker(
            server.url,
            headers=_headers(server),
            ca_file=server.ca_file,
            timings=_timings(config),
            ask_remaining=self.client.remaining,
            listener=self,
            now_s=clock.now_s,
            u=random.random,
        )

    def tasks(self) -> tuple[tuple[str, Callable[[], Awaitable[object]]], ...]:
        """What is to be supervised, by name."""
        return (
            ("tracker", self.tracker.run),
            ("prober", self.prober.run),
            ("health", self.health.run),
        )

    def _on_health(self, ok: bool) -> None:
        self._metrics.health(self.name, ok=ok)
        if ok and not self._up:
            self.tracker.answers()
        self._up = ok

    def configure(self, config: Config) -> None:
        """Take up new timeouts and intervals; no connection ends for it."""
        self.client.limit(**_timeouts(config))
        self.tracker.timings = _timings(config)
        self.health.interval_s = config.health.interval_s

    def succeeded(self, by: Link | None) -> None:
        """Its tasks have been stopped, for *by* to go on, or for good."""
        if self._connected:
            self._metrics.disconnect(self.name, "closed")
        if by is None:
            return
        if self._connected:
            self._inbox.put(Disconnected(server=self.name, cause="reload"))
        for question in self.prober.unanswered():
            by.prober.ask(question)

    # --- what the tracker tells ------------------------------------------------------------------

    def on_connected(self, client_id: str) -> None:
        _log.info("websocket_connected", server=self.name)
        self._connected = True
        self._inbox.put(Connected(server=self.name, client_id=client_id))
        self.health.poke()

    def on_disconnected(self, cause: Cause) -> None:
        _log.warning("websocket_disconnected", server=self.name, cause=cause)
        self._connected = False
        self._metrics.disconnect(self.name, cause)
        self._inbox.put(Disconnected(server=self.name, cause=cause))
        self.health.poke()

    def on_connect_result(self, result: Result) -> None:
        self._metrics.connect(self.name, result)

    def on_message(self, label: str) -> None:
        self._heard_at = self._clock.now_s()
        self._metrics.message(self.name, label, at=self._heard_at)

    def _silent_s(self) -> float:
        return self._clock.now_s() - self._heard_at

    def on_hint(self, prompt_id: PromptId, sign: Sign) -> None:
        if not self._inbox.hint(Hint(server=self.name, prompt_id=prompt_id, sign=sign)):
            note = Note("dropped", None, self.name, {"reason": "foreign_hint"}, story=False)
            self._metrics.observe([note])

    def on_progress(self, prompt_id: PromptId, kind: str, data: bytes) -> None:
        self.progress.heard(prompt_id, kind, data)

    def on_remaining(self, remaining: int) -> None:
        self._inbox.put(QueueSeen(server=self.name, remaining=remaining))

    def on_stalled(self, stalled: bool) -> None:
        self._inbox.put(StalledPublisher(server=self.name, stalled=stalled))

    def on_invalid(self, label: str, problem: str) -> None:
        _log.warning("invalid_message", server=self.name, type=label, problem=problem)
