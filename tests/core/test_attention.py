"""What a status page says first."""

from __future__ import annotations

import pytest

from comfyd.core.attention import FAILED_MAX, RECENT_S, needs
from comfyd.core.model import JobId, Row, State
from comfyd.core.snapshot import NOT_ASKED, ServerState, ServerView, Snapshot

T = 1_900_000_000.0


def now(*servers, **more):
    return Snapshot(at=T, version="1", servers=servers, **more)


def server(state, **more):
    return ServerView(name="a", url="http://a", state=state, **more)


def failed(seq, ago_s):
    return Row(job=JobId(f"j{seq}"), seq=seq, state=State.FAILED, published_at=T - ago_s)


def said(snapshot, rows=()):
    return [(need.what, need.where) for need in needs(snapshot, rows)]


@pytest.mark.parametrize(
    ("snapshot", "rows"),
    [
        (now(), []),
        (now(server(ServerState.UP)), [failed(1, RECENT_S + 1)]),
        (now(server(ServerState.DRAINING, reason="2 prompts are left.")), []),
        (now(server(ServerState.DOWN, reason=NOT_ASKED)), []),
        (now(server(ServerState.DOWN, reason="it is off; drained", draining=True)), []),
        (now(counts={"held": 0, "failed": 9}), []),
    ],
)
def test_everything_is_fine(snapshot, rows):
    assert said(snapshot, rows) == []


@pytest.mark.parametrize(
    ("snapshot", "what", "where"),
    [
        (now(waiting="No space."), "No space.", "daemon"),
        (now(server(ServerState.DOWN, reason="refused")), "Server a is down: refused.", "servers"),
        (now(server(ServerState.DOWN)), "Server a is down.", "servers"),
        (
            now(server(ServerState.WEDGED, reason="Restart it.")),
            "Server a is wedged: Restart it.",
            "servers",
        ),
        (
            now(server(ServerState.DEAF)),
            "Server a sends no events: it works, and is polled.",
            "servers",
        ),
        (now(counts={"held": 1}), "1 job is held: release or cancel.", "held"),
        (now(counts={"held": 3}), "3 jobs are held: release or cancel.", "held"),
        (
            now(paused=True),
            "The intake is paused: files stay in new/ until comfyd resume.",
            "daemon",
        ),
        (now(server(ServerState.UP, stale=2)), "2 jobs are silent for too long.", "jobs"),
    ],
)
def test_one_thing(snapshot, what, where):
    assert said(snapshot) == [(what, where)]


def test_failures_are_news_for_an_hour():
    rows = [failed(1, 5), failed(2, RECENT_S - 1), failed(3, RECENT_S + 1)]
    assert said(now(), rows) == [("2 jobs failed within the hour.", "failed")]
    assert said(now(), rows[:1]) == [("1 job failed within the hour.", "failed")]


def test_the_worst_comes_first():
    everything = now(
        server(ServerState.DEAF),
        server(ServerState.WEDGED),
        server(ServerState.DOWN),
        waiting="No space.",
        paused=True,
        counts={"held": 1},
    )
    assert [what for what, _ in said(everything, [failed(1, 1)])] == [
        "No space.",
        "Server a is down.",
        "Server a is wedged.",
        "Server a sends no events: it works, and is polled.",
        "1 job is held: release or cancel.",
        "The intake is paused: files stay in new/ until comfyd resume.",
        "1 job failed within the hour.",
    ]


def test_more_failures_than_were_looked_at_are_said_to_be_more():
    many = [failed(seq, 1.0) for seq in range(FAILED_MAX)]
    assert said(now(), many[1:])[0][0] == "49 jobs failed within the hour."
    assert said(now(), many)[0][0] == "50 or more jobs failed within the hour."
