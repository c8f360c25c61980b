"""``comfyd submit --wait``: by the folders alone, by the journal, and with a daemon at work."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from comfyd.cli import wait
from comfyd.core.model import JobId, Outcome, Row, Staged, State
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Alias, Batch, Insert
from tests.cli.conftest import GRAPH, Serve, Site


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "TICK_S", 0.02)
    monkeypatch.setattr(wait, "ASK_AGAIN_S", 0.1)


class Consumer(threading.Thread):
    """Publishes an end for each job dropped, as a daemon would. *end* is the manifest."""

    def __init__(self, site: Site, place: str, end: dict[str, Any] | bytes) -> None:
        super().__init__(daemon=True)
        self.site, self.place, self.end = site, place, end
        self.stopping = threading.Event()

    def run(self) -> None:
        spool = self.site.spool
        manifest = "result.json" if self.place == "done" else "error.json"
        while not self.stopping.wait(0.02):
            for path in spool.new.iterdir():
                folder = spool.stage / path.stem
                folder.mkdir()
                data = self.end if isinstance(self.end, bytes) else json.dumps(self.end).encode()
                (folder / manifest).write_bytes(data)
                path.rename(spool.claimed / path.name)
                folder.rename(spool.root / self.place / path.stem)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join(5)


DONE = {"state": "done", "outputs": [{}, {}], "durations_s": {"total": 1.25}, "server": "sim"}
ENDS: list[tuple[str, dict[str, Any] | bytes, int, str]] = [
    ("done", DONE, 0, "done in 1.2 s, 2 files"),
    ("failed", {"state": "failed", "message": "Node 2\x1b broke.\n"}, 1, "failed: Node 2� broke. "),
    ("failed", {"state": "cancelled", "message": "By hand."}, 1, "cancelled: By hand."),
    ("failed", b"{", 1, "failed"),
    ("failed", b"[]", 1, "failed"),
    ("done", {"state": 7, "outputs": 3, "durations_s": []}, 0, "done in 0 files"),
]


@pytest.mark.parametrize(("place", "end", "code", "told"), ENDS)
def test_folders_alone_tell_the_end(
    place: str, end: dict[str, Any] | bytes, code: int, told: str, site: Site
):
    with Consumer(site, place, end):
        found, out, err = site("submit", site.file("fox.json", GRAPH), "--wait", "--timeout", "20s")
    assert found == code
    last = err.splitlines()[-1]
    assert last == f"{out.strip()}: {told}" or "in 0 files" in told


def test_json_tells_every_end_at_once(site: Site):
    path = site.file("fox.json", GRAPH)
    with Consumer(site, "done", DONE):
        code, out, _ = site("submit", path, path, "--wait", "--json", "--timeout", "20s")
    assert code == 0
    for job in json.loads(out)["jobs"]:
        assert job["state"] == "done"
        assert Path(job["folder"]).is_dir()


def test_time_runs_out_but_the_jobs_go_on(site: Site):
    code, out, err = site("submit", site.file("fox.json", GRAPH), "--wait", "--timeout", "100ms")
    assert code == 1
    assert "1 of 1 jobs have not ended yet" in err
    assert "no daemon is running" in err
    assert list(site.dropped()) == [f"{out.strip()}.json"]


@pytest.mark.parametrize(("state", "code"), [(State.DONE, 0), (State.CANCELLED, 1)])
def test_a_folder_taken_away_is_found_in_the_journal(state: State, code: int, site: Site):
    def play() -> None:
        while not (found := list(site.spool.new.iterdir())):
            time.sleep(0.01)
        row = Row(
            job=JobId(found[0].stem),
            seq=1,
            state=state,
            outcome=Outcome(state=state),
            staged=Staged(manifest_sha256="0" * 64, outputs=3),
            published_at=1.0,
            retired=True,
        )
        site.journal(row)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    found, _, err = site("submit", site.file("fox.json", GRAPH), "--wait", "--timeout", "20s")
    thread.join(5)
    assert found == code
    assert "taken away" in err


def test_a_silent_daemon_leaves_the_folders_to_be_watched(site: Site):
    site.journal()
    with (
        StateLock(site.home / "state" / "lock").acquire(),
        Consumer(site, "done", DONE),
    ):
        found, _, err = site("submit", site.file("fox.json", GRAPH), "--wait", "--timeout", "20s")
    assert found == 0
    assert "no daemon" not in err


async def test_a_daemon_works_while_we_wait(site: Site, daemon: Serve):
    failing = {**GRAPH, "1": {"class_type": "NoSuchNode", "inputs": {}}}
    good, bad = site.file("good.json", GRAPH), site.file("bad.json", failing)
    async with daemon():
        code, out, err = await trio.to_thread.run_sync(
            lambda: site("submit", good, bad, good, "--wait", "--timeout", "20s")
        )
    assert code == 1
    ids = out.split()
    assert f"{ids[0]}: done" in err
    assert f"{ids[1]}: failed: " in err
    assert "NoSuchNode" in err
    assert f"{ids[2]}: done" in err
    # Only ends are told in a pipe.
    assert len(err.splitlines()) == 3


async def test_a_consumer_may_take_results_away_while_we_wait(site: Site, daemon: Serve):
    taken = site.home / "taken"
    taken.mkdir()

    def take() -> None:
        while not stopping.is_set():
            for folder in site.spool.done.iterdir():
                if (folder / "result.json").exists():
                    shutil.move(folder, taken / folder.name)

    stopping = threading.Event()
    consumer = threading.Thread(target=take, daemon=True)
    paths = [site.file(f"{n}.json", GRAPH) for n in range(6)]
    async with daemon():
        consumer.start()
        code, out, _ = await trio.to_thread.run_sync(
            lambda: site("submit", *paths, "--wait", "--timeout", "20s")
        )
        stopping.set()
    consumer.join(5)
    assert code == 0
    assert {folder.name for folder in taken.iterdir()} == set(out.split())


KEYED = {"workflow": GRAPH, "key": "nightly-1"}


async def test_what_was_absorbed_is_followed_to_the_job_that_it_is(site: Site, daemon: Serve):
    path = site.file("fox.json", KEYED)
    other = site.file("cat.json", {**KEYED, "priority": 1})
    async with daemon() as simulator:
        first, second = await trio.to_thread.run_sync(
            lambda: [site("submit", path, "--wait", "--timeout", "20s") for _ in range(2)]
        )
        third = await trio.to_thread.run_sync(
            lambda: site("submit", other, "--wait", "--timeout", "20s")
        )
        name = second[1].strip()
        story = await trio.to_thread.run_sync(lambda: site.json("show", name))
        assert simulator.posts.total() == 1
    job = first[1].strip()
    assert (first[0], second[0]) == (0, 0)
    assert f"{name}: done as {job} in " in second[2]
    assert story["job"] == job
    assert third[0] == 1
    assert f"Job {job} has the same key and other content" in third[2]
    assert list(site.spool.claimed.iterdir()) == []


def test_without_a_daemon_the_journal_tells_what_was_absorbed(site: Site):
    job = JobId("fox.01K0000000000000000000000A")
    done = Row(job=job, seq=1, state=State.DONE, key="nightly-1", published_at=1.0, retired=True)

    def play() -> None:
        while not (found := list(site.spool.new.iterdir())):
            time.sleep(0.01)
        alias = Alias(name=JobId(found[0].stem), job=job)
        store = SqliteStore.open(site.home / "state" / "comfyd.db")
        with StateLock(site.home / "state" / "lock").acquire():
            assert all(store.commit(Batch(changes=(Insert(row=done), alias))))
            store.close()

    thread = threading.Thread(target=play, daemon=True)
    (site.spool.done / job).mkdir()
    (site.spool.done / job / "result.json").write_text(json.dumps(DONE))
    thread.start()
    path = site.file("fox.json", KEYED)
    code, out, _ = site("submit", path, "--wait", "--json", "--timeout", "20s")
    thread.join(5)
    assert code == 0
    [told] = json.loads(out)["jobs"]
    assert (told["known_as"], told["folder"]) == (job, str(site.spool.done / job))
    assert told["job"] != job
