"""The overview: one moment of the daemon as a value, for pages, ``status`` and gauges."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import trio

from comfyd.core.engine import Engine
from comfyd.core.job import Job, is_stale
from comfyd.core.model import ServerName, State
from comfyd.core.present import shown_counts, shown_state
from comfyd.core.server import Server as EngineServer
from comfyd.core.snapshot import JOBS_MAX, JobView, ServerView, Snapshot, state_of
from comfyd.core.wire.stats import SystemStats
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.spool.layout import Spool, free_bytes

# Files in a folder are counted up to here: more is just "many", and counting must stay cheap.
COUNT_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Watched:
    """What the shells know of one server."""

    url: str
    tracker: Callable[[], str]
    stats: Callable[[], SystemStats | None]
    reason: Callable[[], str]


class Overview:
    """Makes snapshots.

    Args:
      watched: What the shells know of a server, by its name and URL.
      waiting: What everything waits for, as a sentence; "" if nothing.

    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        spool: Spool,
        clock: Clock,
        *,
        version: str,
        watched: Callable[[ServerName, str], Watched],
        waiting: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._spool = spool
        self._clock = clock
        self._version = version
        self._watched = watched
        self._waiting = waiting
        self._started_at = clock.now_s()

    async def snapshot(self) -> Snapshot:
        """The daemon now. Reads two indexed minima from the journal and asks the disk for space."""
        oldest = {
            "queued": await self._journal.oldest(State.QUEUED),
            "submitted": await self._journal.oldest(State.SUBMITTED),
        }
        free_bytes = await trio.to_thread.run_sync(_free_bytes, self._spool)
        at = self._clock.now_s()
        engine = self._engine
        at_hand = [job for job in engine.jobs.values() if job.row.state is not State.QUEUED]
        shown = [job for job in at_hand if not job.row.state.final]
        shown.sort(key=lambda job: job.row.seq)
        running = sum(shown_state(job.row) == "running" for job in shown)
        return Snapshot(
            at=at,
            version=self._version,
            started_at=self._started_at,
            paused=engine.paused,
            waiting=self._waiting(),
            servers=tuple(self._server(server, at) for server in engine.servers.values()),
            counts=shown_counts(engine.counts, running),
            oldest_at=oldest,
            jobs=tuple(self._job(job, at) for job in shown[:JOBS_MAX]),
            more=max(0, len(shown) - JOBS_MAX),
            free_bytes=free_bytes,
        )

    def status_line(self) -> str:
        """One line for ``systemctl status``."""
        counts, servers = self._engine.counts, self._engine.servers.values()
        up = sum(bool(server.up) for server in servers)
        line = (
            f"{counts[State.SUBMITTED]} on servers, {counts[State.QUEUED]} waiting,"
            f" {up}/{len(servers)} servers up"
        )
        paused = "Intake is paused." if self._engine.paused else ""
        return " ".join(filter(None, [f"{line}.", paused, self._waiting()]))

    def _server(self, server: EngineServer, at: float) -> ServerView:
        watched = self._watched(server.name, server.origin)
        stats = watched.stats()
        in_flight = len(self._engine.on_server[server.name])
        state, reason = state_of(
            server,
            trouble=self._engine.trouble(server.name),
            down=watched.reason(),
            in_flight=in_flight,
        )
        return ServerView(
            name=server.name,
            url=watched.url,
            state=state,
            reason=reason,
            tracker=watched.tracker(),
            connected=server.client_id is not None,
            in_flight=in_flight,
            window=server.room(self._engine.policy),
            queue_remaining=server.remaining if stats is not None else None,
            stale=self._engine.stale(server.name, now_s=at),
            version="" if stats is None else stats.version,
            devices=() if stats is None else stats.devices,
        )

    def _job(self, job: Job, at: float) -> JobView:
        row, live = job.row, job.live
        return JobView(
            job=row.job,
            state=shown_state(row),
            server=row.server,
            prompt_id=row.prompt_id,
            attempt=row.attempt,
            since=live.since_s,
            silent_s=at - live.heard_s if row.state.in_flight else None,
            stale=is_stale(job, self._engine.policy, now_s=at),
        )


def _free_bytes(spool: Spool) -> int:
    return free_bytes(os.statvfs(spool.root))


def count_files(spool: Spool) -> dict[str, int]:
    """How many entries ``new/`` and ``claimed/`` hold, COUNT_MAX at most. Blocking."""
    return {folder.name: _count(folder) for folder in (spool.new, spool.claimed)}


def _count(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(1 for _ in islice(entries, COUNT_MAX))
    except FileNotFoundError:
        return 0  # new/ was removed; the watcher makes it again
