"""Snapshots: whole, for their owner alone, of a journal that goes on meanwhile."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from comfyd.core.model import JobId, Row, State
from comfyd.errors import DiskFull, JournalError
from comfyd.journal import copy as copying
from comfyd.journal.schema import WHOLE
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.journal.store import Batch, Event, Insert, Remember
from comfyd.journal.thread import Journal


def rows(first: int, count: int) -> Batch:
    changes = tuple(
        Insert(row=Row(job=JobId(f"fox.{seq:06}"), seq=seq, metadata={"x": "y" * 200}))
        for seq in range(first, first + count)
    )
    return Batch(changes=changes, events=(Event(job=JobId("fox"), at=1.0, kind="x"),))


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    store = SqliteStore.open(tmp_path / "state" / "comfyd.db")
    store.commit(rows(1, 300))
    store.commit(Batch(changes=(Remember(name=WHOLE, value=True),)))
    return store


def test_a_copy_is_the_journal_but_for_its_word_that_it_is_whole(store, tmp_path):
    target = tmp_path / "copy.db"
    store.copy_to(target, lambda: None)
    assert sorted(os.listdir(tmp_path)) == ["copy.db", "state"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    copy = SqliteStore.open(target)
    assert copy.rows(limit=999) == store.rows(limit=999)
    assert copy.counts() == store.counts()
    assert copy.remembered() == {}
    assert not copy.opened_cleanly()
    copy.close()
    assert store.remembered() == {WHOLE: True}
    assert store.commit(rows(301, 1)) == (True,)
    store.close()


def test_what_is_written_meanwhile_is_in_it_and_the_copy_is_sound(store, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "PAGES", 4)
    pauses = 0

    def others() -> None:
        nonlocal pauses
        pauses += 1
        fresh = Insert(row=Row(job=JobId(f"new.{pauses}"), seq=10_000 + pauses))
        assert store.commit(Batch(changes=(fresh,))) == (True,)

    store.copy_to(tmp_path / "copy.db", others)
    assert pauses > 5
    copy = SqliteStore.open(tmp_path / "copy.db")
    last = JobId(f"new.{pauses}")  # made in the pause after the last piece
    assert copy.rows(limit=9999) == tuple(r for r in store.rows(limit=9999) if r.job != last)
    copy.close()
    store.close()


async def test_commits_go_on_between_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "PAGES", 2)
    path = tmp_path / "state" / "comfyd.db"
    with trio.fail_after(20):
        async with Journal(lambda: SqliteStore.open(path)) as journal:
            await journal.commit(rows(1, 2000))
            committed = 0
            async with trio.open_nursery() as nursery:

                async def commit() -> None:
                    nonlocal committed
                    while True:
                        await journal.commit(rows(10_000 + committed, 1))
                        committed += 1
                        await trio.lowlevel.checkpoint()  # a commit itself is never cancelled

                nursery.start_soon(commit)
                await journal.copy_to(tmp_path / "copy.db")
                nursery.cancel_scope.cancel()
            assert committed > 3
    copy = SqliteStore.open(tmp_path / "copy.db")
    assert 2000 < copy.counts()[State.QUEUED] <= 2000 + committed + 1
    copy.close()


async def test_who_is_cancelled_waits_for_one_piece_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "PAGES", 1)
    path, target = tmp_path / "state" / "comfyd.db", tmp_path / "copy.db"
    with trio.fail_after(20):
        async with Journal(lambda: SqliteStore.open(path)) as journal:
            await journal.commit(rows(1, 2000))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(journal.copy_to, target)
                while not target.exists():
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert not target.exists()
            assert await journal.commit(rows(5000, 1)) == (True,)


def test_a_damaged_copy_is_no_copy(store, tmp_path):
    target = tmp_path / "copy.db"
    store.copy_to(target, lambda: None)
    copying.check_copy(target)
    with open(target, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(64 * 4096))
    with pytest.raises(JournalError, match="damaged"):
        copying.check_copy(target)
    assert not target.exists()
    store.close()


def test_nothing_is_replaced(store, tmp_path):
    target = tmp_path / "copy.db"
    target.write_text("precious")
    with pytest.raises(FileExistsError):
        store.copy_to(target, lambda: None)
    assert target.read_text() == "precious"
    store.close()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), DiskFull),
        (OSError(5, "Input/output error"), JournalError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_copy_that_fails_leaves_nothing_and_the_journal_goes_on(
    store, tmp_path, monkeypatch, error, raised
):
    def refuse(fd: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(raised):
            store.copy_to(tmp_path / "copy.db", lambda: None)
    assert os.listdir(tmp_path) == ["state"]
    assert store.commit(rows(301, 1)) == (True,)
    store.close()


def test_a_journal_that_nobody_uses_is_copied_too_and_stays_as_it_is(store, tmp_path):
    expected = store.rows(limit=999)
    store.close()
    path = tmp_path / "state" / "comfyd.db"
    before = path.read_bytes()
    reads = open_readonly(path)
    reads.copy_to(tmp_path / "copy.db", lambda: None)
    reads.close()
    assert path.read_bytes() == before
    copy = SqliteStore.open(tmp_path / "copy.db")
    assert copy.rows(limit=999) == expected
    copy.close()
    db = sqlite3.connect(tmp_path / "copy.db")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
