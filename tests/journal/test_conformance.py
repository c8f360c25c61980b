"""Every store answers like the model: SQLite beside MemoryStore, through crashes and reopenings."""

import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from comfyd.core.model import (
    End,
    Fence,
    FileRef,
    JobId,
    LetDown,
    NodeFailure,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    Shelf,
    Source,
    Staged,
    State,
    Verdict,
    prompt_id_of,
)
from comfyd.core.retention import Bounds, Kept, Place
from comfyd.journal.memory import MemoryStore
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.journal.store import (
    Alias,
    Batch,
    Drop,
    Event,
    Forget,
    Insert,
    Keep,
    Lift,
    Raise,
    Remember,
    Update,
)

# Few and alike, so that ids collide, begin alike and share a stem.
JOBS = [JobId(name) for name in ("fox.01A", "fox.01B", "fox", "foxes.01A", "a_b.01C")]
NAMES = [JobId("fox.01Z"), JobId("twin.01D")]
KEYS = ["nightly", "weekly"]
TIMES = [0.0, 10.0, 20.5, 30.0]
SEARCHES = [
    *JOBS,
    *NAMES,
    *("", "f", "fox.", "fox.01", "foxe", "a_b", "a%", "f_x", "ö", "\udcff", "FOX.01A", "no\0"),
    *(prompt_id_of(job, attempt) for job in JOBS for attempt in (1, 2)),
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # What no UTF-8 can hold is refused where it comes in.
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("k"), inner, max_size=1),
    max_leaves=3,
)
records = st.builds(
    Record,
    end=st.sampled_from(End),
    files=st.just((FileRef(node="9", key="images", filename="x.png"),)),
    ui=st.dictionaries(
        st.just("9"), st.dictionaries(st.just("text"), st.lists(json_values, max_size=2))
    ),
    failure=st.none()
    | st.just(NodeFailure(node="3", node_type="K", exception_type="E", message="no")),
    ours=st.none() | st.just(("fox.01A", 1)),
)
outcomes = st.builds(
    Outcome,
    state=st.sampled_from(State),
    reason=st.none() | st.sampled_from(Reason),
    detail=st.dictionaries(st.just("k"), json_values),
)


let_downs = st.builds(
    LetDown,
    server=st.just(ServerName("a")),
    origin=st.just("http://a"),
    times=st.integers(0, 3),
    since_s=st.sampled_from(TIMES),
    said=st.just("HTTP status 500"),
)
verdicts = st.builds(
    Verdict, server=st.just(ServerName("local")), origin=st.just("http://x"), outcome=outcomes
)


@st.composite
def rows(draw, jobs=JOBS):
    """Any row at all: what is plausible is the core's business, not the store's."""
    chosen = draw(st.sampled_from(jobs))
    attempt = draw(st.integers(0, 2))
    abandoned = draw(st.booleans())
    return Row(
        job=chosen,
        seq=draw(st.integers(1, 7)),
        state=draw(st.sampled_from([State.QUEUED, *State])),
        version=draw(st.integers(0, 1)),
        priority=draw(st.integers(-1, 1)),
        not_before=draw(st.sampled_from(TIMES)),
        queue_by=draw(st.none() | st.sampled_from(TIMES)),
        claimed_at=draw(st.sampled_from(TIMES)),
        key=draw(st.none() | st.sampled_from(KEYS)),
        metadata=draw(st.dictionaries(st.just("k"), json_values)),
        drawn={"3.seed": draw(st.integers(0, 2**64))},
        attempt=attempt,
        prompt_id=prompt_id_of(chosen, attempt) if attempt else None,
        abandoned=(("local", "http://x", prompt_id_of(chosen, 1)),) if abandoned else (),
        verdicts=tuple(draw(st.lists(verdicts, max_size=1))),
        let_down=draw(st.none() | let_downs),
        why=draw(st.none() | outcomes),
        record=draw(st.none() | records),
        staged=draw(st.none() | st.just(Staged(manifest_sha256="00", outputs=1))),
        completion=draw(st.none() | st.sampled_from(Source)),
        number=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        retired=draw(st.booleans()),
    )


events = st.builds(
    Event,
    job=st.sampled_from([*JOBS, *NAMES]),
    at=st.sampled_from(TIMES),
    kind=st.sampled_from(["claimed", "submitted"]),
    data=st.dictionaries(st.just("k"), json_values),
)


fences = st.builds(
    Fence,
    prompt_id=st.sampled_from([prompt_id_of(job, 1) for job in JOBS[:3]]),
    job=st.sampled_from(JOBS),
    server=st.sampled_from(["local", "other"]),
    origin=st.just("http://x"),
)
kept = st.builds(
    Kept,
    job=st.sampled_from([*JOBS, *NAMES]),
    place=st.sampled_from(Place),
    at=st.sampled_from(TIMES),
    bytes=st.integers(0, 3),
)
few = st.none() | st.integers(0, 4)
others = st.one_of(
    st.builds(Keep, kept=kept),
    st.builds(Drop, job=st.sampled_from([*JOBS, *NAMES])),
    st.builds(Forget, job=st.sampled_from(JOBS), version=st.integers(0, 3)),
    st.builds(Raise, fence=fences),
    fences.map(lambda fence: Lift(prompt_id=fence.prompt_id)),
    st.builds(Remember, name=st.sampled_from(["paused", "draining"]), value=json_values),
)


class Conformance(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(prefix="comfyd-journal-"))
        self.path = self.folder / "state" / "journal.db"
        self.model = MemoryStore()
        self.store = SqliteStore.open(self.path)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    @rule(data=st.data())
    def commit(self, data):
        changes = data.draw(st.lists(self.changes(), max_size=4))
        batch = Batch(changes=tuple(changes), events=tuple(data.draw(st.lists(events, max_size=3))))
        assert self.store.commit(batch) == self.model.commit(batch)

    @rule(count=st.integers(1, 3), key=st.sampled_from(KEYS), state=st.sampled_from(State))
    def arrive(self, count, key, state):
        """What a draw of everything seldom gives: many rows, alike."""
        free = sorted(self.model.without_rows(JOBS))[:count]
        arrivals = tuple(
            Insert(row=Row(job=job, seq=seq, key=key, state=state, claimed_at=float(seq)))
            for seq, job in enumerate(free, self.model.last_seq() + 1)
        )
        batch = Batch(changes=arrivals)
        assert self.store.commit(batch) == self.model.commit(batch) == (True,) * len(free)

    @precondition(lambda self: self.model.rows_by_job)
    @rule(data=st.data())
    def change(self, data):
        known = st.sampled_from(list(self.model.rows_by_job.values()))
        batch = Batch(changes=(data.draw(known.flatmap(self.updates)),))
        assert self.store.commit(batch) == self.model.commit(batch)

    def changes(self):
        """Changes of which many apply: most updates start from a row as it is now."""
        inserts = st.builds(Insert, row=rows())
        aliases = st.builds(
            Alias, name=st.sampled_from(NAMES + JOBS), job=st.sampled_from(JOBS + NAMES)
        )
        known = list(self.model.rows_by_job.values())
        if not known:
            return inserts | inserts | aliases | others
        return inserts | st.sampled_from(known).flatmap(self.updates) | aliases | others

    @staticmethod
    def updates(old):
        """Of the row as it is, as it is but retired, of another version, and of another seq."""
        after = old.version + 1
        change = msgspec.structs.replace
        same = rows([old.job]).map(lambda row: change(row, seq=old.seq, version=after))
        not_applied = (
            st.just(change(old, retired=True, version=after)),
            same.map(lambda row: change(row, version=after + 1)),
            same.map(lambda row: change(row, seq=old.seq + 1)),
        )
        following = st.one_of(same, same, *not_applied)
        return following.map(lambda row: Update(row=row, expected=row.version - 1))

    @rule(
        bounds=st.builds(
            Bounds,
            age_s=st.none() | st.sampled_from(TIMES),
            count=few,
            bytes=st.none() | st.integers(0, 60),
        ),
        limit=st.integers(1, 5),
        after=st.integers(0, 3),
        dry=st.booleans(),
    )
    def prune(self, bounds, limit, after, dry):
        asked = (bounds, 30.0)
        pruned = self.store.prune_events(*asked, after=after, limit=limit, dry=dry)
        assert pruned == self.model.prune_events(*asked, after=after, limit=limit, dry=dry)

    @precondition(lambda self: self.model.rows_by_job)
    @rule(data=st.data())
    def forget(self, data):
        """Of a row as it is: it applies often enough to be seen."""
        row = data.draw(st.sampled_from(list(self.model.rows_by_job.values())))
        batch = Batch(changes=(Forget(job=row.job, version=row.version),))
        assert self.store.commit(batch) == self.model.commit(batch)

    @rule(clean=st.booleans())
    def reopen(self, clean):
        self.store.close(clean=clean)
        self.store = SqliteStore.open(self.path)
        self.model.close(clean=clean)
        self.model = self.model.reopened()

    @rule()
    def look_from_outside(self):
        self.store.close()
        reader = open_readonly(self.path)
        self.compare(reader)
        assert reader.opened_cleanly()
        reader.close()
        self.store = SqliteStore.open(self.path)
        self.model.close()
        self.model = self.model.reopened()

    @invariant()
    def answers_agree(self):
        if hasattr(self, "store"):
            self.compare(self.store)
            assert self.store.opened_cleanly() == self.model.opened_cleanly()

    def compare(self, store):
        model = self.model
        assert store.active() == model.active()
        for now_s in (*TIMES, 15.0):
            for shelf in Shelf:
                assert store.candidates(2, now_s, shelf) == model.candidates(2, now_s, shelf)
            assert store.overdue(2, now_s) == model.overdue(2, now_s)
        for state in (State.DONE, State.FAILED, State.CANCELLED):
            assert store.latest(state, limit=2) == model.latest(state, limit=2)
        assert store.fences() == model.fences()
        assert store.remembered() == model.remembered()
        assert store.counts() == model.counts()
        assert store.last_seq() == model.last_seq()
        assert store.without_rows(JOBS + NAMES) == model.without_rows(JOBS + NAMES)
        for state in State:
            assert store.oldest(state) == model.oldest(state)
            assert store.rows(state, limit=2) == model.rows(state, limit=2)
            assert store.rows(state, limit=2, after=4) == model.rows(state, limit=2, after=4)
        assert store.rows(limit=9) == model.rows(limit=9)
        assert store.rows(limit=2, after=4) == model.rows(limit=2, after=4)
        for job in (*JOBS, *NAMES):
            assert store.get(job) == model.get(job)
            assert store.events(job) == model.events(job)
        for place in Place:
            assert store.tally(place) == model.tally(place)
            every = store.kept(place, limit=9)
            assert every == model.kept(place, limit=9)
            assert store.newest_kept(place, limit=9) == every[::-1]
            for one in every:
                assert store.kept(place, limit=1, after=one) == every[every.index(one) + 1 :][:1]
                assert store.newest_kept(place, limit=9, before=one) == (
                    model.newest_kept(place, limit=9, before=one)
                )
        for after in (0, 3):
            assert store.past(limit=2, after=after) == model.past(limit=2, after=after)
        for key in (*KEYS, "none"):
            assert store.keyed(key) == model.keyed(key)
        for text in SEARCHES:
            assert store.find(text) == model.find(text)


TestConformance = Conformance.TestCase
TestConformance.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
