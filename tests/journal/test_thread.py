"""The async face: what is cancelled, what is not, who waits for whom, and how it ends."""

import threading

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from comfyd.core.model import JobId, Row, Shelf, State
from comfyd.core.retention import Bounds, Past, Place, Tally
from comfyd.errors import DiskFull, JournalError
from comfyd.journal import file
from comfyd.journal.memory import MemoryStore
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Alias, Batch, Event, Insert, Pruned, Remember
from comfyd.journal.thread import Journal

FOX = Row(job=JobId("fox.01A"), seq=1, key="k", claimed_at=5.0)
ARRIVAL = Batch(
    changes=(
        Insert(row=FOX),
        Alias(name=JobId("twin.01B"), job=FOX.job),
        Remember(name="paused", value=True),
    ),
    events=(Event(job=FOX.job, at=1.0, kind="claimed"),),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal.db"


@pytest.mark.parametrize("inline", [False, True])
async def test_it_answers_as_its_store_does(path, inline):
    store = MemoryStore() if inline else None
    took_s: list[float] = []
    async with Journal(
        lambda: store or SqliteStore.open(path), inline=inline, on_commit=took_s.append
    ) as journal:
        assert journal.opened_cleanly()
        assert await journal.commit(ARRIVAL) == (True, True, True)
        assert len(took_s) == 1
        assert 0 <= took_s[0] < 60
        assert await journal.active() == ()
        assert (await journal.candidates(3, 10.0, Shelf.FRESH)).rows == (FOX,)
        assert (await journal.overdue(3, 10.0)).rows == ()
        assert await journal.fences() == ()
        assert await journal.remembered() == {"paused": True}
        assert await journal.get(FOX.job) == FOX
        assert await journal.keyed("k") == FOX
        assert await journal.find("twin.01B") == (FOX,)
        assert await journal.rows(State.QUEUED, limit=2) == (FOX,)
        assert await journal.rows(limit=2, after=1) == ()
        assert await journal.events(FOX.job) == ARRIVAL.events
        assert (await journal.counts())[State.QUEUED] == 1
        assert await journal.oldest(State.QUEUED) == 5.0
        assert await journal.without_rows([FOX.job, JobId("x")]) == {"x"}
        assert await journal.last_seq() == 1
        assert await journal.kept(Place.DONE, limit=1) == ()
        assert await journal.newest_kept(Place.DONE, limit=1) == ()
        assert await journal.tally(Place.DONE) == Tally()
        assert await journal.past(limit=2) == (Past(row=FOX, told=True),)
        assert await journal.prune_events(Bounds(age_s=1.0), 9.0) == Pruned()


async def test_a_commit_is_heard_to_its_end_even_by_who_is_cancelled(path):
    async with Journal(lambda: SqliteStore.open(path)) as journal:
        with trio.CancelScope() as scope:
            scope.cancel()
            results = await journal.commit(ARRIVAL)
        assert results == (True, True, True)
        with trio.CancelScope() as scope:
            scope.cancel()
            await journal.last_seq()
        assert scope.cancelled_caught
        assert await journal.last_seq() == 1


async def test_many_at_once_take_turns(path):
    async def commit(seq):
        row = Row(job=JobId(f"job-{seq}"), seq=seq)
        assert await journal.commit(Batch(changes=(Insert(row=row),))) == (True,)
        assert await journal.get(row.job) == row

    with trio.fail_after(30):
        async with Journal(lambda: SqliteStore.open(path)) as journal:
            async with trio.open_nursery() as nursery:
                for seq in range(1, 51):
                    nursery.start_soon(commit, seq)
            assert (await journal.counts())[State.QUEUED] == 50


async def test_it_comes_round_only_when_what_it_is_doing_is_done(path):
    let_go = threading.Event()

    class Slow(SqliteStore):
        def commit(self, batch: Batch) -> tuple[bool, ...]:
            let_go.wait(10)
            return super().commit(batch)

    async with Journal(lambda: Slow.open(path)) as journal, trio.open_nursery() as nursery:
        with trio.fail_after(5):
            await journal.turn()
        nursery.start_soon(journal.commit, ARRIVAL)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.2) as waited:
            await journal.turn()
        assert waited.cancelled_caught
        let_go.set()
        with trio.fail_after(5):
            await journal.turn()


async def test_inline_the_clock_stands_still_while_it_works(path, autojump_clock: MockClock):
    before_s = trio.current_time()
    async with (
        Journal(lambda: SqliteStore.open(path), inline=True) as journal,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(trio.sleep, 1000)
        await journal.commit(ARRIVAL)
        await journal.counts()
        assert trio.current_time() == before_s
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("failing", [False, True])
async def test_it_ends_cleanly_unless_by_an_exception(failing):
    first = MemoryStore()
    with pytest.raises(ZeroDivisionError) if failing else trio.CancelScope():
        async with Journal(lambda: first, inline=True):
            if failing:
                raise ZeroDivisionError
    assert first.reopened().opened_cleanly() != failing


async def test_an_opening_that_fails_says_why(path):
    path.parent.mkdir()
    path.write_bytes(b"no database\n" * 100)
    journal = Journal(lambda: SqliteStore.open(path))
    with pytest.raises(JournalError, match="aside"):
        await journal.__aenter__()


async def test_a_refused_commit_is_an_error_and_is_not_timed(path):
    took_s: list[float] = []

    def open_on_a_full_disk():
        SqliteStore.open(path).close()
        db = file.connect(path, "rw")
        db.execute("PRAGMA max_page_count=1")  # no page more than there are
        return SqliteStore(db, path, writable=True)

    async with Journal(open_on_a_full_disk, on_commit=took_s.append) as journal:
        large = msgspec.structs.replace(FOX, metadata={"pad": "x" * 100_000})
        with pytest.raises(DiskFull):
            await journal.commit(Batch(changes=(Insert(row=large),)))
        assert took_s == []
        assert await journal.commit(Batch()) == ()
        assert len(took_s) == 1
