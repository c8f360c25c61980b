"""A long queue costs no more than a short one: counted in steps of SQLite, never in time."""

import sqlite3

import pytest

from comfyd.core.model import JobId, LetDown, Outcome, Row, ServerName, Shelf, State, Verdict
from comfyd.core.retention import Kept, Place
from comfyd.journal import schema
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Batch, Change, Event, Insert, Keep

REFUSALS = (
    Verdict(server=ServerName("a"), origin="http://a", outcome=Outcome(state=State.FAILED)),
)
AWAY = LetDown(server=ServerName("a"), origin="http://a", times=1, since_s=0.0, said="")
QUESTIONS = {
    "candidates": (schema.CANDIDATES, (Shelf.FRESH, 50.0, 100)),
    "refused candidates": (schema.CANDIDATES, (Shelf.REFUSED, 50.0, 100)),
    "let down candidates": (schema.LET_DOWN, (50.0, 100)),
    "next due": (schema.NEXT_DUE, (50.0,)),
    "overdue": (schema.OVERDUE, (50.0, 100)),
    "next deadline": (schema.NEXT_DEADLINE, (50.0,)),
    "fences": (schema.FENCES, ()),
    "remembered": (schema.REMEMBERED, ()),
    "active": (schema.ACTIVE, ()),
    "counts": (schema.COUNTS, ()),
    "oldest": (schema.OLDEST, ("queued",)),
    "page": (schema.PAGE, (1000, 100)),
    "page of a state": (schema.PAGE_OF_STATE, ("queued", 1000, 100)),
    "latest": (schema.LATEST, ("done", 10)),
    "keyed": (schema.KEYED, ("key-7",)),
    "named": (schema.NAMED, ("no-such-name",)),
    "beginning": (schema.BEGINNING, ("job-77", "job-77\x7f", 20)),
    "events": (schema.EVENTS, ("job-77.01K",)),
    "get": (schema.GET, ("job-77.01K",)),
    "last seq": (schema.LAST_SEQ, ()),
    "oldest results": (schema.OLDEST_KEPT, ("done", 5.0, "", 100)),
    "newest results": (schema.NEWEST_KEPT, ("done", 900.0, "", 100)),
    "tally": (schema.TALLY, ("done",)),
    "past": (schema.PAST, (10, 100)),
    "first events": (schema.LAST_LOOKED, (10, 100)),
    "last event": (schema.LAST_EVENT, ()),
    "events out of bounds": (
        schema.PRUNABLE,
        {"after": 10, "last": 60, "before": 1e9, "to_id": -1, "to_bytes": -1e9},
    ),
}


def journal_of(path, jobs):
    """A queue with every kind of row at its head, middle and end, and a few in other states."""
    store = SqliteStore.open(path)
    rows = [
        Row(
            job=JobId(f"job-{seq}.01K"),
            seq=seq,
            priority=seq % 3,
            not_before=100.0 + seq if seq % 500 == 0 else 0.0,
            # All of them wait for ever or for long, but for a few.
            queue_by=float(seq if seq < 50 else 10_000 + seq) if seq % 2 else None,
            key=f"key-{seq}" if seq % 10 == 7 else None,
            verdicts=REFUSALS if seq % 7 == 0 else (),
            let_down=AWAY if seq % 11 == 0 else None,
            state=State.SUBMITTED if seq in (1, jobs) else State.QUEUED,
        )
        for seq in range(1, jobs + 1)
    ]
    kept = [Kept(job=row.job, place=Place.DONE, at=float(row.seq), bytes=1) for row in rows]
    told = [Event(job=row.job, at=float(row.seq), kind="claimed") for row in rows]
    changes: tuple[Change, ...] = (
        *(Insert(row=row) for row in rows),
        *(Keep(kept=each) for each in kept),
    )
    store.commit(Batch(changes=changes, events=tuple(told)))
    assert store.counts()[State.QUEUED] == jobs - 2
    store.close()
    return sqlite3.connect(path)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    db = journal_of(tmp_path_factory.mktemp("short") / "journal.db", 1_000)
    yield db
    db.close()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    db = journal_of(tmp_path_factory.mktemp("long") / "journal.db", 100_000)
    yield db
    db.close()


def steps(db, query, values):
    """How many instructions of its virtual machine SQLite needs for the answer."""
    taken = 0

    def count():
        nonlocal taken
        taken += 1

    db.set_progress_handler(count, 1)
    db.execute(query, values).fetchall()
    db.set_progress_handler(None, 0)
    return taken


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_hundred_times_the_queue_is_the_same_work(short, long, question):
    query, values = QUESTIONS[question]
    assert steps(long, query, values) < 1.5 * steps(short, query, values) + 100


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_question_sorts_or_reads_the_table_through(long, question):
    query, values = QUESTIONS[question]
    plan = [detail for _, _, _, detail in long.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    # An index that holds only what is asked for is walked in its own order.
    walks = {
        "SCAN counts",
        "SCAN fences",
        "SCAN settings",
        "SCAN events",  # LAST_EVENT, from the end
        "SCAN jobs USING INDEX queue",
        "SCAN jobs USING INDEX active",
    }
    odd = [line for line in plan if not line.startswith("SEARCH") and line not in walks]
    parts = ("SUBQUERY", "CO-ROUTINE", "SCAN (subquery")
    assert [line for line in odd if not any(part in line for part in parts)] == []


def test_no_question_is_missing_here():
    selects = {
        name
        for name, text in vars(schema).items()
        if isinstance(text, str) and text.lstrip().startswith("SELECT")
    }
    asked = {query for query, _ in QUESTIONS.values()}
    assert {name for name in selects if getattr(schema, name) not in asked} == {
        "AT_VERSION",  # by job, as get
        "KNOWN",
        "ALL",  # at start, to check every row
    }
