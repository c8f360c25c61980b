"""Which queued job goes where, and which prompt is fetched back because it could run elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from comfyd.core import letdown
from comfyd.core.fleet import Fleet
from comfyd.core.job import Assigned, Job
from comfyd.core.lookahead import LookAhead
from comfyd.core.model import JobId, Row, ServerName, State
from comfyd.core.moves import is_recalled
from comfyd.core.server import Server


def assignments(ahead: LookAhead, fleet: Fleet, now_s: float) -> Iterator[tuple[Job, Assigned]]:
    """Give queued jobs, best first, to the least loaded servers with room.

    A server that turned the last submission away is given instead who has waited for longest: so
    all have their turn there until one is taken, however many are not. Each assignment is to be
    carried out before the next is asked for: it changes the load.
    """
    open_ = {s.name for s in fleet.servers.values() if fleet.has_room(s, now_s)}
    passed_over = []
    while open_ and (job := ahead.pop(now_s)) is not None:
        server = fleet.place(job.row, sorted(open_), now_s)
        if server is None:
            passed_over.append(job)
            if job.row.deaths:  # it is sent alone: let a server become empty for it
                open_.discard(fleet.reserve(job.row, now_s) or ServerName(""))
            continue
        if server.failures:
            ahead.put_back([job])
            waiting = ahead.by_wait(now_s)
            job = next(j for j in waiting if _may_claim(server, j.row, fleet, open_, now_s))
            if job.row.deaths and fleet.on_server[server.name]:
                open_.discard(server.name)  # it is its turn, and it is sent alone
                continue
        client_id = server.client_id if server.hearing else None
        yield job, Assigned(server.name, server.origin, client_id)
        if not fleet.has_room(server, now_s):
            open_.discard(server.name)
    ahead.put_back(passed_over)


def _may_claim(
    server: Server, row: Row, fleet: Fleet, open_: set[ServerName], now_s: float
) -> bool:
    """Whether it would be sent there now, or once nothing else of ours is there."""
    place = fleet.place(row, sorted(open_), now_s)
    waits = place is None and row.deaths > 0
    return place is server or (waits and fleet.could_run(server, row, now_s))


def recalls(
    jobs: Mapping[JobId, Job], fleet: Fleet, now_s: float, *, nobody_queued: bool
) -> tuple[list[Job], float]:
    """Prompts that wait on a server while another one could run them.

    Returns:
      Those to be fetched back now, and when to think of it again.

    """
    chosen: dict[JobId, Job] = {}
    again_s = math.inf
    if len(fleet.servers) < 2 or not any(fleet.on_server.values()):
        return [], again_s

    def waiting_on(name: ServerName) -> list[Job]:
        """Prompts there that have not started, as far as is known."""
        here = (jobs[job_id] for job_id in fleet.on_server[name] if job_id not in chosen)
        return [
            job
            for job in here
            if job.row.state is State.SUBMITTED
            and job.row.started_at is None
            and not job.live.ended
        ]

    for server in fleet.servers.values():
        in_need = server.leaving or bool(fleet.trouble(server.name, now_s))
        if server.up and fleet.on_server[server.name] and in_need:
            others = [other for other in fleet.servers.values() if other.name != server.name]
            for job in waiting_on(server.name):
                if any(fleet.could_run(other, job.row, now_s) for other in others):
                    chosen[job.row.job] = job
    if not nobody_queued:
        return list(chosen.values()), again_s
    in_flight = (jobs[job_id].row for here in fleet.on_server.values() for job_id in here)
    under_way = len(chosen) + sum(is_recalled(row) for row in in_flight)
    for server in fleet.idle(now_s)[under_way:]:
        behind = [
            job
            for name, here in fleet.on_server.items()
            if max(len(here), fleet.servers[name].remaining) > 1 and fleet.servers[name].up
            for job in waiting_on(name)
            if fleet.could_run(server, job.row, now_s) and not letdown.is_likely(job.row, server)
        ]
        late = max(behind, key=lambda job: submission_order(job.row), default=None)
        if late is None:
            continue
        at_s = (late.row.submitted_at or now_s) + fleet.policy.recall_after_s
        if at_s <= now_s:
            chosen[late.row.job] = late
        else:
            again_s = min(again_s, at_s)
    return list(chosen.values()), again_s


def submission_order(row: Row) -> tuple[float, float, int]:
    """The order in which a server runs what we sent it: by its number, or by when we sent it."""
    number = math.inf if row.number is None else row.number
    submitted_s = math.inf if row.submitted_at is None else row.submitted_at
    return number, submitted_s, row.seq
