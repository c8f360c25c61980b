"""The promises of a store, one by one, for every store there is."""

from typing import Any

import msgspec
import pytest

from comfyd.core.model import (
    Fence,
    JobId,
    LetDown,
    Outcome,
    Reason,
    Row,
    ServerName,
    Shelf,
    Staged,
    State,
    Verdict,
    prompt_id_of,
)
from comfyd.core.retention import Bounds, Kept, Past, Place, Tally
from comfyd.journal.memory import MemoryStore
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import (
    FOUND_MAX,
    Alias,
    Batch,
    Drop,
    Event,
    Forget,
    Insert,
    Lift,
    Pruned,
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
        answer = store.candidates(count, now_s, Shelf.FRESH)
        return [row.seq for row in answer.rows], answer.next_due_s

    assert seqs(9, 0.0) == ([2, 1, 5], 10.0)
    assert seqs(2, 5.0) == ([2, 1], 10.0)
    assert seqs(9, 10.0) == ([2, 1, 3, 5], 20.0)
    assert seqs(9, 30.0) == ([6, 2, 4, 1, 3, 5], None)


def test_the_latest_are_those_published_last_whenever_they_came(store):
    over = {1: 90.0, 2: 10.0, 3: 20.0, 4: None, 5: 20.0}
    rows = [
        Row(job=JobId(f"job.{seq}"), seq=seq, state=State.FAILED, claimed_at=15.0, published_at=at)
        for seq, at in over.items()
    ]
    other = Row(job=JobId("done"), seq=6, state=State.DONE, published_at=99.0)
    store.commit(Batch(changes=tuple(Insert(row=row) for row in (*rows, other))))
    assert [row.seq for row in store.latest(State.FAILED, limit=9)] == [1, 5, 3, 4, 2]
    assert [row.seq for row in store.latest(State.FAILED, limit=2)] == [1, 5]
    assert store.latest(State.CANCELLED, limit=9) == ()


def test_candidates_of_each_kind_are_asked_for_apart(store):
    said = (
        Verdict(
            server=ServerName("a"),
            origin="http://a",
            outcome=Outcome(state=State.FAILED, reason=Reason.REJECTED),
        ),
    )
    away = LetDown(server=ServerName("a"), origin="http://a", times=1, since_s=0.0, said="")
    rows = [Row(job=JobId(f"job.{seq}"), seq=seq, priority=int(seq % 3 == 0)) for seq in range(10)]
    store.commit(Batch(changes=tuple(Insert(row=row) for row in rows)))
    changes: dict[int, dict[str, Any]] = {
        2: {"verdicts": said},
        3: {"verdicts": said, "let_down": away},
        5: {"let_down": away, "not_before": 4.0},
        6: {"let_down": away, "not_before": 3.0},
        7: {"let_down": away, "not_before": 3.0},
        8: {"let_down": away, "not_before": 9.0},
    }
    for seq, more in changes.items():
        after = msgspec.structs.replace(rows[seq], version=1, **more)
        store.commit(Batch(changes=(Update(row=after, expected=0),)))

    def seqs(shelf, count=9):
        answer = store.candidates(count, 5.0, shelf)
        assert (answer.shelf, answer.next_due_s) == (shelf, 9.0)
        return [row.seq for row in answer.rows]

    assert seqs(Shelf.FRESH) == [0, 9, 1, 4]
    assert seqs(Shelf.REFUSED) == [3, 2]
    assert seqs(Shelf.LET_DOWN) == [6, 7, 5]  # who is due for longest, whatever its priority
    assert seqs(Shelf.LET_DOWN, 1) == [6]


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
    over = Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True)
    store.commit(Batch(changes=(Insert(row=over),)))
    story = tuple(Event(job=JobId("fox.01A"), at=float(at), kind="x") for at in range(6))
    store.commit(Batch(events=story))
    bounds = Bounds(age_s=10.0)
    assert store.prune_events(bounds, 14.0, limit=3, dry=True) == Pruned(forgotten=3, next=3)
    assert store.prune_events(bounds, 14.0, limit=3) == Pruned(forgotten=3, next=3)
    assert store.prune_events(bounds, 14.0, limit=3, after=3) == Pruned(forgotten=1)
    assert store.prune_events(bounds, 14.0, limit=3) == Pruned()
    assert store.events(JobId("fox.01A")) == story[4:]
    assert store.get(JobId("fox.01A")) is not None


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (Bounds(count=2), [4, 5]),
        (Bounds(count=0), []),
        (Bounds(count=9), [0, 1, 2, 3, 4, 5]),
        (Bounds(bytes=30), [4, 5]),  # each is 7 + 1 + 7 bytes
        (Bounds(bytes=29), [5]),
        (Bounds(bytes=0), []),
        (Bounds(age_s=10.0, count=5), [2, 3, 4, 5]),
        (Bounds(), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_events_stay_within_every_bound(store, bounds, left):
    story = [Event(job=JobId("fox.01A"), at=float(n), kind="x", data={"n": n}) for n in range(6)]
    for event in story:
        store.commit(Batch(events=(event,)))
    assert store.prune_events(bounds, 12.0).next is None
    assert [event.data["n"] for event in store.events(JobId("fox.01A"))] == left


@pytest.mark.parametrize(
    ("state", "retired"), [(State.QUEUED, False), (State.HELD, False), (State.DONE, False)]
)
def test_the_story_of_a_job_that_is_not_over_is_kept(store, state, retired):
    row = Row(job=JobId("fox.01A"), seq=1, state=state, retired=retired)
    old = Event(job=row.job, at=1.0, kind="x")
    store.commit(Batch(changes=(Insert(row=row),), events=(old,)))
    assert store.prune_events(Bounds(age_s=1.0, count=0, bytes=0), 100.0).forgotten == 0
    assert store.events(row.job) == (old,)


def test_a_row_is_forgotten_with_its_names_and_its_result(store):
    over = Row(
        job=JobId("fox.01A"), seq=1, prompt_id=prompt_id_of(JobId("fox.01A"), 1),
        state=State.DONE, published_at=5.0, staged=Staged(manifest_sha256="0", bytes=7),
        retired=True,
    )  # fmt: skip
    alias = Alias(name=JobId("twin.01B"), job=over.job)
    story = Event(job=over.job, at=1.0, kind="x")
    assert store.commit(Batch(changes=(Insert(row=over), alias), events=(story,))) == (True, True)
    kept = Kept(job=over.job, place=Place.DONE, at=5.0, bytes=7)
    assert store.kept(Place.DONE, limit=2) == (kept,)
    assert store.tally(Place.DONE) == Tally(count=1, bytes=7)
    assert store.past(limit=2) == (Past(row=over, told=True),)
    assert store.commit(Batch(changes=(Forget(job=over.job, version=0),))) == (True,)
    assert store.get(over.job) is None
    assert found(store, "twin.01B") == found(store, over.prompt_id) == found(store, "fox") == []
    assert store.counts()[State.DONE] == 0
    assert store.kept(Place.DONE, limit=2) == ()
    assert store.tally(Place.DONE) == Tally()
    assert store.past(limit=2) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"state": State.QUEUED},
        {"state": State.PUBLISHING},
        {"retired": False},
        {"key": "nightly"},
        {"version": 3},
    ],
)
def test_what_is_not_over_or_holds_a_key_or_changed_is_not_forgotten(store, changes):
    over = Row(job=JobId("fox.01A"), seq=1, state=State.FAILED, retired=True)
    row = msgspec.structs.replace(over, **changes)
    store.commit(Batch(changes=(Insert(row=row),)))
    assert store.commit(Batch(changes=(Forget(job=row.job, version=0),))) == (False,)
    assert store.get(row.job) == row


def test_a_result_is_noted_when_its_job_becomes_final_and_once(store):
    fox = Row(job=JobId("fox.01A"), seq=1, claimed_at=3.0)
    ended = msgspec.structs.replace(fox, state=State.CANCELLED, version=1)
    retired = msgspec.structs.replace(ended, retired=True, version=2)
    store.commit(Batch(changes=(Insert(row=fox),)))
    assert store.kept(Place.FAILED, limit=2) == ()
    store.commit(Batch(changes=(Update(row=ended, expected=0),)))
    noted = Kept(job=fox.job, place=Place.FAILED, at=3.0)
    assert store.kept(Place.FAILED, limit=2) == (noted,)
    drop = Drop(job=fox.job)
    again = Update(row=retired, expected=1)
    assert store.commit(Batch(changes=(drop, again, drop))) == (True, True, False)
    assert store.kept(Place.FAILED, limit=2) == ()
