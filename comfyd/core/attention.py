"""What a person should look at: the first thing a status page says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from comfyd.core.model import Row
from comfyd.core.snapshot import NOT_ASKED, ServerState, ServerView, Snapshot

RECENT_S: Final = 3600.0
"""A failure is news for so long."""
FAILED_MAX: Final = 50
"""So many failures are looked at, to tell how many of them are news."""


@dataclass(frozen=True, slots=True)
class Need:
    """Attributes: *what*: a sentence; *where*: servers, held, failed, jobs or daemon."""

    what: str
    where: str


def needs(now: Snapshot, failed: Iterable[Row]) -> tuple[Need, ...]:
    """All that is not as it should be, the worst first; empty if everything is fine.

    Args:
      failed: The latest failures, FAILED_MAX at most; those that are older than RECENT_S do not
        count.

    """
    found = [Need(now.waiting, "daemon")] if now.waiting else []
    for states in ({ServerState.DOWN}, {ServerState.WEDGED}, {ServerState.DEAF}):
        found += [
            Need(_sentence(server), "servers")
            for server in now.servers
            if server.state in states and server.reason != NOT_ASKED and not server.draining
        ]
    held = now.counts.get("held", 0)
    if held:
        found.append(Need(f"{_jobs(held)} held: release or cancel.", "held"))
    if now.paused:
        found.append(
            Need("The intake is paused: files stay in new/ until comfyd resume.", "daemon")
        )
    stale = sum(server.stale for server in now.servers)
    if stale:
        found.append(Need(f"{_jobs(stale)} silent for too long.", "jobs"))
    news = sum((row.over_at or 0.0) > now.at - RECENT_S for row in failed)
    if news:
        more = " or more" if news >= FAILED_MAX else ""
        jobs = "job" if news == 1 else "jobs"
        found.append(Need(f"{news}{more} {jobs} failed within the hour.", "failed"))
    return tuple(found)


def _sentence(server: ServerView) -> str:
    match server.state:
        case ServerState.DEAF:
            return f"Server {server.name} sends no events: it works, and is polled."
        case state:
            reason = f": {server.reason}" if server.reason else ""
            return f"Server {server.name} is {state.value}{reason}".rstrip(".") + "."


def _jobs(count: int) -> str:
    return "1 job is" if count == 1 else f"{count} jobs are"
