"""What the daemon looks like at one moment: the value behind pages, ``status`` and gauges."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from comfyd.core.present import bare_url, rfc3339
from comfyd.core.server import Server
from comfyd.core.wire.stats import Device
from comfyd.core.wishes import draining_words, leaving_words

JOBS_MAX: Final = 200
"""Jobs in one snapshot at most: more than 12 full windows, and a page is still readable."""


class ServerState(enum.Enum):
    """The one word for a server; of several that fit, the first one here is shown."""

    DOWN = "down"  # the last health probe failed, or the server must not be used
    WEDGED = "wedged"  # it answers, but prompts do not move: nothing more is sent
    DRAINING = "draining"  # a person asked to let it finish, or it is configured no more
    DEAF = "deaf"  # it works, but sends no events: it is polled
    UP = "up"


def state_of(server: Server, *, trouble: str, down: str, in_flight: int) -> tuple[ServerState, str]:
    """The word for *server*, and why it is not up, as a sentence.

    Args:
      trouble: Why it is wedged; "" if it is not.
      down: Why its last health probe failed; "" if nobody knows.
      in_flight: Prompts of ours that may be there.

    """
    if not server.up or server.refusal:
        return ServerState.DOWN, down
    if trouble:
        return ServerState.WEDGED, trouble
    if server.leaving:
        return ServerState.DRAINING, leaving_words(server, in_flight)
    if server.draining:
        return ServerState.DRAINING, draining_words(in_flight)
    return (ServerState.DEAF if server.stalled else ServerState.UP), ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """Attributes:

    url: As configured; credentials in it are never rendered.
    reason: Why it is not up, as a sentence; "" if it is, or nobody knows.
    tracker: What its tracker is doing, in a word or two.
    connected: Its WebSocket is open.
    in_flight: Prompts of ours that may be there.
    window: Prompts of ours that it may hold now.
    queue_remaining: Its own count, others' prompts included; None before the first.
    stale: Prompts of ours that have been silent for longer than ``stale_after``.
    version: ComfyUI's version, "" while unknown.
    """

    name: str
    url: str
    state: ServerState
    reason: str = ""
    tracker: str = ""
    connected: bool = False
    in_flight: int = 0
    window: int = 0
    queue_remaining: int | None = None
    stale: int = 0
    version: str = ""
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """One job at hand.

    Attributes:
      state: As shown: ``running`` is set apart from ``submitted``.
      since: When it entered its state; seconds since the epoch.
      silent_s: Seconds since the last sign of life of its prompt; None if none is on a server.

    """

    job: str
    state: str
    server: str | None
    prompt_id: str | None
    attempt: int
    since: float
    silent_s: float | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Attributes: times are seconds since the epoch, UTC.

    at: When this was so. For an answer from the journal alone: the last thing written there.
    version: comfyd's.
    started_at: When the daemon started; None if none runs.
    paused: Intake is stopped by a person.
    waiting: What everything waits for, as a sentence (such as a full disk); "" if nothing.
    counts: Jobs by shown state, all of them (``present.shown_counts``).
    oldest_at: ``claimed_at`` of the oldest job ``queued`` and ``submitted`` (running ones too).
    jobs, more: Jobs at hand, oldest first, JOBS_MAX at most; and how many were left out.
    free_bytes: Space left to us on the spool's file system.

    """

    at: float
    version: str
    started_at: float | None = None
    paused: bool = False
    waiting: str = ""
    servers: tuple[ServerView, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    oldest_at: Mapping[str, float | None] = field(default_factory=dict)
    jobs: tuple[JobView, ...] = ()
    more: int = 0
    free_bytes: int | None = None

    def oldest_age_s(self, state: str) -> float:
        """Seconds since the oldest job in *state* was claimed, 0 if there is none."""
        oldest_at = self.oldest_at.get(state)
        return 0.0 if oldest_at is None else max(0.0, self.at - oldest_at)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: RFC 3339 times, durations in seconds, no credentials."""
        up_s = None if self.started_at is None else _seconds(self.at - self.started_at)
        return {
            "at": rfc3339(self.at),
            "version": self.version,
            "started": None if self.started_at is None else rfc3339(self.started_at),
            "uptime_s": up_s,
            "paused": self.paused,
            "waiting": self.waiting,
            "servers": [_server(server) for server in self.servers],
            "jobs": dict(self.counts),
            "oldest_age_s": {state: _seconds(self.oldest_age_s(state)) for state in self.oldest_at},
            "stale": sum(server.stale for server in self.servers),
            "at_hand": [self._job(job) for job in self.jobs],
            "more": self.more,
            "free_bytes": self.free_bytes,
        }

    def _job(self, job: JobView) -> dict[str, Any]:
        return {
            "job": job.job,
            "state": job.state,
            "server": job.server,
            "prompt_id": job.prompt_id,
            "attempt": job.attempt,
            "since": rfc3339(job.since),
            "for_s": _seconds(self.at - job.since),
            "silent_s": None if job.silent_s is None else _seconds(job.silent_s),
            "stale": job.stale,
        }


def _seconds(span_s: float) -> float:
    return round(max(0.0, span_s), 3)


def _server(server: ServerView) -> dict[str, Any]:
    return {
        "name": server.name,
        "url": bare_url(server.url),
        "state": server.state.value,
        "reason": server.reason,
        "tracker": server.tracker,
        "connected": server.connected,
        "in_flight": server.in_flight,
        "window": server.window,
        "queue_remaining": server.queue_remaining,
        "stale": server.stale,
        "version": server.version,
        "devices": [
            {
                "name": device.name,
                "type": device.type,
                "index": device.index,
                "vram_free_bytes": device.vram_free_bytes,
                "vram_total_bytes": device.vram_total_bytes,
            }
            for device in server.devices
        ],
    }
