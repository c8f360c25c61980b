"""News of a server: what it makes of that server, and what the jobs there are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comfyd.core.facts import (
    Connected,
    Disconnected,
    Health,
    QueueLooked,
    QueueSeen,
    StalledPublisher,
)
from comfyd.core.fleet import Fleet
from comfyd.core.job import Doubted, Job, Orphaned
from comfyd.core.model import JobId

ServerNews = Connected | Disconnected | StalledPublisher | QueueSeen | QueueLooked | Health


def heed(
    fleet: Fleet, jobs: Mapping[JobId, Job], fact: ServerNews, *, now_s: float
) -> list[tuple[Job, Doubted | Orphaned]]:
    """Put into *fleet* what *fact* says of a server there; returns what to tell which jobs."""
    policy, server = fleet.policy, fleet.servers[fact.server]
    here = [jobs[job_id] for job_id in fleet.on_server[fact.server]]
    match fact:
        case Connected(client_id=client_id):
            fleet.put(replace(server.opened(), client_id=client_id, run_average_s=None))
            fleet.look_again(fact.server, now_s)
            # The sweep: nothing is ever replayed to a new connection.
            return [(job, Doubted()) for job in here]
        case Disconnected():
            if server.client_id is not None:
                until_s = now_s + policy.listen_grace_s
                server = replace(server, client_id=None, listen_by_s=until_s)
            deaf = fact.cause == "deaf"
            lives = deaf or fact.cause == "reload"
            fleet.put(server if lives else server.renewed())  # so a restart looks
            alone = sum(not job.live.ended for job in here) == 1
            cause = "deaf" if deaf else "disconnected"
            return [
                (job, Orphaned(cause, alone and not job.live.ended))
                for job in here
                if job.live.orphan == ""
            ]
        case StalledPublisher(stalled=stalled):
            fleet.put(replace(server, stalled=stalled))
            return [(job, Orphaned("deaf")) for job in here] if stalled else []
        case QueueSeen(remaining=remaining):
            fleet.put(replace(server, remaining=remaining))
            # The end signal follows this message; look only if it does not.
            doubted = Doubted(policy.ending_grace_s)
            return [(job, doubted) for job in here] if remaining == 0 else []
        case QueueLooked():
            fleet.put(server.looked_at(fact.running, fact.pending, policy, now_s=now_s))
        case Health():
            server = replace(server, up=fact.ok, refusal=fact.refusal)
            fleet.put(server if fact.ok else server.at_work())  # what comes back is asked anew
    return []
