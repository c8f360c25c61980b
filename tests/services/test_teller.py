"""What becomes a line of the log, and what does not."""

from __future__ import annotations

from collections import Counter

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from comfyd.core.engine import Engine
from comfyd.core.facts import DrainAsked, Health, StalledPublisher
from comfyd.core.model import JobId, PromptId, ServerName
from comfyd.core.notes import Note
from comfyd.core.policy import Policy
from comfyd.core.server import Server
from comfyd.journal.memory import MemoryStore
from comfyd.journal.thread import Journal
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.overview import Overview, Watched
from comfyd.services.teller import Teller
from comfyd.spool.layout import Spool

J, P, S = JobId("fox.1"), PromptId("p"), ServerName("s")
SPANS = {"wait": 0.0, "queue": 0.0, "run": 3.0, "collect": 0.0, "total": 4.5678}


class Rig:
    def __init__(self, tmp_path):
        self.reason = "not asked yet"
        self.engine = Engine([Server(name=S, origin="http://s")], Policy(), Counter())
        self.clock = Clock()
        watched = Watched(
            url="http://s",
            tracker=lambda: "connected",
            stats=lambda: None,
            reason=lambda: self.reason,
            progress=lambda prompt_id: None,
        )
        journal = Journal(MemoryStore, inline=True)
        self.overview = Overview(
            self.engine, journal, Spool(tmp_path), self.clock,
            version="1", watched=lambda name, origin: watched, waiting=str, min_free_bytes=int,
        )  # fmt: skip
        metrics = Metrics(CollectorRegistry())
        metrics.prepare([S])
        self.teller = Teller(metrics, self.overview)

    def told(self, *notes, debug=False):
        with capture_logs() as lines:
            self.teller.tell(notes)
        kept = [line for line in lines if debug or line["log_level"] != "debug"]
        return [(line.pop("log_level"), line.pop("event"), line) for line in kept]

    def after(self, *facts, reason=""):
        self.reason = reason
        for fact in facts:
            self.engine.handle(fact, now_s=self.clock.now_s(), u=0.0)
        self.engine.take(now_s=self.clock.now_s(), u=0.0)
        return self.told()


@pytest.fixture
async def rig(tmp_path):
    return Rig(tmp_path)


ABOUT = {"job": J, "server": S, "prompt": P}


@pytest.mark.parametrize(
    ("kind", "data", "level", "event", "fields"),
    [
        ("moved", {"state": "submitted"}, "info", "job_submitted", {}),
        ("started", {}, "info", "job_started", {}),
        ("moved", {"state": "stopping", "reason": "stalled"}, "info", "job_stopping",
         {"reason": "stalled"}),
        ("moved", {"state": "stopping"}, "info", "job_stopping", {"reason": "recalled"}),
        ("moved", {"state": "held", "reason": "It crashed."}, "warning", "job_held",
         {"reason": "It crashed."}),
        ("ended", {"end": "success", "source": "signal", "missed": None}, "info", "job_ended",
         {"end": "success", "source": "signal"}),
        ("ended", {"end": "error", "source": "audit", "missed": "deaf"}, "warning", "job_ended",
         {"end": "error", "source": "audit", "missed": "deaf"}),
        ("lost", {"cause": "restart", "charged": 1}, "warning", "attempt_lost",
         {"cause": "restart", "charged": 1}),
        ("retry", {"operation": "attempt", "reason": "error"}, "info", "job_requeued",
         {"reason": "error"}),
        ("retry", {"operation": "upload", "reason": "status", "said": "HTTP status 500"}, "warning",
         "submission_failed",
         {"operation": "upload", "reason": "status", "said": "HTTP status 500"}),
        ("retry", {"operation": "submit", "reason": "refused"}, "warning", "submission_failed",
         {"operation": "submit", "reason": "refused"}),
        ("retried", {"new": "fox.2"}, "info", "job_retried", {"new": "fox.2"}),
        ("fenced", {}, "warning", "fence_raised", {}),
        ("unfenced", {}, "info", "fence_lifted", {}),
        ("finished", {"outcome": "done", "reason": None, "durations_s": SPANS, "latency_s": None},
         "info", "job_finished", {"outcome": "done", "total_s": 4.568}),
        ("finished",
         {"outcome": "failed", "reason": "lost", "durations_s": SPANS, "latency_s": None},
         "warning", "job_finished", {"outcome": "failed", "reason": "lost", "total_s": 4.568}),
    ],
)  # fmt: skip
async def test_a_turn_is_one_line(rig, kind, data, level, event, fields):
    assert rig.told(Note(kind, J, S, data, prompt=P)) == [(level, event, {**ABOUT, **fields})]


async def test_a_job_that_is_taken_in_says_so_and_why_not(rig):
    good = {"payload": "fox.1.json", "invalid": False, "reason": ""}
    bad = {"payload": "fox.1.json", "invalid": True, "reason": "invalid_job"}
    about = {"job": J, "payload": "fox.1.json"}
    assert rig.told(Note("claimed", J, None, good), Note("claimed", J, None, bad)) == [
        ("info", "job_claimed", about),
        ("info", "job_claimed", {**about, "reason": "invalid_job"}),
    ]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("moved", {"state": "collecting"}),
        ("moved", {"state": "submitted", "reason": "it runs by now"}),
        ("retry", {"operation": "history", "reason": "status"}),
        ("audit", {"verdict": "running", "reason": ""}),
        ("dropped", {"reason": "late_hint"}),
        ("accepted", {"number": 3.0}),
        ("signal", {"sign": "ended"}),
    ],
)
async def test_the_finer_steps_are_for_debug_alone(rig, kind, data):
    note = Note(kind, J, S, data, prompt=P)
    assert rig.told(note) == []
    assert rig.told(note, debug=True) == [("debug", "note", {"kind": kind, **ABOUT, **data})]


async def test_a_loss_is_not_told_twice(rig):
    lost = Note("lost", J, S, {"cause": "abandoned", "charged": 0})
    again = Note("retry", J, S, {"operation": "attempt", "reason": "recalled"})
    other = Note("retry", JobId("other"), S, {"operation": "attempt", "reason": "error"})
    assert [event for _, event, _ in rig.told(lost, again, other)] == [
        "attempt_lost",
        "job_requeued",
    ]


async def test_a_server_is_told_of_when_its_state_changes(rig):
    assert rig.told() == []  # nobody has asked it yet
    assert rig.after(Health(server=S, ok=True)) == [
        ("info", "server_state", {"server": S, "state": "up"})
    ]
    assert rig.after(Health(server=S, ok=True)) == []
    assert rig.after(StalledPublisher(server=S, stalled=True)) == [
        ("warning", "server_state", {"server": S, "state": "deaf", "was": "up"})
    ]
    down = Health(server=S, ok=False)
    assert rig.after(down, reason="s refused the connection") == [
        (
            "warning",
            "server_state",
            {"server": S, "state": "down", "was": "deaf", "reason": "s refused the connection"},
        )
    ]
    assert rig.after(down, reason="s did not answer") == []
    rig.after(Health(server=S, ok=True), StalledPublisher(server=S, stalled=False))
    [(level, _, line)] = rig.after(DrainAsked(server=S))
    assert (level, line["state"], line["was"]) == ("info", "draining", "up")
    assert line["reason"]


async def test_what_was_missed_is_remembered_for_the_page(rig):
    data = {"end": "success", "source": "audit", "missed": "deaf"}
    rig.told(*(Note("ended", JobId(str(n)), S, data) for n in range(25)))
    snapshot = await _snapshot(rig)
    assert snapshot.servers[0].missed == 25
    assert [each.job for each in snapshot.missed] == [str(n) for n in range(24, 14, -1)]


async def test_the_pace_is_that_of_what_succeeded(rig):
    done = {"outcome": "done", "reason": None, "durations_s": SPANS, "latency_s": None}
    failed = {**done, "outcome": "failed", "reason": "lost", "durations_s": {**SPANS, "run": 99.0}}
    rig.told(Note("finished", J, S, done), Note("finished", J, S, failed))
    assert (await _snapshot(rig)).servers[0].run_s == 3.0


async def _snapshot(rig):
    async with rig.overview._journal:
        return await rig.overview.snapshot()
