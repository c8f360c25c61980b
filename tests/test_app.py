"""The composed daemon, in process: start, stop, crash and come back."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from functools import partial
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from comfyd import app, config, sdnotify
from comfyd.config import Config
from comfyd.core.model import JobId, Row, State, prompt_id_of
from comfyd.errors import ConfigError, DiskFull, JournalError, JournalTooNew, SpoolBusy
from comfyd.journal.lock import StateLock
from comfyd.journal.schema import APPLICATION_ID
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.services import space, submitter
from comfyd.services.workshop import OrderFailed
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool, drop

GRAPH = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1},
    },
    "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}

AUDIT = "{lost_grace: 100ms, orphan_interval: 50ms}"


def settings(tmp_path: Path, url: str, **more: str) -> Config:
    lines = [
        f"servers: [{{name: s, url: '{url}'}}]",
        "metrics: {listen: 127.0.0.1:0}",
        "outputs: {min_free_bytes: 1MiB}",
        *(f"{key}: {value}" for key, value in {"audit": AUDIT, **more}.items()),
    ]
    path = tmp_path / "comfyd.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return config.load(path)


def stored(configured: Config, job: JobId) -> Row:
    journal = open_readonly(configured.state / "comfyd.db")
    try:
        row = journal.get(job)
    finally:
        journal.close()
    assert row is not None
    return row


async def until(condition, within_s: float = 15.0) -> None:
    with trio.fail_after(within_s):
        while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110 - folders tell nobody
            await trio.sleep(0.02)


async def test_a_job_goes_through_and_the_end_is_orderly(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        job = await trio.to_thread.run_sync(drop, spool, "fox.json", json.dumps(GRAPH).encode())
        await until((spool.done / job / "result.json").exists)
        await until(lambda: not any(spool.claimed.iterdir()))
        seen = await daemon.snapshot()
        assert seen.counts["done"] == 1
        assert [server.state.value for server in seen.servers] == ["up"]
        daemon.stop()
    row = stored(configured, job)
    assert (row.state, row.retired) == (State.DONE, True)  # the last, lazy change was flushed
    assert dict(simulator.executions) == {row.prompt_id: 1}


async def test_a_server_that_comes_back_is_listened_to_at_once(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    url = await nursery.start(simulator.serve, 0)
    late = "{reconnect_first: 30s, reconnect_max: 30s}"
    configured = settings(tmp_path, url, tracker=late, health="{interval: 100ms}")

    async def shown(word: str) -> None:
        with trio.fail_after(10):
            while (await daemon.snapshot()).servers[0].tracker != word:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.02)

    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await shown("connected")
        simulator.kill()
        await shown("backoff")
        await trio.sleep(0.3)
        simulator.revive()
        await shown("connected")
        daemon.stop()


async def test_below_the_reserve_files_stay_in_new_and_it_says_why(tmp_path, nursery, monkeypatch):
    free = [0]
    monkeypatch.setattr(space, "free_bytes", lambda found: free[0])
    monkeypatch.setattr(space, "LOOK_S", 0.05)
    simulator = Simulator(run_s=0.0)
    url = await nursery.start(simulator.serve, 0)
    configured = settings(tmp_path, url, watch="{settle: 100ms}")
    spool = Spool(configured.spool)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        job = await trio.to_thread.run_sync(drop, spool, "fox.json", json.dumps(GRAPH).encode())
        await trio.sleep(0.5)
        assert (spool.new / f"{job}.json").exists()
        waiting = (await daemon.snapshot()).waiting
        assert waiting.startswith(f"Waiting for space: the file system of {spool.root} has 0 bytes")
        free[0] = 1 << 40
        await until((spool.done / job / "result.json").exists)
        assert (await daemon.snapshot()).waiting == ""
        daemon.stop()


async def test_a_disk_too_full_to_start_is_waited_for(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(app, "START_AGAIN_S", 0.05)
    real, full = SqliteStore.open, [2]

    def refuse(path):
        if full[0]:
            full[0] -= 1
            raise DiskFull("no space left")
        return real(path)

    monkeypatch.setattr(SqliteStore, "open", refuse)
    configured = settings(tmp_path, "http://127.0.0.1:9")
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        assert full == [0]
        daemon.stop()


async def test_a_second_daemon_on_the_same_spool_is_refused(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr(app, "LOCK_PATIENCE_S", 0.2)
    configured = settings(tmp_path, "http://127.0.0.1:9")
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        with pytest.raises(SpoolBusy):
            await app.run(configured)
        daemon.stop()


@pytest.mark.parametrize(("key", "name"), [("state", "state/lock"), ("spool", "spool/.lock")])
async def test_a_lock_that_cannot_be_taken_is_a_configuration_error(tmp_path, key, name):
    """Nothing that a restart would mend."""
    configured = settings(tmp_path, "http://127.0.0.1:9")
    Spool(configured.spool).prepare()
    configured.state.mkdir()
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(ConfigError, match=f"{key}: .*/{name} cannot be locked: "):
        await app.run(configured)
    assert not (tmp_path / name).exists()


async def test_a_lock_that_there_is_no_space_for_is_waited_for(tmp_path, nursery, monkeypatch):
    configured = settings(tmp_path, await nursery.start(Simulator(run_s=0.0).serve, 0))
    monkeypatch.setattr(app, "START_AGAIN_S", 0.01)
    acquire, refused = StateLock.acquire, iter([errno.ENOSPC, errno.EROFS])

    def no_space_at_first(lock: StateLock) -> StateLock:
        if number := next(refused, 0):
            raise OSError(number, os.strerror(number))
        return acquire(lock)

    monkeypatch.setattr(StateLock, "acquire", no_space_at_first)
    with capture_logs() as lines:
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            daemon.stop()
    assert "waiting_for_space" in [line["event"] for line in lines]


async def test_a_taken_port_is_a_configuration_error(tmp_path, nursery):
    taken = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken[0].socket.getsockname()[1]
    configured = settings(tmp_path, "http://127.0.0.1:9")
    configured = config.parse(
        f"servers: [{{name: s, url: 'http://127.0.0.1:9'}}]\nmetrics: {{listen: 127.0.0.1:{port}}}",
        file=tmp_path / "comfyd.yaml",
        base=tmp_path,
    )
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True, allow_unwrapped=True):
        await app.run(configured)
    await taken[0].aclose()


async def test_a_job_whose_order_crashes_the_daemon_three_times_is_held(
    tmp_path, nursery, monkeypatch
):
    """And the others, dropped with it, go through in between."""
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    await trio.to_thread.run_sync(spool.prepare)
    data = json.dumps(GRAPH).encode()
    poison = await trio.to_thread.run_sync(drop, spool, "poison.json", data)
    real = submitter.submit

    async def buggy(order, *args, **kwargs):
        if order.row.job == poison:
            raise KeyError("a bug that only this job meets")
        return await real(order, *args, **kwargs)

    monkeypatch.setattr(submitter, "submit", buggy)
    for crashes in (1, 2, 3):
        with (
            trio.fail_after(15),
            pytest.RaisesGroup(OrderFailed, flatten_subgroups=True),
        ):
            await app.run(configured)
        assert stored(configured, poison).crashes == crashes
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        other = await trio.to_thread.run_sync(drop, spool, "other.json", data)
        await until((spool.done / other / "result.json").exists)
        with trio.fail_after(15):
            while (await daemon.snapshot()).counts["held"] != 1:  # noqa: ASYNC110
                await trio.sleep(0.05)
        daemon.stop()
    row = stored(configured, poison)
    assert row.state is State.HELD
    assert "3 times" in row.held
    assert set(simulator.executions) == {prompt_id_of(other, 1)}


def slow(number: int, seconds: float) -> bytes:
    source = {"width": 8, "height": 8, "batch_size": 1, "color": number}
    sleep = {"class_type": "SimSleep", "inputs": {"image": ["1", 0], "seconds": seconds}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}}
    empty = {"class_type": "EmptyImage", "inputs": source}
    return json.dumps({"1": empty, "5": sleep, "9": save}).encode()


def lose(configured: Config) -> None:
    for path in configured.state.glob("comfyd.db*"):
        path.unlink()


async def test_a_lost_journal_costs_no_job_and_no_second_run(tmp_path, nursery):
    """Running, pending, ended while nobody looked, queued, delivered but not cleared away."""
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    await trio.to_thread.run_sync(spool.prepare)

    def drop_all() -> list[JobId]:
        return [drop(spool, f"job-{n}.json", slow(n, 0.4)) for n in range(6)]

    jobs = await trio.to_thread.run_sync(drop_all)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await until(lambda: len(list(spool.done.glob("*/result.json"))) >= 1)
        await until(lambda: simulator.running and simulator.pending)
        daemon.stop()
    published = {path.parent.name: path.read_bytes() for path in spool.done.glob("*/result.json")}
    for job in published:
        (spool.claimed / f"{job}.json").write_bytes((spool.done / job / "job.json").read_bytes())
    await until(lambda: not simulator.pending)  # one has ended unseen, and one may be running
    lose(configured)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await until(lambda: len(list(spool.done.glob("*/result.json"))) == len(jobs))
        await until(lambda: not any(spool.claimed.iterdir()))
        daemon.stop()
    assert not any(spool.failed.iterdir())
    assert dict(simulator.executions) == {prompt_id_of(job, 1): 1 for job in jobs}
    results = {job: json.loads((spool.done / job / "result.json").read_bytes()) for job in jobs}
    assert {result["attempts"] for result in results.values()} == {1}
    assert "recovery" in {result["completion"] for result in results.values()}
    for job, before in published.items():
        assert (spool.done / job / "result.json").read_bytes() == before
        assert stored(configured, JobId(job)).state is State.DONE


async def test_a_damaged_journal_is_set_aside_and_the_jobs_go_on(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    await trio.to_thread.run_sync(spool.prepare)
    job = await trio.to_thread.run_sync(drop, spool, "fox.json", slow(1, 0.5))
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await until(lambda: simulator.running)
        daemon.stop()
    path = configured.state / "comfyd.db"
    damaged = path.read_bytes()[:5000] + bytes(3000)
    path.write_bytes(damaged)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await until((spool.done / job / "result.json").exists)
        daemon.stop()
    [aside] = configured.state.glob("comfyd.db.damaged-*Z")
    assert aside.read_bytes() == damaged
    assert dict(simulator.executions) == {prompt_id_of(job, 1): 1}


async def test_a_journal_of_a_newer_comfyd_is_refused_and_kept(tmp_path):
    configured = settings(tmp_path, "http://127.0.0.1:9")
    configured.state.mkdir()
    path = configured.state / "comfyd.db"
    newer = sqlite3.connect(path)
    newer.execute("CREATE TABLE novelty (x)")
    newer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(JournalTooNew):
        await app.run(configured)
    assert path.read_bytes() == before
    assert list(configured.state.glob("*damaged*")) == []


async def test_a_journal_that_is_removed_stops_the_daemon_which_then_goes_on(tmp_path, nursery):
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    with pytest.RaisesGroup(JournalError, flatten_subgroups=True):
        async with trio.open_nursery() as daemons:
            await daemons.start(partial(app.run, configured))
            first = await trio.to_thread.run_sync(drop, spool, "fox.json", slow(1, 0.3))
            await until(lambda: simulator.running)
            lose(configured)
    async with trio.open_nursery() as daemons:
        daemon = await daemons.start(partial(app.run, configured))
        await until((spool.done / first / "result.json").exists)
        daemon.stop()
    assert dict(simulator.executions) == {prompt_id_of(first, 1): 1}


async def test_systemd_hears_nothing_while_a_commit_hangs(tmp_path, nursery, monkeypatch):
    simulator = Simulator(run_s=0.0)
    configured = settings(tmp_path, await nursery.start(simulator.serve, 0))
    spool = Spool(configured.spool)
    hanging, let_go = threading.Event(), threading.Event()
    real = SqliteStore.commit

    def commit(store, batch):
        hanging.set()
        let_go.wait(20)
        return real(store, batch)

    told: list[dict[str, str]] = []
    monkeypatch.setattr(sdnotify, "notify", lambda **state: told.append(state))
    monkeypatch.setattr(sdnotify, "watchdog_s", lambda: 1.0)

    def beats() -> int:
        return sum("WATCHDOG" in state for state in told)

    with capture_logs() as logs:
        async with trio.open_nursery() as daemons:
            daemon = await daemons.start(partial(app.run, configured))
            await until(lambda: beats() >= 3)
            monkeypatch.setattr(SqliteStore, "commit", commit)
            job = await trio.to_thread.run_sync(drop, spool, "fox.json", slow(1, 0.0))
            await until(hanging.is_set)
            before = beats()
            await trio.sleep(3)
            assert beats() <= before + 1  # one that was being asked for
            monkeypatch.setattr(SqliteStore, "commit", real)
            let_go.set()
            await until(lambda: beats() >= before + 3)
            await until((spool.done / job / "result.json").exists)
            daemon.stop()
    [withheld] = [log for log in logs if log["event"] == "watchdog_withheld"]
    assert withheld["hanging"] == "dispatcher, journal"
