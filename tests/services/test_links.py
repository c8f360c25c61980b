"""Links are started, replaced and ended one at a time: over real sockets, where those count."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from comfyd import config
from comfyd.comfyui.client import Client
from comfyd.config import Config
from comfyd.core import orders
from comfyd.core.facts import (
    Answer,
    Connected,
    Disconnected,
    Fact,
    Fenced,
    Presence,
    Probed,
    QueueLooked,
    Token,
)
from comfyd.core.model import Fence, JobId, Row, ServerName, State, prompt_id_of
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.inbox import Inbox
from comfyd.services.link import Users
from comfyd.services.links import Links
from comfyd.services.prober import Prober
from comfyd.services.settings import Settings
from comfyd.services.space import Space, disks
from comfyd.services.workshop import Workshop
from comfyd.spool.layout import Spool
from tests.services.front import Front

PATIENCE_S = 20
WS = b"GET /ws"
J = JobId("fox.00000000000000000000000001")


class Rig:
    def __init__(self, tmp_path: Path, nursery: trio.Nursery, **servers: str) -> None:
        self.base = tmp_path
        self.inbox = Inbox(lambda prompt_id: True)
        self.metrics = Metrics(CollectorRegistry())
        self.news: list[Fact] = []
        self.links = Links(nursery, self.configured(**servers), self.inbox, self.metrics, Clock())
        for link in list(self.links):
            self.links.start(link.name, link.origin)

    def configured(self, more: str = "", **servers: str) -> Config:
        """Args: the rest of each server's entry, by name; and other sections."""
        entries = "".join(f"- {{name: {name}, {rest}}}\n" for name, rest in servers.items())
        return config.parse(f"servers:\n{entries}{more}", file=None, base=self.base)

    def reload(self, more: str = "", **servers: str) -> None:
        new = self.configured(more, **servers)
        self.links.take_up(new, self.links.prepare(new))

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.news += self.inbox.take()
            await trio.sleep(0.01)

    def told(self, kind: type[Connected | Disconnected], server: str) -> list[str]:
        found = [fact for fact in self.news if isinstance(fact, kind) and fact.server == server]
        return [fact.cause if isinstance(fact, Disconnected) else "" for fact in found]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def rigged(tmp_path: Path, **servers: str) -> AsyncIterator[Rig]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            rig = Rig(tmp_path, nursery, **servers)
            await rig.until(lambda: all(rig.told(Connected, name) for name in servers))
            yield rig
            nursery.cancel_scope.cancel()
        await rig.links.aclose()


async def test_other_headers_are_a_new_connection_for_that_server_alone(tmp_path):
    async with Front.serving() as one, Front.serving() as other:
        a, b = f"url: '{one.url}'", f"url: '{other.url}'"
        async with rigged(tmp_path, a=f"{a}, headers: {{X-Site: old}}", b=b) as rig:
            rig.reload(a=f"{a}, headers: {{X-Site: new}}", b=b)
            await rig.until(lambda: len(rig.told(Connected, "a")) == 2)
            assert rig.told(Disconnected, "a") == ["reload"]
            assert rig.told(Disconnected, "b") == []
            await rig.until(lambda: rig.sample("comfyd_websocket_connected", server="a"))
        keys = [heard.lower().partition(b"x-site: ")[2][:3] for heard in one.requests(WS)]
        assert keys == [b"old", b"new"]
        assert len(other.requests(WS)) == 1


async def test_other_timeouts_end_no_connection(tmp_path):
    async with Front.serving() as front:
        entry = f"url: '{front.url}'"
        async with rigged(tmp_path, a=entry) as rig:
            (link,) = rig.links
            more = (
                "tracker: {ping_interval: 7s}\nclient: {submit_timeout: 9s}\n"
                "health: {interval: 11s}\nhistory: {timeout: 13s}\n"
            )
            rig.reload(more, a=f"{entry}, window: 3")
            assert list(rig.links) == [link]
            assert link.tracker.timings.ping_interval_s == 7
            assert link.health.interval_s == 11
            assert (link.client._submit_timeout_s, link.client._history_timeout_s) == (9, 13)
            await trio.sleep(0.05)
        assert len(front.requests(WS)) == 1


async def test_a_link_goes_when_nobody_uses_it_any_more(tmp_path):
    async with Front.serving() as front, rigged(tmp_path, a=f"url: '{front.url}'") as rig:
        (link,) = rig.links
        link.users.join()
        rig.links.retire(link.name, link.origin)
        assert rig.links.of(link.name, link.origin) is None
        assert rig.sample("comfyd_websocket_connected", server="a") is None
        assert await link.client.remaining() == 0  # it is still open for who has it
        link.users.leave()
        await rig.until(lambda: front.simulator.connections == 0)


async def test_one_that_is_dismissed_as_it_is_configured_again_is_made_anew(tmp_path):
    async with Front.serving() as front:
        entry = f"url: '{front.url}'"
        async with rigged(tmp_path, a=entry) as rig:
            (link,) = rig.links
            rig.reload(a=entry)
            rig.links.retire(link.name, link.origin)  # decided before the engine knew of it
            rig.links.start(link.name, link.origin)
            await rig.until(lambda: len(rig.told(Connected, "a")) == 2)
            assert rig.sample("comfyd_websocket_connected", server="a") == 1


async def test_a_link_may_go_at_any_moment_of_its_tasks(tmp_path):
    """A task that was about to ask something when it was cancelled finds the client open."""
    async with Front.serving() as front:
        entry = f"url: '{front.url}'"
        async with rigged(tmp_path, a=entry) as rig:
            for _ in range(20):
                (link,) = rig.links
                await rig.until(partial(getattr, link.health, "stats"))
                await trio.sleep(0.01)  # it waits for its next turn
                link.health.poke()
                rig.links.retire(link.name, link.origin)
                rig.links.start(link.name, link.origin)


async def test_a_url_that_was_changed_back_leaves_nothing(tmp_path):
    async with Front.serving() as front:
        entry, other = f"url: '{front.url}'", "url: 'http://127.0.0.1:9'"
        async with rigged(tmp_path, a=entry) as rig:
            (link,) = rig.links
            rig.reload(a=other)
            assert len(rig.links) == 2
            rig.reload(a=entry)
            assert list(rig.links) == [link]


async def test_the_engine_may_be_a_moment_behind(tmp_path):
    """It makes room for a URL that the file has just taken back."""
    async with Front.serving() as front:
        entry, other = f"url: '{front.url}'", "url: 'http://127.0.0.1:9'"
        async with rigged(tmp_path, a=entry) as rig:
            (link,) = rig.links
            rig.reload(a=other)
            rig.reload(a=entry)
            rig.links.retire(link.name, link.origin)
            rig.links.start(link.name, "http://127.0.0.1:9")
            assert list(rig.links) == []
            rig.links.retire(link.name, "http://127.0.0.1:9")  # it has been told by now
            rig.links.start(link.name, link.origin)
            await rig.until(lambda: len(rig.told(Connected, "a")) == 2)


async def test_nobody_waits_for_users_that_never_were(autojump_clock):
    users = Users()
    await users.gone()
    users.join()
    users.join()
    users.leave()
    with trio.move_on_after(5) as waited:
        await users.gone()
    assert waited.cancelled_caught
    users.leave()
    await users.gone()


# --- what a prober was asked ---------------------------------------------------------------------


def probe(seq: int) -> orders.Probe:
    row = Row(
        job=J, seq=1, state=State.SUBMITTED, attempt=1, server=ServerName("a"), origin="http://a",
        prompt_id=prompt_id_of(J, 1), client_id="c", claimed_at=1.0,
    )  # fmt: skip
    return orders.Probe(token=Token(J, 1, seq), row=row)


@pytest.mark.parametrize("under_way", [False, True])
async def test_what_an_old_link_was_asked_the_new_one_answers(under_way):
    """Or the job would wait for ever for an answer to an order that nobody has."""
    async with Front.serving() as front:
        answers: list[Answer | Fenced | QueueLooked] = []
        client = Client(
            front.url, connect_timeout_s=5, submit_timeout_s=5, history_timeout_s=5,
            health_timeout_s=5, upload_timeout_s=5, download_idle_timeout_s=5,
        )  # fmt: skip
        old, new = (Prober(ServerName("a"), client, answers.append) for _ in range(2))
        with trio.fail_after(PATIENCE_S):
            front.simulator.faults.set("half-open=http")
            old.ask(probe(1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(old.run)
                await trio.sleep(0.1 if under_way else 0)
                old.ask(probe(2))
                nursery.cancel_scope.cancel()
            front.simulator.faults.clear()
            for question in old.unanswered():
                new.ask(question)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(new.run)
                while sum(isinstance(a, Probed) for a in answers) < 2:  # noqa: ASYNC110 - a list tells nobody
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            await client.aclose()
        assert {a.token.seq for a in answers if isinstance(a, Probed)} == {1, 2}
        assert new.unanswered() == []


async def test_a_fence_on_a_server_that_was_just_taken_away_is_answered(tmp_path):
    """The engine may still speak of it: two reloads came faster than it took the first one up."""
    here = {"b": "url: 'http://127.0.0.1:9'"}
    fence = Fence(prompt_id=prompt_id_of(J, 1), job=J, server=ServerName("a"), origin="http://gone")
    async with trio.open_nursery() as nursery:
        rig = Rig(tmp_path, nursery, **here)
        space = Space(disks(tmp_path, tmp_path, 0), rig.inbox.put)
        shells = rig.links, Spool(tmp_path), Settings(rig.configured(**here))
        workshop = Workshop(nursery, *shells, rig.inbox, rig.metrics, Clock(), space)
        workshop.perform(orders.Fence(fence=fence))
        (answer,) = [fact for fact in rig.inbox.take() if isinstance(fact, Fenced)]
        nursery.cancel_scope.cancel()
    await rig.links.aclose()
    assert (answer.prompt_id, answer.presence) == (fence.prompt_id, Presence.UNKNOWN)
