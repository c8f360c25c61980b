"""Retention at work: a real spool, a store, and what is there afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from comfyd.core.facts import Forgotten
from comfyd.core.model import Fence, JobId, Row, ServerName, Staged, State, prompt_id_of
from comfyd.core.retention import FORGOTTEN, Bounds, Place, minted_s
from comfyd.errors import DiskFull
from comfyd.journal.memory import MemoryStore
from comfyd.journal.store import Batch, Event, Insert, Raise
from comfyd.journal.thread import Journal
from comfyd.services import retention as service
from comfyd.services.clock import Clock
from comfyd.services.retention import Retention
from comfyd.spool.layout import Spool, new_ulid
from tests.endtoend.waiting import until

NOW_S = 1_900_000_000.0
DAY_S = 86400.0
NOTHING = Bounds()


class Rig:
    def __init__(self, home: Path) -> None:
        self.spool = Spool(home / "spool")
        self.spool.prepare()
        self.store = MemoryStore()
        self.told: list[Forgotten] = []
        self.counted: dict[str, int] = {}
        self.seq = 0

    def over(
        self, days: float, *, place: Place = Place.DONE, size: int = 10, key: str | None = None,
        state: State | None = None, retired: bool = True, taken: bool = False, told: bool = False,
    ) -> JobId:  # fmt: skip
        """A job that ended *days* ago; its story is as old if it is *told*."""
        self.seq += 1
        at = NOW_S - days * DAY_S
        job = JobId(f"fox.{new_ulid(at, self.seq.to_bytes(10))}")
        state = state or (State.DONE if place is Place.DONE else State.FAILED)
        row = Row(
            job=job, seq=self.seq, state=state, retired=retired, key=key, claimed_at=at,
            published_at=at if state.final else None, payload=f"{job}.json", sha256="ab",
            staged=Staged(manifest_sha256="0", bytes=size),
        )  # fmt: skip
        story = (Event(job=job, at=at, kind="claimed"),) if told else ()
        assert self.store.commit(Batch(changes=(Insert(row=row),), events=story)) == (True,)
        if state.final and not taken:
            (self.spool.root / place.value / job).mkdir()
            (self.spool.root / place.value / job / "result.json").write_text("{}")
        return job

    @asynccontextmanager
    async def keeping(
        self, done: Bounds = NOTHING, failed: Bounds = NOTHING, events: Bounds | None = None
    ) -> AsyncIterator[Retention]:
        async with Journal(lambda: self.store, inline=True) as journal:
            yield Retention(
                journal,
                self.spool,
                Clock(NOW_S),
                bounds=lambda: {Place.DONE: done, Place.FAILED: failed},
                events=lambda: events,
                forgotten_until=self.store.remembered().get(FORGOTTEN, 0.0),
                tell=self.told.append,
                on_removed=lambda place, n: self.counted.update({place: n}),
            )

    def left(self, place: Place = Place.DONE) -> set[str]:
        return set(os.listdir(self.spool.root / place.value))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_each_place_has_its_own_bounds(rig: Rig):
    old, young = rig.over(9), rig.over(1)
    bad = [rig.over(days, place=Place.FAILED) for days in (30, 20, 10)]
    async with rig.keeping(Bounds(age_s=5 * DAY_S), Bounds(count=2)) as keeper:
        foreseen = await keeper.now(dry=True, limit=9)
        assert rig.left() == {old, young}
        report = await keeper.now(dry=False, limit=9)
    assert foreseen.results == report.results
    assert [(each.kept.job, each.why) for each in report.results] == [
        (old, "age"),
        (bad[0], "count"),
    ]
    assert report.bytes == 20
    assert rig.left() == {young}
    assert rig.left(Place.FAILED) == set(bad[1:])
    assert rig.counted == {"done": 1, "failed": 1}
    assert os.listdir(rig.spool.stage) == []


async def test_without_bounds_nothing_goes(rig: Rig):
    jobs = {rig.over(days, told=True) for days in (900, 90, 9)}
    async with rig.keeping() as keeper:
        report = await keeper.now(dry=False, limit=9)
    assert (report.removed, report.events, report.rows) == (0, 0, 0)
    assert rig.left() == jobs


async def test_what_consumers_took_takes_no_room(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    """Two are there, and two may be: that five more were published does not matter."""
    monkeypatch.setattr(service, "PAGE", 2)
    kept = {rig.over(50)}
    for days in (40, 30, 20, 10, 5):
        rig.over(days, taken=True)
    kept.add(rig.over(1))
    async with rig.keeping(Bounds(count=2)) as keeper:
        assert (await keeper.now(dry=True, limit=9)).removed == 0
        assert (await keeper.now(dry=False, limit=9)).removed == 0
        assert rig.store.tally(Place.DONE).count == 2
        kept.add(rig.over(0))
        report = await keeper.now(dry=False, limit=9)
    assert report.removed == 1
    assert rig.left() == {job for job in kept if minted_s(job) != NOW_S - 50 * DAY_S}


@pytest.mark.parametrize("state", [state for state in State if not state.final])
async def test_a_job_that_is_not_over_is_never_touched(rig: Rig, state: State):
    job = rig.over(900, state=state, retired=False, told=True)
    (rig.spool.claimed / f"{job}.json").write_bytes(b"x")
    (rig.spool.stage / job).mkdir()
    nothing = Bounds(age_s=1.0, count=0, bytes=0)
    async with rig.keeping(nothing, nothing, nothing) as keeper:
        report = await keeper.now(dry=False, limit=9)
    assert (report.removed, report.events, report.rows) == (0, 0, 0)
    assert rig.store.get(job) is not None
    assert rig.store.events(job)
    assert (rig.spool.stage / job).is_dir()


async def test_a_result_whose_claimed_file_is_still_there_waits(rig: Rig):
    job, other = rig.over(9, retired=False), rig.over(8)
    (rig.spool.claimed / f"{job}.json").write_bytes(b"x")
    async with rig.keeping(Bounds(age_s=DAY_S)) as keeper:
        report = await keeper.now(dry=False, limit=9)
        assert rig.left() == {job}
        assert [each.kept.job for each in report.results] == [other]
        assert len(report.problems) == 1
        (rig.spool.claimed / f"{job}.json").unlink()
        assert (await keeper.now(dry=False, limit=9)).removed == 1
    assert rig.left() == set()


async def test_what_cannot_be_removed_is_told_once_and_tried_again_in_each_round(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    job, rmdir = rig.over(9), os.rmdir

    def refuse(name: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with capture_logs() as lines:
        async with rig.keeping(Bounds(age_s=DAY_S)) as keeper:
            monkeypatch.setattr(os, "rmdir", refuse)
            first = await keeper.now(dry=False, limit=9)
            assert (await keeper.now(dry=True, limit=9)).problems == []
            second = await keeper.now(dry=False, limit=9)
            assert first.removed == second.removed == 0
            assert first.problems == second.problems
            assert f".{job}.removed is left: Permission denied" in first.problems[0]
            assert [each["event"] for each in lines] == ["not_removed"]
            monkeypatch.setattr(os, "rmdir", rmdir)
            assert (await keeper.now(dry=False, limit=9)).problems == []
    assert rig.counted == {"done": 0}
    assert rig.left() == set()
    assert os.listdir(rig.spool.stage) == []


async def test_a_job_is_forgotten_with_its_result_and_story_and_its_id_stays_used(rig: Rig):
    gone = rig.over(40, told=True)
    taken = rig.over(39, told=True, taken=True, place=Place.FAILED)
    lying = rig.over(38, told=True)
    keyed = rig.over(37, told=True, taken=True, key="nightly")
    fenced = rig.over(36, told=True, taken=True)
    young = rig.over(2, told=True, taken=True)
    fence = Fence(
        prompt_id=prompt_id_of(fenced, 1), job=fenced, server=ServerName("a"), origin="http://a"
    )
    rig.store.commit(Batch(changes=(Raise(fence=fence),)))
    month = Bounds(age_s=30 * DAY_S)
    async with rig.keeping(Bounds(age_s=39.5 * DAY_S), events=month) as keeper:
        report = await keeper.now(dry=False, limit=9)
        assert keeper.is_forgotten(gone)
        assert keeper.is_forgotten(taken)
        assert not keeper.is_forgotten(young)
    assert (report.removed, report.events, report.rows) == (1, 5, 2)
    assert set(rig.store.rows_by_job) == {lying, keyed, fenced, young}
    assert rig.told == [Forgotten(states=(State.DONE, State.FAILED))]
    assert rig.store.events(young)
    async with rig.keeping(events=month) as keeper:  # after a restart
        assert keeper.is_forgotten(gone)


async def test_without_a_bound_on_stories_no_job_is_forgotten(rig: Rig):
    job = rig.over(900, taken=True)
    async with rig.keeping(Bounds(count=0)) as keeper:
        assert (await keeper.now(dry=False, limit=9)).rows == 0
    assert rig.store.get(job) is not None


async def test_rounds_by_itself_go_on_where_the_last_one_ended(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "PAGE", 2)
    for _ in range(5):
        rig.over(40)  # lies there: it stays
    rig.over(40, taken=True)
    async with rig.keeping(events=Bounds(age_s=DAY_S)) as keeper:
        forgotten = [(await keeper.round(rows=2)).rows for _ in range(3)]
        assert forgotten == [0, 0, 1]
        rig.over(40, taken=True)
        assert sum([(await keeper.round(rows=2)).rows for _ in range(5)]) == 1


async def test_only_so_many_are_named_and_all_are_counted(rig: Rig):
    for days in range(5):
        rig.over(days + 10)
    async with rig.keeping(Bounds(count=0)) as keeper:
        report = await keeper.now(dry=False, limit=2)
    assert (len(report.results), report.more, report.removed) == (2, 3, 5)


async def test_it_works_by_itself_and_a_full_disk_is_no_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "FIRST_S", 0.0)
    monkeypatch.setattr(service, "EVERY_S", 0.02)
    rig.over(9)
    refusals = 1

    def commit(batch: Batch) -> tuple[bool, ...]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise DiskFull("no space")
        return MemoryStore.commit(rig.store, batch)

    monkeypatch.setattr(rig.store, "commit", commit)
    async with rig.keeping(Bounds(count=0)) as keeper, trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        with trio.fail_after(10):
            await until(lambda: not rig.store.tally(Place.DONE).count)
        nursery.cancel_scope.cancel()
    assert (refusals, rig.left()) == (0, set())
