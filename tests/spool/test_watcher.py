"""Nothing that is dropped is missed: with events, without them, and when they are lost.

On the real clock and the real kernel, each test with a deadline.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from inotify_simple import Event, INotify, flags

from comfyd.core.facts import Claimed
from comfyd.core.model import Row, State
from comfyd.spool import watcher
from comfyd.spool.intake import BATCH, Intake
from comfyd.spool.layout import Spool, drop
from comfyd.spool.watcher import watch
from tests.spool.conftest import GRAPH, MakeIntake

DEADLINE_S = 20.0
LONG_S = 600.0  # nothing in a test may need it


class Seen:
    """What the watcher told, and a way to wait for it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pickup_s: list[float] = []
        self.unmovable = 0
        self.refused = 0
        self.paused = False
        self.open = trio.Event()
        self.open.set()
        self._changed = trio.Event()

    async def send(self, claims: list[Claimed]) -> None:
        assert 0 < len(claims) <= BATCH
        await self.open.wait()
        self.rows.extend(claim.row for claim in claims)
        self._changed.set()
        self._changed = trio.Event()

    def on_unmovable(self) -> None:
        self.unmovable += 1

    def on_refused(self) -> None:
        self.refused += 1

    async def until(self, count: int) -> None:
        with trio.fail_after(DEADLINE_S):
            while len(self.rows) < count:
                await self._changed.wait()
        assert len(self.rows) == count


@asynccontextmanager
async def watching(intake: Intake, *, rescan_s: float = LONG_S) -> AsyncIterator[Seen]:
    seen = Seen()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DEADLINE_S):
            await nursery.start(
                partial(
                    watch,
                    intake,
                    rescan_s=lambda: rescan_s,
                    send=seen.send,
                    paused=lambda: seen.paused,
                    on_pickup=seen.pickup_s.append,
                    on_unmovable=seen.on_unmovable,
                    on_refused=seen.on_refused,
                )
            )
        yield seen
        nursery.cancel_scope.cancel()


async def wait_for(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the kernel sets no Event
            await trio.sleep(0.005)


# --- events --------------------------------------------------------------------------------------


async def test_a_renamed_and_a_copied_file_are_taken_at_once(
    spool: Spool, make_intake: MakeIntake
) -> None:
    async with watching(make_intake(spool, settle_s=LONG_S)) as seen:
        job = drop(spool, "fox.json", GRAPH)
        await seen.until(1)
        with (spool.new / "copy.json").open("wb") as file:
            file.write(GRAPH[:10])
            file.flush()
            await trio.sleep(0.05)
            assert len(seen.rows) == 1  # still being written
            file.write(GRAPH[10:])
        await seen.until(2)
        (spool.new / "bundle").mkdir()
        (spool.tmp / "moved").mkdir()
        (spool.tmp / "moved").rename(spool.new / "moved")
        await seen.until(3)
    assert seen.rows[0].job == job
    assert [row.state for row in seen.rows] == [State.QUEUED, State.QUEUED, State.COLLECTING]
    assert len(seen.pickup_s) == 3
    assert max(seen.pickup_s) < DEADLINE_S
    assert os.listdir(spool.new) == ["bundle"]  # made there: not before it is settled


async def test_what_lay_there_before_is_found(spool: Spool, make_intake: MakeIntake) -> None:
    for number in range(BATCH + 5):
        (spool.new / f"{number}.json").write_bytes(GRAPH)
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        await seen.until(BATCH + 5)
    assert [row.seq for row in seen.rows] == list(range(1, BATCH + 6))


async def test_ten_thousand_files_at_once(spool: Spool, make_intake: MakeIntake) -> None:
    """None missed, none twice, and memory hardly grows; an idle machine needs 4 s."""
    count = 10_000

    def produce() -> None:
        for number in range(count):
            path = spool.tmp / f"{number}.json"
            path.write_bytes(GRAPH)
            path.rename(spool.new / path.name)

    async with watching(make_intake(spool), rescan_s=1.0) as seen:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await trio.to_thread.run_sync(produce)
        await seen.until(count)
    assert len({row.job for row in seen.rows}) == count
    assert [row.seq for row in seen.rows] == list(range(1, count + 1))
    assert all(row.state is State.QUEUED for row in seen.rows)
    assert os.listdir(spool.new) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 * 1024


async def test_lost_events_lose_no_file(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(INotify):  # type: ignore[misc] # untyped
        def read(self, timeout: int | None = None, read_delay: int | None = None) -> list[Event]:
            lost = list(super().read(timeout, read_delay))
            return [Event(-1, flags.Q_OVERFLOW, 0, "")] if lost else []

    monkeypatch.setattr(watcher, "INotify", Overflowing)
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        for name in "abc":
            drop(spool, name, GRAPH)
        await seen.until(3)


async def test_more_names_than_are_kept_lose_no_file(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "MAX_NAMES", 3)
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        seen.open = trio.Event()
        for number in range(20):
            drop(spool, str(number), GRAPH)
        await trio.sleep(0.05)
        seen.open.set()
        await seen.until(20)


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
async def test_new_may_be_taken_away(spool: Spool, make_intake: MakeIntake, how: str) -> None:
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        drop(spool, "before", GRAPH)
        await seen.until(1)
        if how == "deleted":
            spool.new.rmdir()
        else:
            spool.new.rename(spool.root / "old")
        if how == "replaced":
            spool.new.mkdir()
        await wait_for(spool.new.is_dir)
        drop(spool, "after", GRAPH)
        await seen.until(2)
        if how == "moved":
            assert spool.new.stat().st_mode & 0o7777 == 0o3770
        await trio.sleep(0.25)  # by now only an event can be so quick
        drop(spool, "again", GRAPH)
        await seen.until(3)


async def test_a_spool_that_is_gone_ends_the_watch(
    spool: Spool, make_intake: MakeIntake, tmp_path: Path
) -> None:
    with pytest.RaisesGroup(FileNotFoundError, flatten_subgroups=True):
        async with watching(make_intake(spool), rescan_s=0.1) as _:
            spool.root.rename(tmp_path / "elsewhere")
            with trio.fail_after(DEADLINE_S):
                await trio.sleep_forever()


# --- without events ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS])
async def test_without_inotify_files_are_taken_once_settled(
    spool: Spool, make_intake: MakeIntake, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(watcher, "INotify", refuse)
    async with watching(make_intake(spool, settle_s=0.2)) as seen:
        started = time.monotonic()
        with (spool.new / "slow.json").open("wb") as file:
            for byte in (GRAPH[at : at + 1] for at in range(12)):
                file.write(byte)
                file.flush()
                await trio.sleep(0.05)
            file.write(GRAPH[12:])
        await seen.until(1)
        assert time.monotonic() - started > 0.8
        assert seen.rows[0].state is State.QUEUED
        spool.new.rmdir()
        await wait_for(spool.new.is_dir)
        drop(spool, "after", GRAPH)
        await seen.until(2)


async def test_a_watch_that_is_refused_is_tried_again(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = itertools.count()

    class Full(INotify):  # type: ignore[misc] # untyped
        def add_watch(self, path: Path, mask: int) -> int:
            if next(tries) < 2:
                raise OSError(errno.ENOSPC, "no more watches")
            return int(super().add_watch(path, mask))

    monkeypatch.setattr(watcher, "INotify", Full)
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        await wait_for(lambda: next(tries) > 3)
        drop(spool, "x", GRAPH)
        await seen.until(1)


# --- holding back --------------------------------------------------------------------------------


async def test_nothing_is_taken_while_paused(spool: Spool, make_intake: MakeIntake) -> None:
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        seen.paused = True
        await trio.sleep(0.05)
        drop(spool, "a", GRAPH)
        drop(spool, "b", GRAPH)
        await trio.sleep(0.3)
        assert len(os.listdir(spool.new)) == 2
        assert seen.rows == []
        seen.paused = False
        await seen.until(2)


async def test_a_slow_taker_leaves_files_in_new(spool: Spool, make_intake: MakeIntake) -> None:
    async with watching(make_intake(spool, settle_s=0.1)) as seen:
        seen.open = trio.Event()
        for number in range(BATCH * 2 + 10):
            (spool.tmp / str(number)).write_bytes(GRAPH)
            (spool.tmp / str(number)).rename(spool.new / str(number))
        await trio.sleep(0.3)
        assert len(os.listdir(spool.new)) >= BATCH
        seen.open.set()
        await seen.until(BATCH * 2 + 10)


async def test_a_full_disk_is_waited_out(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = os.rename, [True]

    def rename(*args: str, **fds: Any) -> None:
        if fds and full[0]:
            raise OSError(errno.ENOSPC, "full")
        real(*args, **fds)

    monkeypatch.setattr(os, "rename", rename)
    async with watching(make_intake(spool, settle_s=0.05), rescan_s=0.1) as seen:
        drop(spool, "x", GRAPH)
        await trio.sleep(0.25)
        assert seen.rows == []
        full[0] = False
        await seen.until(1)


async def test_a_disk_too_full_for_a_new_folder_is_waited_out(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def mkdir(path: Any, *args: Any, **fds: Any) -> None:
        if path == spool.new and not spool.new.exists():
            raise OSError(errno.ENOSPC, "full", str(path))
        real(path, *args, **fds)

    async with watching(make_intake(spool, settle_s=0.05), rescan_s=0.05) as seen:
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", mkdir)
            spool.new.rmdir()
            await wait_for(lambda: seen.refused > 1)
            assert not spool.new.exists()
        await wait_for(spool.new.exists)
        drop(spool, "x", GRAPH)
        await seen.until(1)


async def test_what_cannot_be_moved_is_counted_once(
    humble_spool: Spool, make_intake: MakeIntake
) -> None:
    (humble_spool.new / "x").mkdir(0o500)
    async with watching(make_intake(humble_spool, settle_s=0.05), rescan_s=0.05) as seen:
        await wait_for(lambda: seen.unmovable > 0)
        await trio.sleep(0.3)
        assert seen.unmovable == 1
        drop(humble_spool, "y", GRAPH)
        await seen.until(1)
