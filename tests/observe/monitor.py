"""A Prometheus and an Alertmanager of our own, on the loopback address, gone at the end.

Both are Debian's (packages ``prometheus`` and ``prometheus-alertmanager``); their services are not
touched. What they are asked is asked over HTTP, as Grafana and people ask.
"""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import trio
import yaml

from tests.endtoend.daemon import end

READY_S: Final = 30.0
LOOK_S: Final = 0.25
SCRAPE_S: Final = 2
PROGRAMS: Final = {
    "prometheus": ("prometheus",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
}


class Alert(NamedTuple):
    """One alert at Alertmanager; *instance* is "" if it is about none."""

    name: str
    instance: str


class Missing(Exception):
    """A program is not installed."""


def program(name: str) -> str:
    """The path of one of PROGRAMS.

    Raises:
      Missing: with a sentence that says how to get it.

    """
    for candidate in PROGRAMS[name]:
        if (path := shutil.which(candidate)) is not None:
            return path
    raise Missing(
        f"{name} is not installed; on Debian: apt-get install prometheus prometheus-alertmanager"
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _ask(url: str, form: Mapping[str, str] | None) -> Any:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as answer:
        return json.loads(answer.read() or b"null")


async def ask(url: str, form: Mapping[str, str] | None = None) -> Any:
    """GET *url*, or POST *form* to it; the JSON that comes back.

    Raises:
      OSError: It does not answer, or not with 200.

    """
    return await trio.to_thread.run_sync(_ask, url, form)


@dataclass
class Monitor:
    """Both programs, and what they know.

    Attributes:
      active: The alerts that Alertmanager has now.
      ever: Every one that it ever had.

    """

    prometheus: str
    alertmanager: str
    active: set[Alert] = field(default_factory=set)
    ever: set[Alert] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, home: Path, rules: Mapping[str, Any], targets: Mapping[str, str]
    ) -> AsyncIterator[Monitor]:
        """Started, ready, watching *targets* (address by name) by *rules*; killed at the end."""
        ours = cls(f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}")
        home.mkdir()  # noqa: ASYNC240 - local, and once
        (home / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
        (home / "prometheus.yml").write_text(yaml.safe_dump(ours._settings(targets)))
        (home / "alertmanager.yml").write_text(
            yaml.safe_dump({"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]})
        )
        manager = [
            program("alertmanager"),
            f"--config.file={home}/alertmanager.yml",
            f"--storage.path={home}/alertmanager",
            f"--web.listen-address={_authority(ours.alertmanager)}",
            "--cluster.listen-address=",
        ]
        monitor = [
            program("prometheus"),
            f"--config.file={home}/prometheus.yml",
            f"--storage.tsdb.path={home}/prometheus",
            f"--web.listen-address={_authority(ours.prometheus)}",
            "--rules.alert.resend-delay=1s",
            "--enable-feature=exemplar-storage",
        ]
        async with (
            _process(manager, home / "alertmanager.log"),
            _process(monitor, home / "prometheus.log"),
            trio.open_nursery() as nursery,
        ):
            with trio.fail_after(READY_S):
                for url in (ours.alertmanager, ours.prometheus):
                    await ours._ready(url)
            nursery.start_soon(ours._watch)
            yield ours
            nursery.cancel_scope.cancel()

    def _settings(self, targets: Mapping[str, str]) -> dict[str, Any]:
        pace = f"{SCRAPE_S}s"
        return {
            "global": {
                "scrape_interval": pace,
                "scrape_timeout": pace,
                "evaluation_interval": pace,
            },
            "rule_files": ["rules.yaml"],
            "alerting": {
                "alertmanagers": [
                    {"static_configs": [{"targets": [_authority(self.alertmanager)]}]}
                ]
            },
            "scrape_configs": [
                {
                    "job_name": "comfyd",
                    "static_configs": [
                        {"targets": [address], "labels": {"instance": name}}
                        for name, address in targets.items()
                    ],
                }
            ],
        }

    async def _ready(self, url: str) -> None:
        while True:
            try:
                await trio.to_thread.run_sync(partial(urllib.request.urlopen, f"{url}/-/ready"))
                return
            except OSError:
                await trio.sleep(0.1)

    async def _watch(self) -> NoReturn:
        while True:
            told = await ask(f"{self.alertmanager}/api/v2/alerts")
            labels = [alert["labels"] for alert in told]
            self.active = {Alert(each["alertname"], each.get("instance", "")) for each in labels}
            self.ever |= self.active
            await trio.sleep(LOOK_S)

    async def until(self, condition: Callable[[], bool], *, within_s: float) -> bool:
        """Whether *condition* of what is known here came true in time."""
        with trio.move_on_after(within_s):
            while not condition():  # noqa: ASYNC110 - nobody tells
                await trio.sleep(LOOK_S)
            return True
        return False

    async def now(self, expr: str) -> list[dict[str, Any]]:
        """The series that *expr* has now."""
        found = await ask(f"{self.prometheus}/api/v1/query", {"query": expr})
        series: list[dict[str, Any]] = found["data"]["result"]
        return series

    async def between(self, expr: str, from_s: float, to_s: float) -> list[dict[str, Any]]:
        """The series that *expr* had from *from_s* to *to_s*, seconds since the epoch."""
        form = {"query": expr, "start": f"{from_s}", "end": f"{to_s}", "step": "2"}
        found = await ask(f"{self.prometheus}/api/v1/query_range", form)
        series: list[dict[str, Any]] = found["data"]["result"]
        return series

    async def exemplars(self, metric: str, from_s: float, to_s: float) -> list[dict[str, Any]]:
        """The exemplars that were stored of *metric*, each with its labels."""
        form = {"query": metric, "start": f"{from_s}", "end": f"{to_s}"}
        found = await ask(f"{self.prometheus}/api/v1/query_exemplars", form)
        return [exemplar for series in found["data"] for exemplar in series["exemplars"]]


def _authority(url: str) -> str:
    return url.removeprefix("http://")


@asynccontextmanager
async def _process(command: list[str], log: Path) -> AsyncIterator[None]:
    with open(log, "wb") as told:  # noqa: ASYNC230 - one local open
        process = await trio.lowlevel.open_process(command, stdin=-3, stdout=told, stderr=told)
    try:
        yield
    finally:
        await end(process)
