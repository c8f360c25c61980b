"""A daemon in a process and with a spool of its own, seen from outside as a user sees it."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio
from prometheus_client.parser import text_string_to_metric_families

from comfyd.spool.layout import Spool

ROOT: Final = Path(__file__).parents[2]
READY_S: Final = 15.0
EXIT_S: Final = 10.0

# Where the defaults are minutes, so that what they wait for happens within a test. The ratios are
# kept: a prompt is looked at long before it is believed to be lost.
QUICK: Final[dict[str, dict[str, Any]]] = {
    "tracker": {"reconnect_first": "200ms", "reconnect_max": "2s"},
    "history": {"backoff": "200ms"},
    "completion": {"backoff": "200ms"},
    "audit": {
        "interval": "1s",
        "stale_after": "2s",
        "orphan_interval": "300ms",
        "lost_grace": "1s",
    },
    "health": {"interval": "1s"},
    "watch": {"settle": "500ms", "rescan": "2s"},
    "outputs": {"min_free_bytes": "1MiB"},
}

Json = dict[str, Any]


class Daemon:
    """One spool and its daemon, which may be started again and again.

    Args:
      home: An empty folder.
      servers: The servers' URLs by name; one alone may be given as its URL, and is called local.
      settings: Sections of the configuration; each replaces those keys of QUICK.
      module: What is run as comfyd.

    """

    def __init__(
        self,
        home: Path,
        servers: str | Mapping[str, str],
        settings: dict[str, Json] | None = None,
        *,
        module: str = "comfyd",
    ) -> None:
        self.home = home
        self.module = module
        self.spool = Spool(home / "spool")
        self.state = home / "state"
        self.config = home / "comfyd.yaml"
        self._process: trio.Process | None = None
        self._log = home / "daemon.log"
        self._log_from = 0
        self._http = ""
        self.spool.prepare()
        named = {"local": servers} if isinstance(servers, str) else servers
        document: Json = {
            "spool": "spool",
            "state": "state",
            "servers": [{"name": name, "url": url} for name, url in named.items()],
            "metrics": {"listen": "127.0.0.1:0"},
            "log": {"format": "json"},
        }
        for name in QUICK.keys() | (settings or {}).keys():
            document[name] = {**QUICK.get(name, {}), **(settings or {}).get(name, {})}
        self.config.write_text(json.dumps(document, indent=1))

    # --- its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process; do not wait."""
        assert self._process is None
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        self._http = ""
        command = [sys.executable, "-m", self.module, "run", "-c", str(self.config)]
        with open(self._log, "ab") as log:  # noqa: ASYNC230 - one local open
            self._process = await trio.lowlevel.open_process(
                command, cwd=ROOT, stdin=-3, stdout=log, stderr=log
            )

    async def ready(self) -> None:
        """Until it says that it is ready."""
        with trio.fail_after(READY_S):
            while not self._http:
                self.check_alive()
                for event in self.events():
                    if event["event"] == "ready":
                        self._http = event["http"]
                await trio.sleep(0.02)

    def check_alive(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"the daemon ended by itself with {code}:\n{self.log()[-6000:]}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        """SIGKILL: nothing in the process can do anything about it."""
        self.check_alive()
        await self.bury()

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        process = self._process
        assert process is not None
        process.terminate()
        with trio.move_on_after(EXIT_S):
            code = await process.wait()
            self._process = None
            return code
        raise AssertionError(f"it did not end within {EXIT_S} s:\n{self.log()[-6000:]}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Started and ready; stopped at the end, in good order unless the block failed."""
        await self.start()
        try:
            await self.ready()
            yield
            if self._process is not None:
                assert await self.stop() == 0, self.log()[-6000:]
        finally:
            await self.bury()

    async def bury(self) -> None:
        """Make sure that no process is left."""
        process, self._process = self._process, None
        if process is not None:
            await end(process)

    @property
    def http_url(self) -> str:
        """Where its HTTP side is, once it is ready."""
        return self._http

    def rewrite(self, **sections: object) -> None:
        """Replace these sections of its configuration, as an editor does: at once."""
        document = json.loads(self.config.read_text()) | sections
        aside = self.config.with_suffix(".new")
        aside.write_text(json.dumps(document, indent=1))
        aside.rename(self.config)

    # --- what it shows ---------------------------------------------------------------------------

    def log(self) -> str:
        """What the present process, or the last one, has said."""
        with open(self._log, encoding="utf-8", errors="replace") as file:
            file.seek(self._log_from)
            return file.read()

    def events(self) -> Iterator[Json]:
        """Its log lines, but for those that are no JSON: a traceback, or half a line."""
        for line in self.log().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event

    async def get(self, path: str, headers: dict[str, str] | None = None) -> bytes:
        """GET *path* from its HTTP side."""
        return await trio.to_thread.run_sync(fetch, self._http + path, headers)

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: ``name{label="value"}`` to its value."""
        return samples((await self.get("/metrics")).decode())

    # --- the spool -------------------------------------------------------------------------------

    def drop(self, name: str, content: object) -> None:
        """Put *content* into ``new/`` as users do: written aside, then renamed."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        aside = self.spool.tmp / f"{name}.part"
        aside.write_bytes(data)
        aside.rename(self.spool.new / name)

    def finished(self) -> int:
        """Folders in ``done/`` and ``failed/``."""
        return len(os.listdir(self.spool.done)) + len(os.listdir(self.spool.failed))

    async def finish(self, count: int, *, within_s: float) -> None:
        """Until *count* jobs lie in ``done/`` and ``failed/``."""
        with trio.move_on_after(within_s) as scope:
            while self.finished() < count:
                if self._process is not None:
                    self.check_alive()
                await trio.sleep(0.05)
        assert not scope.cancelled_caught, (
            f"{self.finished()} of {count} finished in {within_s} s:\n{self.log()[-6000:]}"
        )

    def results(self) -> dict[str, Json]:
        """The manifest of every finished job, by job id."""
        manifests = [
            *self.spool.done.glob("*/result.json"),
            *self.spool.failed.glob("*/error.json"),
        ]
        return {path.parent.name: json.loads(path.read_bytes()) for path in manifests}


async def end(process: trio.Process) -> None:
    """Kill *process* and wait until it is gone, whoever is cancelled."""
    process.kill()
    with trio.CancelScope(shield=True):
        await process.wait()


def fetch(url: str, headers: dict[str, str] | None = None) -> bytes:
    """GET *url*. Blocking."""
    request = urllib.request.Request(url, headers=headers or {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


def samples(text: str) -> dict[str, float]:
    """The samples of an exposition, by name and labels as Prometheus writes them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
