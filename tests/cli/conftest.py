"""A folder with a configuration and a spool, and the command line as a function."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from comfyd import app, config, log
from comfyd.__main__ import main
from comfyd.core.model import Row
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Batch, Event, Insert
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool

GRAPH = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 5},
    },
    "9": {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "x"},
        "_meta": {"title": "Save it"},
    },
}


@dataclass
class Site:
    """One installation: its folder, and what the command line says there."""

    home: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> Path:
        return self.home / "comfyd.yaml"

    @property
    def spool(self) -> Spool:
        return Spool(self.home / "spool")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """The exit code, stdout and stderr of ``comfyd -c CONFIG WORDS``."""
        self.capsys.readouterr()
        code = main(["-c", str(self.config), *words])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    def json(self, *words: str) -> Any:
        """The data of a command that ends well."""
        code, out, _ = self(*words, "--json")
        assert code == 0
        return json.loads(out)

    def file(self, name: str, value: object) -> str:
        """A job file beside the spool; its path."""
        path = self.home / name
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        path.write_bytes(data)
        return str(path)

    def dropped(self) -> dict[str, Any]:
        """What lies in new/, by name, decoded."""
        return {p.name: json.loads(p.read_bytes()) for p in self.spool.new.iterdir()}

    def journal(self, *rows: Row, events: tuple[Event, ...] = ()) -> None:
        """Leave a journal behind, as a daemon that ended did."""
        state = self.home / "state"
        store = SqliteStore.open(state / "comfyd.db")
        with StateLock(state / "lock").acquire():
            results = store.commit(Batch(changes=tuple(map(Insert, rows)), events=events))
            assert all(results)
            store.close()


@pytest.fixture
def site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Site:
    home = tmp_path / "home"
    home.mkdir()
    made = Site(home, capsys)
    made.config.write_text(
        "metrics: {listen: '127.0.0.1:0'}\noutputs: {min_free_bytes: 1MiB}\n"
        "watch: {settle: 200ms, rescan: 500ms}\n"
    )
    made.spool.prepare()
    monkeypatch.delenv("COMFYD_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Commands configure logging for the whole process; that must not outlive the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


Serve = Callable[..., AbstractAsyncContextManager[Simulator]]


@pytest.fixture
def daemon(site: Site, tmp_path: Path) -> Serve:
    """Runs a daemon at *site* and a simulated server for it; both end with the block."""

    @contextlib.asynccontextmanager
    async def serve(run_s: float = 0.02) -> AsyncIterator[Simulator]:
        with (tmp_path / "daemon.log").open("a") as lines, trio.fail_after(30):
            log.configure("debug", "logfmt", stream=lines)
            async with trio.open_nursery() as nursery:
                simulator = Simulator(run_s=run_s)
                url = await nursery.start(simulator.serve)
                text = site.config.read_text() + f"servers: [{{name: sim, url: '{url}'}}]\n"
                settings = config.parse(text, file=None, base=site.home)
                await nursery.start(partial(app.run, settings))
                yield simulator
                nursery.cancel_scope.cancel()

    return serve
