"""The one owner of the configuration, and what the core needs of it."""

from __future__ import annotations

from comfyd.config import Config, Retention
from comfyd.core.model import ServerName
from comfyd.core.policy import Policy
from comfyd.core.retention import Bounds, Place
from comfyd.core.server import Server


class Settings:
    """The configuration that holds now. A reload replaces it.

    Whoever needs a value reads it here when it is needed. What cannot (a client's timeouts, the
    intake's limits) is handed new values by ``Reload``, and by nobody else.

    Attributes:
      now: Read it each time; keep no part of it.

    """

    def __init__(self, config: Config) -> None:
        self.now = config


def policy_of(config: Config) -> Policy:
    """The core's numbers."""
    return Policy(
        completion_attempts=config.completion.attempts,
        completion_backoff_s=config.completion.backoff_s,
        audit_interval_s=config.audit.interval_s,
        stale_after_s=config.audit.stale_after_s,
        orphan_interval_s=config.audit.orphan_interval_s,
        lost_grace_s=config.audit.lost_grace_s,
        abandon_after_s=config.audit.abandon_after_s,
        run_timeout_s=config.jobs.run_timeout_s,
        stall_timeout_s=config.jobs.stall_timeout_s,
    )


def servers_of(config: Config) -> tuple[Server, ...]:
    """The core's servers, as nothing is known of them yet."""
    return tuple(
        Server(
            name=ServerName(each.name),
            origin=each.url,
            window=each.window,
            restart_every_s=each.restart_interval_s if each.restart_unit else None,
        )
        for each in config.servers
    )


def bounds_of(config: Config) -> dict[Place, Bounds]:
    """What is kept of the results in each place."""
    kept = {Place.DONE: config.retention.done, Place.FAILED: config.retention.failed}
    return {place: _bounds(each) or Bounds() for place, each in kept.items()}


def stories_of(config: Config) -> Bounds | None:
    """What is kept of the stories of jobs; None: all."""
    return _bounds(config.retention.events)


def _bounds(kept: Retention | None) -> Bounds | None:
    return None if kept is None else Bounds(age_s=kept.age_s, count=kept.count, bytes=kept.bytes)
