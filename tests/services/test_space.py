"""What is said of a disk, and when: by the numbers of statvfs, and by a write where they lie."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from comfyd.core.facts import SpaceSeen
from comfyd.services import space
from comfyd.services.space import Disk, Space, disks

MIB = 1 << 20
KEEP = 64 * MIB


class Numbers:
    """What statvfs says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = 10 * KEEP
        self.files, self.inodes = 1_000_000, 500_000
        self.read_only = False
        patch.setattr(os, "statvfs", lambda path: self)

    f_frsize = 4096

    @property
    def f_bavail(self) -> int:
        return self.free // 4096

    @property
    def f_files(self) -> int:
        return self.files

    @property
    def f_favail(self) -> int:
        return self.inodes

    @property
    def f_flag(self) -> int:
        return os.ST_RDONLY if self.read_only else 0


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Numbers:
    return Numbers(monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path, tmp_path, KEEP)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"free": KEEP}, ""),
        ({"free": KEEP - 4096}, "has 64 MiB free"),
        ({"free": 12 * MIB}, "has 12 MiB free, and 64 MiB are kept free (outputs.min_free_bytes)"),
        ({"free": 0}, "has 0 bytes free"),
        ({"inodes": space.INODES}, ""),
        ({"inodes": 3}, "only 3 inodes left"),
        ({"inodes": 0, "files": 0}, ""),  # made as they are needed
        ({"read_only": True}, "is read-only; remount it writable"),
    ],
)
def test_a_disk_in_words(numbers, disk, change, told):
    vars(numbers).update(change)
    problem = disk.problem(eager=False, refused=False)
    assert told in problem
    assert bool(problem) is bool(told)
    if told:
        assert str(disk.folder) in problem
        assert problem.startswith("Waiting")
        assert problem.endswith(".")


def test_a_disk_that_was_too_full_must_have_a_little_more_than_enough(numbers, disk):
    numbers.free = KEEP + KEEP // 32
    assert not disk.problem(eager=False, refused=False)
    assert disk.problem(eager=True, refused=False)
    numbers.free = KEEP + KEEP // 16
    assert not disk.problem(eager=True, refused=False)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EROFS])
def test_what_no_number_shows_is_tried(disk, monkeypatch, number):
    disk = Disk(disk.folder, disk.scratch, 0)
    with monkeypatch.context() as patch:

        def refuse(fd, data):
            raise OSError(number, "refused")

        patch.setattr(os, "write", refuse)
        assert not disk.problem(eager=True, refused=False)
        assert os.strerror(number) in disk.problem(eager=True, refused=True)
        patch.setattr(os, "write", lambda fd, data: 1)
        assert "is full" in disk.problem(eager=True, refused=True)
    assert disk.problem(eager=True, refused=True) == ""
    assert list(disk.scratch.iterdir()) == []


def test_the_journals_disk_is_another_one_only_if_it_is(tmp_path, monkeypatch):
    spool, state = tmp_path / "spool", tmp_path / "state"
    spool.mkdir()
    state.mkdir()
    assert disks(spool, state, KEEP) == [Disk(spool, spool / "stage", KEEP)]
    number = iter((1, 2))
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_dev=next(number)))
    assert disks(spool, state, KEEP)[1] == Disk(state, state, space.JOURNAL_BYTES)


async def test_news_comes_at_the_start_and_when_it_changes(numbers, disk, monkeypatch):
    monkeypatch.setattr(space, "LOOK_S", 0.01)
    told: list[SpaceSeen] = []
    watch = Space([disk], told.append)
    await watch.look()
    assert told == [SpaceSeen(enough=True)]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            numbers.free = 0
            while not watch.waiting:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert told == [SpaceSeen(enough=True), SpaceSeen(enough=False)]
            numbers.free = KEEP + 4096  # not worth going on for
            await trio.sleep(0.1)
            assert len(told) == 2
            numbers.free = 2 * KEEP
            while watch.waiting:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    assert told == [SpaceSeen(enough=enough) for enough in (True, False, True)]


async def test_a_refused_write_is_looked_into_at_once_and_then_at_the_usual_pace(
    numbers, disk, monkeypatch
):
    tries = 0

    def tried(disk: Disk) -> str:
        nonlocal tries
        tries += 1
        return "Waiting for space: over quota." if tries < 3 else ""

    monkeypatch.setattr(space, "LOOK_S", 0.1)
    monkeypatch.setattr(Disk, "_tried", tried)
    told: list[SpaceSeen] = []
    watch = Space([disk], told.append)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await trio.sleep(0.25)
            assert tries == 0
            began_s = trio.current_time()
            watch.refused()
            while len(told) < 3:
                watch.refused()  # everybody complains, all the time
                await trio.sleep(0.001)
            assert 0.15 < trio.current_time() - began_s < 1
            nursery.cancel_scope.cancel()
    assert [news.enough for news in told] == [True, False, True]
