"""The overview: one moment of the daemon as a value, for pages, ``status`` and gauges."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import trio

from comfyd.core.engine import Engine
from comfyd.core.job import Job, durations_s
from comfyd.core.model import JobId, PromptId, Row, ServerName, State
from comfyd.core.notes import Note
from comfyd.core.pace import RUNS, Forecast, Lane, Pace, forecast
from comfyd.core.placing import submission_order
from comfyd.core.present import shown_counts, shown_since, shown_state
from comfyd.core.progress import Progress
from comfyd.core.server import Server as EngineServer
from comfyd.core.snapshot import (
    JOBS_MAX,
    MISSED_MAX,
    QUEUE_MAX,
    JobView,
    MissedView,
    QueuedView,
    ServerState,
    ServerView,
    Snapshot,
    state_of,
)
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
    progress: Callable[[PromptId], Progress | None]


class Overview:
    """Makes snapshots.

    Args:
      watched: What the shells know of a server, by its name and URL.
      waiting: What everything waits for, as a sentence; "" if nothing.
      min_free_bytes: What is to stay free on the spool's file system.

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
        min_free_bytes: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._spool = spool
        self._clock = clock
        self._version = version
        self._watched = watched
        self._waiting = waiting
        self._min_free_bytes = min_free_bytes
        self._started_at = clock.now_s()
        self._pace = Pace()
        self._missed: deque[MissedView] = deque(maxlen=MISSED_MAX)
        self._missed_counts: Counter[str] = Counter()

    async def recall(self) -> None:
        """Take the pace up from the jobs that an earlier daemon finished."""
        many = RUNS * max(1, len(self._engine.servers))
        for row in reversed(await self._journal.rows(State.DONE, limit=many)):
            if row.server is not None and row.started_at is not None:
                self._pace.ran(row.server, durations_s(row)["run"])

    def tell(self, notes: Iterable[Note]) -> None:
        """What happened: how long runs take, and which signals did not come."""
        for note in notes:
            match note.kind:
                case "finished" if note.data["outcome"] == "done" and note.server is not None:
                    self._pace.ran(note.server, note.data["durations_s"]["run"])
                case "ended" if note.data["missed"] is not None:
                    self._miss(note)
                case _:
                    pass

    def _miss(self, note: Note) -> None:
        missed = MissedView(
            at=self._clock.now_s(),
            job=note.job or "",
            server=note.server or "",
            cause=note.data["missed"],
            source=note.data["source"],
        )
        self._missed.appendleft(missed)
        self._missed_counts[missed.server] += 1

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
        servers = tuple(self._server(server, at) for server in engine.servers.values())
        first = engine.next_up(QUEUE_MAX)
        refused = {row.job for row in first if not engine.fleet.is_wanted(row, at)}
        then, ready_s = self._forecast(servers, len(first) - len(refused), len(refused), at)
        in_turn = iter(then.queued)
        return Snapshot(
            at=at,
            version=self._version,
            started_at=self._started_at,
            paused=engine.paused,
            waiting=self._waiting(),
            servers=servers,
            counts=shown_counts(engine.counts, running),
            oldest_at=oldest,
            jobs=tuple(self._job(job, at, ready_s) for job in shown[:JOBS_MAX]),
            more=max(0, len(shown) - JOBS_MAX),
            queue=tuple(
                _queued(
                    row,
                    position,
                    None if row.job in refused else next(in_turn, None),
                    refused=row.job in refused,
                )
                for position, row in enumerate(first, 1)
            ),
            ready_s=then.all_s,
            missed=tuple(self._missed),
            free_bytes=free_bytes,
            min_free_bytes=self._min_free_bytes(),
        )

    def states(self) -> Iterator[tuple[ServerName, ServerState, str]]:
        """Of every server that was asked how it is: its state, and why it is not up."""
        for server in self._engine.servers.values():
            if server.up is not None:
                yield server.name, *self._state(server)

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
        now = stats if server.up else None  # what it said before it went is no news of it
        state, reason = self._state(server)
        return ServerView(
            name=server.name,
            url=watched.url,
            state=state,
            reason=reason,
            tracker=watched.tracker(),
            connected=server.client_id is not None,
            in_flight=len(self._engine.on_server[server.name]),
            window=server.room(self._engine.policy),
            queue_remaining=None if now is None else server.remaining,
            stale=self._engine.stale(server.name, now_s=at),
            draining=server.retiring,
            run_s=self._pace.run_s(server.name),
            missed=self._missed_counts[server.name],
            version="" if stats is None else stats.version,
            devices=() if now is None else now.devices,
        )

    def _state(self, server: EngineServer) -> tuple[ServerState, str]:
        return state_of(
            server,
            trouble=self._engine.trouble(server.name),
            down=self._watched(server.name, server.origin).reason(),
            in_flight=len(self._engine.on_server[server.name]),
            fences=self._engine.fleet.fences(server.name),
        )

    def _forecast(
        self, servers: Iterable[ServerView], first: int, refused: int, at: float
    ) -> tuple[Forecast, dict[JobId, float]]:
        """When what is here may have run: the queue, and each prompt on a server."""
        lanes, there = [], []
        for view in servers:
            run_s = self._pace.expected_s(view.name)
            if run_s is None or view.state not in {ServerState.UP, ServerState.DEAF}:
                continue
            here = self._engine.on_server[ServerName(view.name)]
            rows = sorted((self._engine.jobs[job].row for job in here), key=submission_order)
            ran_s = tuple(0.0 if row.started_at is None else at - row.started_at for row in rows)
            others = max(0, (view.queue_remaining or 0) - len(rows))
            lanes.append(Lane(run_s, ran_s, others))
            there.append([row.job for row in rows])
        waiting = max(first, self._engine.counts[State.QUEUED] - refused)
        then = forecast(lanes, waiting=waiting, first=first)
        ready_s = {
            job: ends_s
            for jobs, ends in zip(there, then.there, strict=True)
            for job, ends_s in zip(jobs, ends, strict=True)
        }
        return then, ready_s

    def _job(self, job: Job, at: float, ready_s: Mapping[JobId, float]) -> JobView:
        row, live = job.row, job.live
        return JobView(
            job=row.job,
            state=shown_state(row),
            server=row.server,
            prompt_id=row.prompt_id,
            attempt=row.attempt,
            since=shown_since(row, live.since_s),
            silent_s=at - live.heard_s if row.state.in_flight else None,
            stale=self._engine.is_stale(job, now_s=at),
            progress=self._progress(row),
            ready_s=ready_s.get(row.job),
        )

    def _progress(self, row: Row) -> Progress | None:
        if row.server is None or row.prompt_id is None or not row.state.in_flight:
            return None
        return self._watched(row.server, row.origin or "").progress(row.prompt_id)


def _queued(row: Row, position: int, ready_s: float | None, *, refused: bool) -> QueuedView:
    return QueuedView(
        job=row.job,
        position=position,
        priority=row.priority,
        claimed=row.claimed_at,
        ready_s=ready_s,
        refused=refused,
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
