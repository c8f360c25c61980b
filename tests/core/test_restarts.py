"""A wedged server is restarted when it may be, and not more often, whatever crashes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from comfyd.core import facts
from comfyd.core.engine import RESTARTED, Engine
from comfyd.core.model import ServerName
from comfyd.core.orders import Restart
from comfyd.core.policy import Policy
from comfyd.core.server import Server

A = ServerName("a")
EVERY_S = 1800.0
POLICY = Policy()


class Rig:
    def __init__(self, every_s: float | None = EVERY_S, settings: dict[str, Any] | None = None):
        self.now_s = 10_000.0
        server = Server(name=A, origin="http://a", restart_every_s=every_s)
        self.engine = Engine([server], POLICY, Counter())
        self.engine.load([], crashed=False, now_s=self.now_s, u=0.0, settings=settings or {})
        self.settings: dict[str, Any] = {}
        self.tell(facts.Health(server=A, ok=True))
        self.tell(facts.Connected(server=A, client_id="c"))

    def tell(self, fact: facts.Fact, after_s: float = 0.0) -> list[Restart]:
        self.now_s += after_s
        self.engine.handle(fact, now_s=self.now_s, u=0.0)
        batch = self.engine.take(now_s=self.now_s, u=0.0)
        self.settings |= dict(batch.settings)
        given = [order for order in batch.orders if isinstance(order, Restart)]
        assert not given or (batch.urgent and RESTARTED in dict(batch.settings))
        return given

    def idle(self, after_s: float = 0.0) -> list[Restart]:
        """Prompts wait there, and none runs."""
        return self.tell(facts.QueueLooked(server=A, running=0, pending=2), after_s)

    def wedge(self) -> list[Restart]:
        return self.idle() + self.idle(POLICY.wedge_after_s)


def test_a_wedged_server_is_restarted_once_and_again_only_after_the_interval():
    rig = Rig()
    [order] = rig.wedge()
    assert order.server == A
    assert "worker has died" in order.why
    assert rig.settings == {RESTARTED: {A: rig.now_s}}
    assert rig.engine.next_deadline_s() == rig.now_s + EVERY_S
    assert rig.idle(EVERY_S - 1) == []
    assert len(rig.tell(facts.Tick(), 1.0)) == 1


def test_one_that_is_well_again_is_left_alone():
    rig = Rig()
    assert len(rig.wedge()) == 1
    assert rig.tell(facts.Disconnected(server=A, cause="closed"), 5.0) == []
    assert rig.tell(facts.Connected(server=A, client_id="d"), 5.0) == []
    assert rig.tell(facts.Tick(), EVERY_S) == []
    assert rig.engine.next_deadline_s() > 1e9


def test_a_restart_is_remembered_by_the_next_daemon():
    first = Rig()
    assert len(first.wedge()) == 1
    second = Rig(settings=first.settings)
    assert second.wedge() == []
    assert len(second.idle(EVERY_S)) == 1


@pytest.mark.parametrize(
    "settings", [{RESTARTED: {A: 1e12}}, {RESTARTED: [1]}, {RESTARTED: {A: "x"}}]
)
def test_a_time_that_cannot_be_keeps_it_back_for_one_interval_at_most(settings):
    rig = Rig(settings=settings)
    rig.wedge()
    rig.idle(EVERY_S)
    assert set(rig.settings) == {RESTARTED}


def test_none_is_restarted_that_nobody_allowed_or_that_does_not_answer():
    assert Rig(every_s=None).wedge() == []
    rig = Rig()
    rig.idle()
    rig.tell(facts.Health(server=A, ok=False))
    assert rig.tell(facts.Tick(), 1000.0) == []
