"""What the file is when it is not simply ours: newer, foreign, damaged, in use, only read."""

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from msgspec.structs import replace

from comfyd.core.model import Fence, JobId, PromptId, Row, ServerName, Shelf, State
from comfyd.core.retention import Kept, Place, Tally
from comfyd.errors import ConfigError, JournalDamaged, JournalError, JournalTooNew, SpoolBusy
from comfyd.journal import schema
from comfyd.journal.file import prepare_state
from comfyd.journal.quarantine import open_or_begin_anew
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.journal.store import Batch, Event, Update
from tests.journal.writer import big, insert


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal.db"


@pytest.mark.parametrize("crashed", [False, True])
def test_a_journal_of_a_newer_version_is_left_as_it_is(path, crashed):
    SqliteStore.open(path).close()
    newer = f"""if True:
        import os, sqlite3
        db = sqlite3.connect({str(path)!r}, isolation_level=None)
        db.execute("PRAGMA user_version = 999")
        db.execute("CREATE TABLE novelty (x)")
        os._exit(0) if {crashed} else db.close()
    """
    subprocess.run([sys.executable, "-c", newer], check=True, timeout=30)
    wal = path.with_name(path.name + "-wal")
    assert wal.exists() == crashed
    kept = [each for each in (path, wal) if each.exists()]
    before = [each.read_bytes() for each in kept]
    for open_it in (SqliteStore.open, open_readonly):
        with pytest.raises(JournalTooNew, match="999"):
            open_it(path)
    assert [each.read_bytes() for each in kept] == before


def test_a_database_of_someone_else_is_left_as_it_is(path):
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = path.read_bytes()
    for open_it in (SqliteStore.open, open_readonly):
        with pytest.raises(JournalError, match="not a journal of comfyd"):
            open_it(path)
    assert path.read_bytes() == before


def filled(path):
    store = SqliteStore.open(path)
    for seq in range(1, 30):
        store.commit(big(seq))
    store.close()
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("damage", ["text", "header", "schema page", "a tree", "cut short"])
def test_damage_is_refused_with_a_sentence_that_says_what_to_do(path, damage):
    content = filled(path)
    match damage:
        case "text":
            content = bytearray(b"not a database at all\n" * 1000)
        case "header":
            content[:16] = bytes(16)
        case "schema page":
            content[100:400] = b"\xff" * 300
        case "a tree":
            content[4096:8192] = b"\xff" * 4096
        case "cut short":
            del content[len(content) // 2 :]
        case _:
            raise NotImplementedError(damage)
    path.write_bytes(content)
    with pytest.raises(JournalDamaged, match="aside"):
        SqliteStore.open(path)
    assert path.read_bytes() == content  # kept for whoever wants to look into it
    anew = open_or_begin_anew(path)
    assert anew.last_seq() == 0
    anew.close()
    [aside] = path.parent.glob("journal.db.damaged-*Z")
    assert aside.read_bytes() == content


def change(path, statement):
    db = sqlite3.connect(path)
    with db:
        db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE jobs SET data = CAST(replace(CAST(data AS TEXT), '01A', '01B') AS BLOB)",
        "UPDATE jobs SET data = 'text'",
        "UPDATE jobs SET state = 'held'",
        "UPDATE jobs SET state = CAST(X'ff' AS TEXT)",
        "UPDATE jobs SET version = 7",
        "DROP TABLE owner",
        "INSERT INTO settings VALUES ('paused', X'ff')",
        "PRAGMA user_version = 0",
        "PRAGMA user_version = -5",
        "PRAGMA user_version = 1234567890",
        "PRAGMA application_id = 5",
    ],
)
def test_what_no_comfyd_has_written_is_damage(path, statement):
    store = SqliteStore.open(path)
    store.commit(insert())
    store.close()
    change(path, statement)
    with pytest.raises(JournalDamaged):
        SqliteStore.open(path)
    anew = open_or_begin_anew(path)
    assert (anew.last_seq(), anew.opened_cleanly()) == (0, True)
    anew.close()
    assert len(list(path.parent.glob("journal.db.damaged-*Z"))) == 1


def crashed(path, commits):
    """A journal whose owner was killed after so many *commits*; returns its WAL."""
    writer = f"""if True:
        import os
        from pathlib import Path
        from comfyd.journal import sqlite
        from tests.journal.writer import big
        store = sqlite.SqliteStore.open(Path({str(path)!r}))
        for seq in range(1, {commits} + 1):
            store.commit(big(seq))
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", writer], check=True, timeout=30)
    return path.with_name(path.name + "-wal")


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9])
def test_a_wal_that_is_damaged_before_its_end_is_damage(path, where):
    wal = crashed(path, 10)
    content = bytearray(wal.read_bytes())
    at = int(len(content) * where)
    content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    wal.write_bytes(content)
    store = open_or_begin_anew(path)
    assert store.last_seq() == 0
    store.close()
    assert len(list(path.parent.glob("journal.db.damaged-*Z"))) == 1


def test_a_wal_that_ends_within_a_transaction_is_what_a_crash_leaves(path):
    wal = crashed(path, 10)
    os.truncate(wal, wal.stat().st_size - 5000)
    store = SqliteStore.open(path)
    assert store.last_seq() == 9
    store.close()


@pytest.mark.parametrize("left_bytes", [24, 2000, 4119])
def test_a_commit_that_a_full_disk_cut_off_is_no_damage(path, left_bytes):
    """Its frame's head says that a transaction ends there; but the page is not whole."""
    wal = crashed(path, 10)
    content = wal.read_bytes()
    assert (len(content) - 32) % 4120 == 0
    wal.write_bytes(content + content[-4120:][:left_bytes])
    store = SqliteStore.open(path)
    assert store.last_seq() == 10
    store.close()


@pytest.mark.parametrize("removed", ["", "-wal", "both"])
def test_a_journal_that_is_removed_under_its_owner_is_put_back_whole(path, removed):
    store = SqliteStore.open(path)
    store.commit(insert())
    wal = path.with_name(path.name + "-wal")
    for file in {"": [path], "-wal": [wal], "both": [path, wal]}[removed]:
        file.unlink()
    for _ in range(2):
        with pytest.raises(JournalError, match="a copy with all that was committed"):
            store.commit(insert("wolf.01B", 2))
    store.close()
    successor = SqliteStore.open(path)
    assert [row.job for row in successor.rows(limit=9)] == ["fox.01A"]
    assert not successor.opened_cleanly()
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, wal.name]
    assert path.stat().st_mode & 0o777 == 0o600
    successor.close()


def test_a_journal_that_is_replaced_under_its_owner_is_left_to_who_did_it(path):
    other = path.with_name("other.db")
    replacement = SqliteStore.open(other)
    replacement.commit(insert("wolf.01B", 2))
    replacement.close()
    store = SqliteStore.open(path)
    store.commit(insert())
    other.rename(path)
    with pytest.raises(JournalError, match="was replaced"):
        store.commit(insert("bear.01C", 3))
    store.close()
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    successor = SqliteStore.open(path)
    assert [row.job for row in successor.rows(limit=9)] == ["wolf.01B"]
    successor.close()


@pytest.mark.parametrize("reason", ["newer", "in use"])
def test_a_journal_that_is_not_ours_to_judge_is_not_set_aside(path, reason):
    store = SqliteStore.open(path)
    if reason == "newer":
        store.close()
        change(path, "PRAGMA user_version = 999")
    with pytest.raises((JournalTooNew, SpoolBusy)):
        open_or_begin_anew(path)
    assert list(path.parent.glob("*.damaged-*")) == []
    if reason == "in use":
        store.close()


def test_a_row_that_cannot_be_read_is_damage(path):
    store = SqliteStore.open(path)
    store.commit(insert())
    store._db.execute("UPDATE jobs SET data = ?", (b'{"job": 1}',))  # behind its back
    with pytest.raises(JournalError, match="damaged"):
        store.get(JobId("fox.01A"))
    with pytest.raises(JournalError, match="damaged"):
        store.commit(insert("wolf.01B", 2))
    store.close()


def test_a_row_written_before_a_field_existed_reads_with_its_default(path):
    store = SqliteStore.open(path)
    store.commit(insert(max_attempts=7))
    store.close()
    db = sqlite3.connect(path)
    with db:
        old = b'{"job": "fox.01A", "seq": 1, "given_up_since": [1]}'
        db.execute("UPDATE jobs SET data = ?, crc = NULL", (old,))
    db.close()
    store = SqliteStore.open(path)
    assert store.get(JobId("fox.01A")) == Row(job=JobId("fox.01A"), seq=1)
    store.close()


@pytest.fixture
def humble():
    """A folder of a process without privileges: as root, we are nobody for the time of the test."""
    folder = Path(tempfile.mkdtemp(prefix="comfyd-"))
    was = os.geteuid()
    if was == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(was)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("", 0o500), ("lock", 0o400), ("comfyd.db", 0o400), ("comfyd.db-wal", 0o000)],
)
def test_what_in_the_state_folder_is_not_ours_is_told_with_the_remedy(humble, name, mode):
    state = humble / "state"
    prepare_state(state)
    prepare_state(state)
    if name:
        (state / name).touch()
    (state / name).chmod(mode)
    with pytest.raises(ConfigError, match=f"chown -R .* {state}") as raised:
        prepare_state(state)
    assert str(state / name) in str(raised.value)
    (state / name).chmod(0o700)


def test_a_state_folder_that_cannot_be_made_is_told(humble):
    humble.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be used: .*Permission denied; run: ") as raised:
        prepare_state(humble / "state")
    assert str(raised.value).rpartition("; run: ")[2].startswith("install -d -m 700 -o ")
    humble.chmod(0o700)


def test_of_the_refused_in_version_4_those_are_told_apart_that_were_only_let_down(path):
    """Else they are looked for where they are not, again and again."""
    away = {"server": "a", "origin": "http://a", "times": 1, "since_s": 0.0, "said": ""}
    refusal = {"server": "a", "origin": "http://a", "outcome": {"state": "failed"}}
    jobs = [
        {"job": "fox.01A", "seq": 1},
        {"job": "wolf.01B", "seq": 2, "let_down": away},
        {"job": "bear.01C", "seq": 3, "let_down": away, "verdicts": [refusal]},
    ]
    path.parent.mkdir()
    db = sqlite3.connect(path)
    for statement in itertools.chain(*schema.MIGRATIONS[:4]):
        db.execute(statement)
    for job in jobs:
        data = json.dumps(job).encode()
        db.execute(
            "INSERT INTO jobs (state, version, priority, not_before, claimed_at, retired, refused,"
            " job, seq, data, crc) VALUES ('queued', 0, 0, 0.0, 0.0, 0, ?, ?, ?, ?, ?)",
            (len(job) > 2, job["job"], job["seq"], data, zlib.crc32(data)),
        )
    db.execute("INSERT INTO counts VALUES ('queued', 3)")
    db.execute("PRAGMA user_version = 4")
    db.commit()
    db.close()
    store = SqliteStore.open(path)
    found = {shelf: [row.seq for row in store.candidates(9, 0.0, shelf).rows] for shelf in Shelf}
    assert found == {Shelf.FRESH: [1], Shelf.LET_DOWN: [2], Shelf.REFUSED: [3]}
    store.close()


def test_a_journal_of_version_1_becomes_one_of_today_with_its_jobs_and_fences(path):
    given_up = [["local", "http://x", "p-1"], ["other", "http://y", "p-2"]]
    refusal = {"server": "local", "origin": "http://x", "outcome": {"state": "failed"}}
    jobs = [
        {"job": "fox.01A", "seq": 1, "metadata": {"name": "f\u00fcchs\0"}},
        {"job": "wolf.01B", "seq": 2, "attempt": 3, "abandoned": given_up, "verdicts": [refusal]},
        {"job": "bear.01C", "seq": 3, "abandoned": [["local", "http://x", "p-0"], given_up[0]]},
    ]
    path.parent.mkdir()
    db = sqlite3.connect(path)
    for statement in schema.MIGRATIONS[0]:
        db.execute(statement)
    jobs += [
        {
            "job": "hare.01D",
            "seq": 4,
            "state": "done",
            "published_at": 8.5,
            "staged": {"manifest_sha256": "0", "bytes": 77},
        },
        {"job": "lynx.01E", "seq": 5, "state": "cancelled"},
    ]
    for job in jobs:
        state = job.get("state", "queued")
        old = (state, job["job"], job["seq"], json.dumps(job).encode())
        db.execute(
            "INSERT INTO jobs (state, version, priority, not_before, claimed_at, retired, job, seq,"
            " data) VALUES (?, 0, 0, 0.0, 0.0, 0, ?, ?, ?)",
            old,
        )
    db.execute("INSERT INTO counts VALUES ('queued', 3), ('done', 1), ('cancelled', 1)")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    with pytest.raises(JournalError, match="start the daemon once"):
        open_readonly(path)

    store = SqliteStore.open(path)
    fox, bear = store.candidates(9, 0.0, Shelf.FRESH).rows
    (wolf,) = store.candidates(9, 0.0, Shelf.REFUSED).rows
    assert (fox.job, fox.metadata) == ("fox.01A", {"name": "f\u00fcchs\0"})
    assert wolf.abandoned == tuple(map(tuple, given_up))
    fences = [("p-1", wolf, "local", "http://x"), ("p-2", wolf, "other", "http://y")]
    assert store.fences() == tuple(
        Fence(prompt_id=PromptId(prompt_id), job=row.job, server=ServerName(server), origin=origin)
        for prompt_id, row, server, origin in [*fences, ("p-0", bear, "local", "http://x")]
    )
    assert store.remembered() == {schema.WHOLE: True}
    assert store.overdue(9, 1e9).rows == ()
    assert [store.kept(place, limit=9) for place in Place] == [
        (Kept(job=JobId("hare.01D"), place=Place.DONE, at=8.5, bytes=77),),
        (Kept(job=JobId("lynx.01E"), place=Place.FAILED, at=0.0),),
    ]
    assert store.tally(Place.DONE) == Tally(count=1, bytes=77)
    assert [row.job for row in store.latest(State.DONE, limit=9)] == ["hare.01D"]
    limited = replace(fox, version=1, queue_by=5.0)
    assert store.commit(Batch(changes=(Update(row=limited, expected=0),))) == (True,)
    assert store.overdue(9, 1e9).rows == (limited,)
    store.close()
    reader = open_readonly(path)
    assert len(reader.fences()) == 3
    reader.close()


def test_nobody_else_gets_in_while_it_is_open_and_everybody_afterwards(path):
    store = SqliteStore.open(path)
    store.commit(insert())
    code = (
        f"import sqlite3; print(*sqlite3.connect({str(path)!r}, 0).execute('SELECT job FROM jobs'))"
    )
    shell = [sys.executable, "-c", code]
    refused = subprocess.run(shell, capture_output=True, text=True, timeout=30)
    assert "database is locked" in refused.stderr
    for open_it in (SqliteStore.open, open_readonly):
        with pytest.raises(SpoolBusy):
            open_it(path)
    store.close()
    served = subprocess.run(shell, capture_output=True, text=True, timeout=30)
    assert served.stdout == "('fox.01A',)\n"


def test_the_files_are_for_their_owner_alone_and_no_index_is_mapped(path):
    previous = os.umask(0)
    try:
        store = SqliteStore.open(path)
        store.commit(insert())
    finally:
        os.umask(previous)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600}
    store.close()


def test_reading_alone_changes_nothing_and_needs_a_journal(path):
    with pytest.raises(JournalError, match="unable to open"):
        open_readonly(path)
    assert not path.exists()
    path.parent.mkdir()
    path.touch()  # a daemon was killed before it could write anything
    with pytest.raises(JournalError, match="start the daemon once"):
        open_readonly(path)
    store = SqliteStore.open(path)
    store.commit(
        Batch(changes=insert().changes, events=(Event(job=JobId("fox.01A"), at=1.0, kind="x"),))
    )
    store.close()
    before = path.read_bytes()
    reader = open_readonly(path)
    assert [row.job for row in reader.rows(limit=5)] == ["fox.01A"]
    reader.close()
    assert path.read_bytes() == before


def test_a_change_that_cannot_be_stored_leaves_no_trace(path):
    store = SqliteStore.open(path)
    store.commit(insert())
    half = Batch(changes=(*insert("wolf.01B", 2).changes, *insert("\ud800", 3).changes))
    with pytest.raises(UnicodeEncodeError):
        store.commit(half)
    assert store.last_seq() == 1
    assert store.counts()[State.QUEUED] == 1
    assert store.commit(insert("wolf.01B", 2)) == (True,)
    store.close()


def test_an_update_must_follow_the_version_it_replaces():
    with pytest.raises(ValueError, match="does not follow"):
        Update(row=Row(job=JobId("fox.01A"), seq=1, version=3), expected=3)
