"""What pages read, from memory, instead of a daemon."""

from __future__ import annotations

import trio
from prometheus_client import CollectorRegistry

from comfyd.core.model import JobId, Row, State
from comfyd.core.present import shown_counts
from comfyd.core.snapshot import ServerState, ServerView, Snapshot
from comfyd.journal.store import Event
from comfyd.metrics import Metrics
from comfyd.web.exporter import Readiness

T = 1_900_000_000.0
EVIL = "<script>alert(1)</script>\"'&\u202eexe.\x00\n{{x}}"
READY = Readiness(journal_open=True, spool_watched=True, listener_bound=True)


def row(seq, state=State.DONE, **more):
    return Row(job=JobId(f"job-{seq}"), seq=seq, state=state, claimed_at=T, **more)


class Fixed:
    """What the daemon would read, from memory."""

    def __init__(self):
        self.rows = [row(seq) for seq in range(1, 8)]
        self.events = (Event(job=JobId("job-1"), at=T, kind="moved", data={"state": "done"}),)
        self.error = None
        self.now = Snapshot(
            at=T,
            version="1.2.3",
            started_at=T - 60,
            servers=(ServerView(name="a", url="http://u:hunter2@h:1", state=ServerState.UP),),
            counts=shown_counts({State.QUEUED: 3, State.DONE: 7}, running=1),
            oldest_at={"queued": T - 30, "submitted": None},
        )
        self.readiness = READY
        self.metrics = Metrics(CollectorRegistry())
        self.metrics.prepare(["a"])

    async def snapshot(self):
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.now

    async def page(self, state, limit, after):
        await trio.lowlevel.checkpoint()
        newest_first = [
            one
            for one in reversed(self.rows)
            if state in {None, one.state} and (after is None or one.seq < after)
        ]
        return newest_first[:limit]

    async def latest(self, state, limit):
        await trio.lowlevel.checkpoint()
        over = [one for one in self.rows if one.state is state]
        return sorted(over, key=lambda one: one.over_at, reverse=True)[:limit]

    async def story(self, job):
        await trio.lowlevel.checkpoint()
        for one in self.rows:
            if one.job == job:
                return one, self.events
        return None
