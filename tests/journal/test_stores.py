"""The promises of a store, one by one, for every store there is."""

import msgspec
import pytest

from comfyd.core.model import Fence, JobId, Outcome, Row, ServerName, State, prompt_id_of
from comfyd.journal.memory import MemoryStore
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import (
    FOUND_MAX,
    Alias,
    Batch,
    Event,
    Insert,
    Lift,
    Raise,
    Remember,
    Update,
)


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    opened = MemoryStore() if request.param == "memory" else SqliteStore.open(tmp_path / "j.db")
    yield opened
    opened.close()


def insert(store, *jobs):
    first = store.last_seq() + 1
    rows = [Row(job=JobId(job), seq=seq) for seq, job in enumerate(jobs, first)]
    assert all(store.commit(Batch(changes=tuple(Insert(row=row) for row in rows))))


def found(store, text):
    return [row.job for row in store.find(text)]


def test_a_stem_means_its_jobs_newest_first_and_nothing_that_only_begins_alike(store):
    insert(store, "fox.01A", "foxes.01B", "fox.01C", "fo.01D")
    assert found(store, "fox") == ["fox.01C", "fox.01A"]
    assert found(store, "foxe") == ["foxes.01B"]
    assert found(store, "fox.01") == ["fox.01C", "fox.01A"]
    assert found(store, "fo") == ["fo.01D"]
    assert found(store, "f") == ["foxes.01B", "fox.01C", "fox.01A", "fo.01D"]


def test_a_whole_id_means_only_itself(store):
    insert(store, "fox", "fox.01A", "fox.01AB")
    assert found(store, "fox") == ["fox"]
    assert found(store, "fox.01A") == ["fox.01A"]


def test_prompt_ids_of_all_attempts_and_aliases_lead_to_the_job(store):
    insert(store, "fox.01A")
    first, second, never = (prompt_id_of(JobId("fox.01A"), attempt) for attempt in (1, 2, 3))
    for version, prompt_id in ((1, first), (2, second)):
        row = Row(job=JobId("fox.01A"), seq=1, version=version, prompt_id=prompt_id)
        alias = Alias(name=JobId(f"twin.{version}"), job=row.job)
        assert store.commit(Batch(changes=(Update(row=row, expected=version - 1), alias))) == (
            True,
            True,
        )
    for name in (first, second, "twin.1", "twin.2"):
        assert found(store, name) == ["fox.01A"]
    assert found(store, never) == []
    assert found(store, "twin") == []


@pytest.mark.parametrize("text", ["", "wolf", "FOX", "f%", "f_x", "f*", "fox.01A ", "ö", "\udcff"])
def test_what_means_nothing_finds_nothing(store, text):
    insert(store, "fox.01A")
    assert found(store, text) == []


def test_there_is_an_end_to_what_is_found(store):
    insert(store, *(f"fox.{seq:03}" for seq in range(FOUND_MAX + 5)))
    last = [f"fox.{seq:03}" for seq in reversed(range(5, FOUND_MAX + 5))]
    assert found(store, "fox") == last
    assert found(store, "fo") == last


def update(store, **fields):
    """Commit one change of the first job and say whether it applied."""
    row = msgspec.structs.replace(store.get(JobId("fox.01A")), **fields)
    return store.commit(Batch(changes=(Update(row=row, expected=row.version - 1),))) == (True,)


def test_a_change_applies_to_the_version_it_was_decided_on_and_to_no_other(store):
    insert(store, "fox.01A")
    assert update(store, version=1, held="a")
    for stale in (1, 3):
        assert not update(store, version=stale, held="b")
    assert not update(store, version=2, seq=9, held="c")
    row = store.get(JobId("fox.01A"))
    assert (row.version, row.held) == (1, "a")
    unknown = Update(row=Row(job=JobId("wolf.01B"), seq=1, version=1), expected=0)
    assert store.commit(Batch(changes=(unknown,))) == (False,)


def test_a_known_job_or_seq_is_not_inserted_again(store):
    insert(store, "fox.01A")
    again = Insert(row=Row(job=JobId("fox.01A"), seq=2, held="again"))
    same_seq = Insert(row=Row(job=JobId("wolf.01B"), seq=1))
    assert store.commit(Batch(changes=(again, same_seq))) == (False, False)
    assert [row.held for row in store.rows(limit=9)] == [""]
    assert store.counts()[State.QUEUED] == 1


@pytest.mark.parametrize("final", [State.DONE, State.FAILED, State.CANCELLED])
def test_a_final_row_is_retired_and_nothing_else(store, final):
    insert(store, "fox.01A")
    outcome = Outcome(state=final, detail={"node": ["9", 1.5]})
    assert update(store, version=1, state=final, outcome=outcome)
    assert [row.job for row in store.active()] == ["fox.01A"]
    assert not update(store, version=2, state=State.QUEUED)
    assert not update(store, version=2, retired=True, published_at=1.0)
    assert update(store, version=2, retired=True)
    assert store.active() == ()
    assert store.counts()[final] == 1
    assert store.counts()[State.QUEUED] == 0


def test_the_changes_of_a_batch_see_those_before_them(store):
    row = Row(job=JobId("fox.01A"), seq=1)
    later = msgspec.structs.replace(row, version=1, state=State.HELD)
    changes = (Update(row=later, expected=0), Insert(row=row), Update(row=later, expected=0))
    assert store.commit(Batch(changes=changes)) == (False, True, True)
    assert store.get(row.job) == later
    assert store.counts()[State.HELD] == 1


def test_candidates_come_by_priority_then_arrival_when_they_are_due(store):
    plans = [(0, 0.0), (5, 0.0), (0, 10.0), (5, 20.0), (0, 0.0), (9, 30.0)]
    rows = [
        Row(job=JobId(f"job.{seq}"), seq=seq, priority=priority, not_before=not_before)
        for seq, (priority, not_before) in enumerate(plans, 1)
    ]
    held = Row(job=JobId("held"), seq=7, state=State.HELD, not_before=1.0)
    store.commit(Batch(changes=tuple(Insert(row=row) for row in (*rows, held))))

    def seqs(count, now_s):
        answer = store.candidates(count, now_s)
        return [row.seq for row in answer.rows], answer.next_due_s

    assert seqs(9, 0.0) == ([2, 1, 5], 10.0)
    assert seqs(2, 5.0) == ([2, 1], 10.0)
    assert seqs(9, 10.0) == ([2, 1, 3, 5], 20.0)
    assert seqs(9, 30.0) == ([6, 2, 4, 1, 3, 5], None)


def test_what_waits_past_its_deadline_comes_earliest_first(store):
    deadlines = [30.0, None, 10.0, 10.0, 50.0]
    rows = [
        Row(job=JobId(f"job.{seq}"), seq=seq, queue_by=queue_by, priority=seq)
        for seq, queue_by in enumerate(deadlines, 1)
    ]
    held = Row(job=JobId("held"), seq=6, state=State.HELD, queue_by=5.0)
    store.commit(Batch(changes=tuple(Insert(row=row) for row in (*rows, held))))

    def seqs(count, now_s):
        answer = store.overdue(count, now_s)
        return [row.seq for row in answer.rows], answer.next_s

    assert seqs(9, 0.0) == ([], 10.0)
    assert seqs(9, 10.0) == ([3, 4], 30.0)
    assert seqs(2, 40.0) == ([3, 4], 50.0)
    assert seqs(9, 50.0) == ([3, 4, 1, 5], None)
    started = Row(job=JobId("job.3"), seq=3, version=1, state=State.SUBMITTED, queue_by=10.0)
    extended = Row(job=JobId("job.4"), seq=4, version=1, queue_by=60.0)
    changes = tuple(Update(row=row, expected=0) for row in (started, extended))
    assert store.commit(Batch(changes=changes)) == (True, True)
    assert seqs(9, 20.0) == ([], 30.0)
    assert seqs(9, 70.0) == ([1, 5, 4], None)


def fence(job, attempt=1):
    return Fence(
        prompt_id=prompt_id_of(JobId(job), attempt),
        job=JobId(job),
        server=ServerName("local"),
        origin="http://127.0.0.1:8188",
    )


def test_a_fence_stands_from_raise_to_lift_in_the_order_raised(store):
    first, second, third = fence("wolf.01B"), fence("fox.01A"), fence("fox.01A", 2)
    again = msgspec.structs.replace(first, origin="http://other")
    insert(store, "fox.01A")
    changes = (Raise(fence=first), Raise(fence=second), Raise(fence=again), Raise(fence=third))
    assert store.commit(Batch(changes=changes)) == (True, True, False, True)
    assert store.fences() == (first, second, third)
    lift = Lift(prompt_id=first.prompt_id)
    assert store.commit(Batch(changes=(lift, lift, Raise(fence=again)))) == (True, False, True)
    assert store.fences() == (second, third, again)


def test_a_setting_is_the_last_one_remembered(store):
    assert store.remembered() == {}
    changes = (
        Remember(name="paused", value=True),
        Remember(name="draining", value=["a", "b"]),
        Remember(name="paused", value=None),
    )
    assert store.commit(Batch(changes=changes)) == (True, True, True)
    assert store.remembered() == {"paused": None, "draining": ["a", "b"]}
    store.remembered().clear()
    assert len(store.remembered()) == 2


def test_the_newest_row_has_the_key(store):
    rows = [Row(job=JobId(f"job.{seq}"), seq=seq, key="k") for seq in (3, 1, 2)]
    store.commit(Batch(changes=tuple(Insert(row=row) for row in rows)))
    assert store.keyed("k") == rows[0]
    assert store.keyed("other") is None


def test_the_first_to_arrive_is_the_oldest_and_pages_begin_with_the_newest(store):
    rows = [
        Row(job=JobId(f"job.{seq}"), seq=seq, claimed_at=100.0 + seq, state=state)
        for seq, state in enumerate([State.HELD, State.QUEUED, State.QUEUED, State.HELD], 1)
    ]
    store.commit(Batch(changes=tuple(Insert(row=row) for row in rows)))
    assert store.oldest(State.QUEUED) == 102.0
    assert store.oldest(State.DONE) is None
    assert [row.seq for row in store.rows(limit=3)] == [4, 3, 2]
    assert [row.seq for row in store.rows(limit=3, after=2)] == [1]
    assert [row.seq for row in store.rows(State.HELD, limit=1)] == [4]
    assert [row.seq for row in store.rows(State.HELD, limit=1, after=4)] == [1]


def test_old_events_are_forgotten_a_few_at_a_time(store):
    insert(store, "fox.01A")
    story = tuple(Event(job=JobId("fox.01A"), at=float(at), kind="x") for at in range(6))
    store.commit(Batch(events=story))
    assert store.prune_events(4.0, limit=3) == 3
    assert store.prune_events(4.0, limit=3) == 1
    assert store.prune_events(4.0, limit=3) == 0
    assert store.events(JobId("fox.01A")) == story[4:]
    assert store.get(JobId("fox.01A")) is not None
