"""Taking up another configuration: whole or not at all, everywhere, and told to systemd."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry

from comfyd import config
from comfyd.config import Config
from comfyd.errors import ConfigError
from comfyd.metrics import Metrics
from comfyd.services.links import Links
from comfyd.services.reload import NEED_A_RESTART, Reload, changes
from comfyd.services.settings import Settings
from tests.services.test_dispatcher import Rig as DispatcherRig
from tests.services.test_dispatcher import running

SERVERS = "servers: [{name: a, url: 'http://a', insecure: true}]\n"
BASE = Path("/base")


def parsed(text: str = "") -> Config:
    return config.parse(SERVERS + text, file=BASE / "c.yaml", base=BASE)


class Rig:
    def __init__(self, nursery: trio.Nursery, inner: DispatcherRig) -> None:
        self.read: Callable[[], Config] = parsed
        self.inner = inner
        self.metrics = Metrics(CollectorRegistry())
        self.settings = Settings(parsed())
        self.refusal: ConfigError | None = None
        self.handed: list[Config] = []
        clock = inner.clock
        self.links = Links(nursery, self.settings.now, inner.inbox, self.metrics, clock)
        self.reload = Reload(
            self.settings,
            self.links,
            inner.inbox,
            inner.dispatcher,
            self.metrics,
            clock,
            reread=self.reread,
            hand_over=self.hand_over,
        )

    def reread(self) -> tuple[Config | None, list[ConfigError]]:
        try:
            return self.read(), []
        except ConfigError as error:
            return None, [error]

    def hand_over(self, new: Config) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.handed.append(new)

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"comfyd_config_last_reload_{name}")

    async def asked(self, text: str) -> dict[str, Any]:
        return await self.asked_for(lambda: parsed(text))

    async def asked_for(self, read: Callable[[], Config]) -> dict[str, Any]:
        self.read = read
        result: dict[str, Any] = (await self.reload.verb({}))["result"]
        return result


@asynccontextmanager
async def rigged() -> AsyncIterator[Rig]:
    async with running() as inner, trio.open_nursery() as nursery:
        rig = Rig(nursery, inner)
        yield rig
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await rig.links.aclose()


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


async def test_a_good_one_holds_once_the_engine_knows(autojump_clock, systemd):
    async with rigged() as rig:
        result = await rig.asked("audit: {interval: 7s}\n")
        assert result == {"ok": True, "what": "Reloaded; servers: a.", "problems": []}
        assert rig.inner.engine.policy.audit_interval_s == 7
        assert rig.settings.now.audit.interval_s == 7
        assert rig.handed == [rig.settings.now]
        assert rig.sample("successful") == 1
        assert rig.sample("success_timestamp_seconds") == rig.inner.clock.now_s()
    first, second = (systemd.recv(4096).decode().splitlines() for _ in range(2))
    assert first[0] == "RELOADING=1"
    assert first[1].startswith("MONOTONIC_USEC=")
    assert second == ["READY=1"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("audit: {interval: soon}\n", "/base/c.yaml:2:19: audit.interval: must be a time"),
        ("audit: [\n", "/base/c.yaml:3:1: is not valid YAML"),
        ("metrics: {listen: 127.0.0.1:1}\n", "metrics.listen: a change of it needs a restart"),
        ("spool: elsewhere\nretention: {done: 1d}\n", "spool: a change of it needs a restart"),
        ("state: elsewhere\n", "state: a change of it needs a restart"),
    ],
)
async def test_a_bad_one_changes_nothing(autojump_clock, systemd, text, problem):
    async with rigged() as rig:
        before = rig.settings.now
        result = await rig.asked(text)
        assert not result["ok"]
        assert result["what"] == "Nothing was changed."
        assert result["problems"][0].startswith(problem)
        assert rig.settings.now is before
        assert rig.handed == []
        assert rig.sample("successful") == 0
        assert (await rig.asked(""))["ok"]
        assert rig.sample("successful") == 1
    told = [systemd.recv(4096).decode().split("=")[0] for _ in range(4)]
    assert told == ["RELOADING", "READY"] * 2  # or systemd would wait for ever


async def test_what_one_part_refuses_holds_nowhere(autojump_clock):
    async with rigged() as rig:
        before, links = rig.settings.now, list(rig.links)
        rig.refusal = ConfigError("metrics.web_config", "cannot be used")
        result = await rig.asked("audit: {interval: 7s}\n")
        assert result["problems"] == ["metrics.web_config: cannot be used"]
        assert rig.settings.now is before
        assert list(rig.links) == links
        assert rig.inner.engine.policy.audit_interval_s == 30


async def test_a_full_disk_does_not_hold_the_answer_back_for_ever(autojump_clock):
    """It holds; only that the journal will say so takes until there is space."""
    async with rigged() as rig:
        rig.inner.ready()
        rig.inner.disk.full = 1000
        await rig.inner.inbox.claim(rig.inner.claim("fox"))
        assert (await rig.asked("jobs: {run_timeout: 9s}\n"))["ok"]
        assert rig.settings.now.jobs.run_timeout_s == 9


async def test_two_at_once_are_taken_one_after_the_other(autojump_clock):
    async with rigged() as rig:
        rig.read = lambda: parsed("watch: {settle: 5s}\n")
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(rig.reload.reload)
        assert len(rig.handed) == 2


# --- no setting is forgotten ---------------------------------------------------------------------

# Of each setting another value; those that are not here change in tests of their own.
OTHER = {
    **dict.fromkeys(
        ["tracker.connect_timeout", "tracker.ping_interval", "tracker.ping_timeout",
         "tracker.deaf_after", "tracker.reconnect_max", "history.timeout", "history.backoff",
         "completion.backoff", "audit.interval", "audit.stale_after", "audit.orphan_interval",
         "audit.lost_grace", "audit.abandon_after", "client.connect_timeout",
         "client.submit_timeout", "client.upload_timeout", "client.download_idle_timeout",
         "health.interval", "health.timeout", "watch.settle", "watch.rescan", "retention.done",
         "retention.failed", "retention.events", "jobs.run_timeout", "jobs.stall_timeout",
         "jobs.queue_timeout"], "77s"),
    "tracker.reconnect_first": "77ms",
    **dict.fromkeys(["history.attempts", "completion.attempts", "jobs.max_attempts"], "7"),
    **dict.fromkeys(["jobs.max_file_bytes", "outputs.max_bytes", "outputs.min_free_bytes"], "7MiB"),
    "outputs.include_temp": "true", "outputs.unique_prefix": "false", "workflows": "graphs",
    "log.level": "debug", "log.format": "json", "spool": "other", "state": "other",
    "metrics.listen": "127.0.0.1:7",
}  # fmt: skip
APART = {"servers", "metrics.web_config"}


def keys(of: Config) -> set[str]:
    found = set()
    for part in fields(of):
        value = getattr(of, part.name)
        inner = [each.name for each in fields(value)] if is_dataclass(value) else []
        names = [f"{part.name}.{name.removesuffix('_s')}" for name in inner] or [part.name]
        found |= set(names)
    return found


def changed(key: str) -> Config:
    section, _, name = key.partition(".")
    return parsed(f"{section}: {{{name}: {OTHER[key]}}}\n" if name else f"{key}: {OTHER[key]}\n")


def test_every_setting_is_tried_here():
    assert OTHER.keys() | APART == keys(parsed())


@pytest.mark.parametrize("key", OTHER)
def test_every_change_is_seen(key):
    assert list(changes(parsed(), changed(key))) == [key]


USERS: dict[str, Callable[[Rig], object]] = {
    "tracker": lambda rig: next(iter(rig.links)).tracker.timings,
    "client": lambda rig: vars(next(iter(rig.links)).client).copy(),
    "history": lambda rig: (vars(next(iter(rig.links)).client).copy(), rig.settings.now.history),
    "health": lambda rig: (
        vars(next(iter(rig.links)).client).copy(),
        next(iter(rig.links)).health.interval_s,
    ),
    "completion": lambda rig: rig.inner.engine.policy,
    "audit": lambda rig: rig.inner.engine.policy,
    "jobs.run_timeout": lambda rig: rig.inner.engine.policy,
    "jobs.stall_timeout": lambda rig: rig.inner.engine.policy,
}


@pytest.mark.parametrize("key", sorted(OTHER.keys() - set(NEED_A_RESTART)))
async def test_every_change_reaches_who_uses_it(autojump_clock, key):
    async with rigged() as rig:
        by_section = USERS.get(key.split(".")[0], lambda rig: rig.handed[-1:] or [parsed()])
        used = USERS.get(key, by_section)
        before = used(rig)
        assert (await rig.asked_for(lambda: changed(key)))["ok"]
        assert used(rig) != before
        assert rig.inner.engine.fleet.policy is rig.inner.engine.policy
