"""What the daemon looks like at one moment: the value behind pages, ``status`` and gauges."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from comfyd.core.present import bare_url, rfc3339
from comfyd.core.progress import Progress
from comfyd.core.server import Server
from comfyd.core.wire.stats import Device
from comfyd.core.wishes import draining_words, leaving_words, prompts

JOBS_MAX: Final = 200
"""Jobs in one snapshot at most: more than 12 full windows, and a page is still readable."""
QUEUE_MAX: Final = 20
"""Jobs of the queue in one snapshot: those that people wait for next."""
MISSED_MAX: Final = 10
"""Missed signals told one by one: the latest."""
NOT_ASKED: Final = "not asked yet"
"""Why a server is down before its first health probe."""


class ServerState(enum.Enum):
    """The one word for a server; of several that fit, the first one here is shown."""

    DOWN = "down"  # the last health probe failed, or the server must not be used
    WEDGED = "wedged"  # it answers, but prompts do not move: nothing more is sent
    DRAINING = "draining"  # a person asked to let it finish, or it is configured no more
    DEAF = "deaf"  # it works, but sends no events: it is polled
    UP = "up"


def state_of(
    server: Server, *, trouble: str, down: str, in_flight: int, fences: int = 0
) -> tuple[ServerState, str]:
    """The word for *server*, and why it gets nothing or takes nothing; "" if it does.

    Args:
      trouble: Why it is wedged; "" if it is not.
      down: Why its last health probe failed; "" if nobody knows.
      in_flight: Prompts of ours that may be there.
      fences: Prompts of ours that were given up, and are not proven to be over.

    """
    if not server.up or server.refusal:
        return ServerState.DOWN, _also_drained(server, down)
    if trouble:
        return ServerState.WEDGED, _also_drained(server, trouble)
    if server.leaving:
        return ServerState.DRAINING, leaving_words(server, in_flight)
    if server.draining:
        return ServerState.DRAINING, draining_words(in_flight)
    if fences:
        waits = f"gets nothing until {prompts(fences)} given up there ended for sure"
    else:
        waits = _turned_away(server)
    return (ServerState.DEAF if server.stalled else ServerState.UP), waits


def _turned_away(server: Server) -> str:
    """That nothing gets through to it; "" if the last submission did."""
    if not server.failures:
        return ""
    last = "submission" if server.failures == 1 else f"{server.failures} submissions"
    return f"did not take the last {last} ({server.said or 'not reached'}); others are tried"


def _also_drained(server: Server, why: str) -> str:
    """*why*, and that nobody waits for it."""
    return "; ".join(filter(None, [why.rstrip("."), "drained"])) if server.retiring else why


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """Attributes:

    url: As configured; credentials in it are never rendered.
    reason: Why it is not up or gets nothing, as a sentence; "" if it does, or nobody knows.
    tracker: What its tracker is doing, in a word or two.
    connected: Its WebSocket is open.
    in_flight: Prompts of ours that may be there.
    window: Prompts of ours that it may hold now.
    queue_remaining: Its own count, others' prompts included; None before the first.
    stale: Prompts of ours that have been silent for longer than ``stale_after``.
    draining: It is to get nothing more, drained or configured no more, whatever its state is.
    run_s: What a job takes there, by its last runs; None before the first.
    missed: End signals of ours that did not come, since the daemon started.
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
    draining: bool = False
    run_s: float | None = None
    missed: int = 0
    version: str = ""
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """One job at hand.

    Attributes:
      state: As shown: ``running`` is set apart from ``submitted``.
      since: When it entered its state; seconds since the epoch.
      silent_s: Seconds since the last sign of life of its prompt; None if none is on a server.
      ready_s: Seconds until it may have run, by the recent pace; None while that is not known.

    """

    job: str
    state: str
    server: str | None
    prompt_id: str | None
    attempt: int
    since: float
    silent_s: float | None = None
    stale: bool = False
    progress: Progress | None = None
    ready_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedView:
    """One job of the queue.

    Attributes:
      position: 1 for the next.
      claimed: When it was taken in; seconds since the epoch.
      ready_s: Seconds until it may have run, by the recent pace; None while that is not known.
      refused: Every server that works now has said no to it: it waits for another one.

    """

    job: str
    position: int
    priority: int
    claimed: float
    ready_s: float | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedView:
    """An end signal that did not come. *cause*: disconnected, deaf or silent; *source*: how the
    end was found instead."""

    at: float
    job: str
    server: str
    cause: str
    source: str


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
    queue: The first of the queue, QUEUE_MAX at most.
    ready_s: Seconds until all that is here may have run, by the recent pace; None: not known.
    missed: The latest missed signals, the last one first, MISSED_MAX at most.
    free_bytes: Space left to us on the spool's file system.
    min_free_bytes: What is to stay free there; None if it is not known.

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
    queue: tuple[QueuedView, ...] = ()
    ready_s: float | None = None
    missed: tuple[MissedView, ...] = ()
    free_bytes: int | None = None
    min_free_bytes: int | None = None

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
            "queue": [self._queued(job) for job in self.queue],
            "ready_s": _some_seconds(self.ready_s),
            "missed": [_missed(each) for each in self.missed],
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
            "progress": None if job.progress is None else _progress(job.progress),
            "ready_s": _some_seconds(job.ready_s),
        }

    def _queued(self, job: QueuedView) -> dict[str, Any]:
        return {
            "job": job.job,
            "position": job.position,
            "priority": job.priority,
            "claimed": rfc3339(job.claimed),
            "for_s": _seconds(self.at - job.claimed),
            "ready_s": _some_seconds(job.ready_s),
            "refused": job.refused,
        }


def _seconds(span_s: float) -> float:
    return round(max(0.0, span_s), 3)


def _some_seconds(span_s: float | None) -> float | None:
    return None if span_s is None else _seconds(span_s)


def _progress(progress: Progress) -> dict[str, Any]:
    share = progress.share
    return {
        "node": progress.node,
        "name": progress.name,
        "step": progress.step,
        "steps": progress.steps,
        "nodes_done": len(progress.behind) if progress.names else None,
        "nodes": len(progress.names) or None,
        "share": None if share is None else round(share, 4),
    }


def _missed(missed: MissedView) -> dict[str, Any]:
    return {
        "at": rfc3339(missed.at),
        "job": missed.job,
        "server": missed.server,
        "cause": missed.cause,
        "source": missed.source,
    }


def _server(server: ServerView) -> dict[str, Any]:
    return {
        "name": server.name,
        "url": bare_url(server.url),
        "state": server.state.value,
        "reason": server.reason,
        "draining": server.draining,
        "tracker": server.tracker,
        "connected": server.connected,
        "in_flight": server.in_flight,
        "window": server.window,
        "queue_remaining": server.queue_remaining,
        "stale": server.stale,
        "run_s": _some_seconds(server.run_s),
        "missed": server.missed,
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
