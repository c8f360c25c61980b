"""No order of events loses a job, delivers one twice, or leaves one stuck; and we would notice."""

from __future__ import annotations

import dataclasses

import pytest

from comfyd.core import finishing, lifecycle, moves, submitted
from comfyd.core.engine import Engine
from comfyd.core.facts import Collected, Published, SubmitUnknown
from comfyd.core.fleet import Fleet
from comfyd.core.job import Ask, Context, Job, Step
from comfyd.core.model import State
from comfyd.core.moves import move
from tests.core import explorer
from tests.core.explorer import PLAIN, Scene, explore

FAULTS = {
    "crash": 2, "loss": 2, "restart": 1, "deaf": 1, "drop": 1, "evict": 1, "echo": 1, "cancel": 1,
    "error": 1, "missing": 2, "partial": 1,
}  # fmt: skip


# One job on one or two servers, each time with what can go wrong in one respect, and a crash.
WORLDS = {
    "a server hangs, and may be given up": ("S", {"hang": 1, "forget": 1, "crash": 1}, 2, PLAIN),
    "one of two hangs": ("ST", {"hang": 1, "cancel": 1}, 2, PLAIN),
    "a server is switched off": ("S", {"off": 2, "cancel": 1, "crash": 1}, 2, PLAIN),
    "one of two is switched off": ("ST", {"off": 1, "crash": 1}, 1, PLAIN),
    "servers say no": ("ST", {"reject": 2, "error": 2, "crash": 1}, 2, PLAIN),
    "one says no, the other is down": ("ST", {"reject": 1, "error": 1}, 1, Scene(down="T")),
    "a server turns jobs away": ("S", {"away": 3, "crash": 1}, 3, PLAIN),
    "one of two lets jobs down": ("ST", {"away": 1, "mean": 1}, 2, PLAIN),
    "a worker dies": ("ST", {"zombie": 1, "crash": 1}, 2, PLAIN),
    "deadlines": ("S", {"stubborn": 1, "crash": 1}, 2, Scene(queue_s=2, run_s=3, stall_s=2)),
    "wishes": ("S", {"hold": 1, "cancel": 1, "crash": 1}, 2, Scene(down="S", queue_s=2)),
    "wishes about servers": ("ST", {"drain": 2, "crash": 1}, 2, PLAIN),
    "disks": ("S", {"full": 1, "disk": 1, "conflict": 1, "crash": 1}, 2, PLAIN),
    "a dead worker's server is restarted": (
        "S",
        {"zombie": 1, "crash": 1},
        2,
        Scene(restart_every_s=3.0),
    ),
    "rows that are forgotten": (
        "S",
        {"retention": 1, "hang": 1, "crash": 1, "cancel": 1},
        2,
        PLAIN,
    ),
    "a server is removed": ("ST", {"remove": 2, "crash": 1}, 2, PLAIN),
    "fetched back": ("ST", {"crash": 1, "cancel": 1}, 1, Scene(down="T", busy="S")),
}


@pytest.mark.parametrize(
    ("jobs", "servers", "faults", "most", "scene"),
    [
        ("a", "ST", FAULTS, 1, PLAIN),  # whatever goes wrong; two things: make explore
        ("ab", "S", {"crash": 1}, 1, PLAIN),  # the second waits for the first, a crash anywhere
        ("ab", "ST", {}, 0, PLAIN),  # each on its own server; with what goes wrong: make explore
        *(("a", *world) for world in WORLDS.values()),
    ],
    ids=["anything", "two jobs", "two servers", *WORLDS],
)
def test_nothing_is_lost_doubled_or_stuck(jobs, servers, faults, most, scene):
    states = explore(jobs, servers, faults, most, scene)
    assert states > 1000  # or the world got smaller than it claims to be


# --- bugs that the explorer must find ------------------------------------------------------------


def _replaced(monkeypatch: pytest.MonkeyPatch, state: State, fact: type, rule: lifecycle.Rule):
    monkeypatch.setattr(lifecycle, "TABLE", {**lifecycle.TABLE, (state, fact): rule})


def test_it_finds_a_missing_grace(monkeypatch):
    """A POST of a dead daemon arrives after we looked: two attempts on a server."""
    hasty = dataclasses.replace(explorer.POLICY, lost_grace_s=0)
    monkeypatch.setattr(explorer, "POLICY", hasty)
    with pytest.raises(AssertionError, match="an older attempt is alive"):
        explore("a", "S", {"crash": 1, "loss": 1}, 2)


def test_it_finds_a_blind_resend(monkeypatch):
    """An unknown POST that is simply sent again."""

    def resend(job: Job, fact: object, ctx: Context) -> Step:
        return moves.requeue(job, ctx)

    _replaced(monkeypatch, State.SUBMITTING, SubmitUnknown, resend)
    with pytest.raises(AssertionError, match="an older attempt is alive"):
        explore("a", "S", {"loss": 1}, 1)


def test_it_finds_a_publication_without_its_own_commit(monkeypatch):
    """Collected, and published in the same breath: after a crash nobody knows whether it was."""

    def at_once(job: Job, fact: Collected, ctx: Context) -> Step:
        return dataclasses.replace(finishing.collected(job, fact, ctx), urgent=False)

    _replaced(monkeypatch, State.COLLECTING, Collected, at_once)
    monkeypatch.setitem(_entry(monkeypatch), State.PUBLISHING, Ask.COLLECT)
    with pytest.raises(AssertionError):
        explore("a", "S", {"crash": 1}, 1)


def test_it_finds_a_fence_that_nobody_heeds(monkeypatch):
    """A server that was given up is back, and is given the job again beside its old attempt."""
    monkeypatch.setattr(Fleet, "watch", lambda fleet, fence: None)
    with pytest.raises(AssertionError, match="an attempt that may still run"):
        explore("a", "S", {"hang": 1}, 1)


def test_it_finds_a_server_that_is_let_go_too_early(monkeypatch):
    """Removed with a prompt of ours on it, of which nobody hears any more."""
    monkeypatch.setattr(Engine, "_work_of", lambda engine, server: [])
    with pytest.raises(AssertionError):
        explore("a", "ST", {"remove": 1}, 1)


def test_it_finds_an_attempt_that_is_given_up_in_silence(monkeypatch):
    monkeypatch.setattr(submitted, "given_up", lambda row: row.abandoned)
    with pytest.raises(AssertionError, match="an older attempt is alive"):
        explore("a", "ST", {"hang": 1}, 1)


def test_it_finds_a_deadline_that_never_comes(monkeypatch):
    """A silent prompt is looked at for ever."""
    monkeypatch.setattr(submitted, "deadline", lambda job, policy: None)
    with pytest.raises(AssertionError, match="never finish"):
        explore("a", "S", {}, 0, Scene(busy="S", queue_s=2, endless=True))


def _entry(monkeypatch: pytest.MonkeyPatch) -> dict[State, Ask]:
    entry = dict(moves.ON_ENTRY)
    monkeypatch.setattr(moves, "ON_ENTRY", entry)
    return entry


def test_it_finds_a_job_that_nobody_looks_after(monkeypatch):
    """No planned look after an end signal whose record is not there."""
    monkeypatch.setattr(submitted, "plan", lambda job, ask, until_s: job)
    with pytest.raises(AssertionError, match=r"stuck|never finish"):
        explore("a", "S", {"evict": 1, "deaf": 1}, 1)


def test_it_finds_a_claimed_file_removed_too_early(monkeypatch):
    monkeypatch.setitem(_entry(monkeypatch), State.PUBLISHING, Ask.RETIRE)
    with pytest.raises(AssertionError):
        explore("a", "S", {}, 0)


def test_it_finds_a_delivery_that_is_forgotten(monkeypatch):
    """Published, but sent round again."""

    def again(job: Job, fact: Published, ctx: Context) -> Step:
        return move(job, State.COLLECTING, ctx)

    _replaced(monkeypatch, State.PUBLISHING, Published, again)
    with pytest.raises(AssertionError):
        explore("a", "S", {}, 0)
