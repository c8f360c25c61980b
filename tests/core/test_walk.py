"""Long random walks through the explorer's world: many jobs, many servers, all that goes wrong.

The explorer visits every order of a few events; a walk goes on for hundreds of them, at odd times,
with many facts in one batch. Each is made again by its seed.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from itertools import islice

import pytest

from comfyd.core import facts, orders, submitted, wakes
from comfyd.core.fleet import Fleet
from comfyd.core.job import Job, deadline
from tests.core.explorer import POLICY, Scene, World

FAULTS = (
    "crash", "loss", "restart", "deaf", "drop", "evict", "echo", "cancel", "error", "missing",
    "partial", "hang", "off", "forget", "reject", "zombie", "stubborn", "hold", "drain", "full",
    "disk", "conflict", "retention", "remove", "away", "mean",
)  # fmt: skip
STEPS = 400  # with faults; then the world is let alone
END = 20_000  # steps by which every job must have ended


class Walk(World):
    """A world where facts come in batches and nobody is woken on the dot."""

    def __init__(self, seed: int, faults: Collection[str] = FAULTS) -> None:
        self.chance = chance = random.Random(seed)
        servers = "STU"[: chance.randint(1, 3)]
        scene = Scene(
            window=chance.randint(1, 3),
            down="".join(name for name in servers if chance.random() < 0.2),
            busy="".join(name for name in servers if chance.random() < 0.2),
            queue_s=chance.choice([None, None, 5.3, 30.1]),
            run_s=chance.choice([None, 3.7]),
            stall_s=chance.choice([None, 2.9]),
        )
        jobs = "abcdefghijklmnopqr"[: chance.randint(1, 18)]
        budget = {fault: 3 * (fault in faults) for fault in FAULTS}
        super().__init__(jobs, servers, budget, 24, scene)
        self.now_s += chance.random()
        self.told = False

    def tell(self, fact: facts.Fact) -> None:
        assert self.engine is not None
        self.engine.handle(fact, now_s=self.now_s, u=0)
        self.told = True
        if self.chance.random() < 0.6:
            self.settle()

    def settle(self) -> None:
        self.told = False
        super().settle()
        if self.chance.random() < 0.05:
            self.compare()

    def compare(self) -> None:
        """A daemon that starts from the journal now decides as the one that goes on."""
        assert self.engine is not None
        if any(server.leaving for server in self.engine.servers.values()):
            return  # that is not written down: a restart takes those servers for gone
        engine, twin = self.engine, self.loaded(crashed=False)
        assert +twin.counts == +engine.counts
        assert twin.fleet.watches.keys() == engine.fleet.watches.keys()
        for name, server in engine.servers.items():
            assert twin.servers[name].draining == server.draining
            assert twin.on_server[name].keys() == engine.on_server[name].keys()
        for job_id, job in engine.jobs.items():
            if job.row.state.in_flight:  # what nobody hears cannot stall: but for that, the same
                ours, theirs = (
                    deadline(Job(each.row, replace(each.live, stalling=True, ended=False)), POLICY)
                    for each in (job, twin.jobs[job_id])
                )
                assert ours == theirs, "a restart has changed a deadline"
        batch = twin.take(now_s=self.now_s, u=0)
        assert not any(isinstance(order, orders.Submit) for order in batch.orders)

    def crash(self) -> None:
        self.told = False
        super().crash()

    def tick(self, deadline_s: float) -> None:
        assert self.engine is not None
        self.settle()
        deadline_s = self.engine.next_deadline_s()
        if deadline_s == math.inf:
            return
        super().tick(deadline_s + self.chance.choice([0.0, 0.0, self.chance.random()]))
        for _ in range(3):  # several deadlines of one job may have passed
            self.settle()
            if self.engine.next_deadline_s() > self.now_s:
                return
            super().tick(self.now_s)
        raise AssertionError("the auditor never sleeps")

    def step(self, *, fault: bool) -> str:
        """Make one move at random, and return its name."""
        may = [
            (at, cost)
            for at, (_, _, cost) in enumerate(self.moves())
            if cost is None or (fault and self.faults and self.budget[cost])
        ]
        if not may or (self.told and self.chance.random() < 0.2):
            self.settle()
            return "settle"
        costly = [move for move in may if move[1] is not None]
        cheap = [move for move in may if move[1] is None]
        hurts = costly and (not cheap or self.chance.random() < 0.12)
        at, cost = self.chance.choice(costly if hurts else cheap)
        if cost is not None:
            self.faults, self.budget[cost] = self.faults - 1, self.budget[cost] - 1
        label, act, _ = next(islice(self.moves(), at, None))  # made before the next is thought of
        act(self)
        self.check()
        return label


def walk_to_the_end(seed: int, faults: Collection[str] = FAULTS) -> None:
    """Raises AssertionError, with the way there, if a rule is broken or a job never ends."""
    walk, trace = Walk(seed, faults), ["begin"]
    try:
        for step in range(END):
            trace.append("?")
            trace[-1] = walk.step(fault=step < STEPS)
            if walk.finished():
                break
        assert walk.finished(), "not every job has ended"
        assert walk.delivered == Counter(walk.names)
    except Exception as error:
        raise AssertionError(f"{error!r} after {' > '.join(trace[-60:])}") from error


def walk_all(faults: Collection[str] = FAULTS) -> None:
    for seed in range(100):
        walk_to_the_end(seed, faults)


@pytest.mark.parametrize("seed", range(100))
def test_every_job_ends_exactly_once(seed):
    walk_to_the_end(seed)


@pytest.mark.parametrize(
    ("where", "name", "bug", "faults", "found"),
    [
        (
            submitted,
            "given_up",
            lambda row: row.abandoned,
            ("forget", "hang"),
            "an older attempt is alive",
        ),
        (Fleet, "watch", lambda fleet, fence: None, FAULTS, "may still run"),
        (
            wakes,
            "wake_s",
            lambda job, policy: math.inf,
            FAULTS,
            "never ends|not every job has ended",
        ),
    ],
    ids=["given up in silence", "a fence that nobody heeds", "nobody is ever woken"],
)
def test_a_walk_finds_what_is_wrong(monkeypatch, where, name, bug, faults, found):
    monkeypatch.setattr(where, name, bug)
    monkeypatch.setattr("tests.core.test_walk.END", 3000)
    with pytest.raises(AssertionError, match=found):
        walk_all(faults)
