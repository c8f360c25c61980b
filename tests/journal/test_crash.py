"""What survives: kills at any moment, full disks, damage, other versions, other programs."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comfyd.core.model import JobId, Row, State, prompt_id_of
from comfyd.errors import DiskFull, JournalError, JournalTooNew, SpoolBusy
from comfyd.journal import file
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.journal.store import Batch, Event, Insert, Update
from tests.journal.writer import JOBS_A_BATCH, jobs_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal.db"


def insert(job="fox.01A", seq=1, **fields):
    return Batch(changes=(Insert(row=Row(job=JobId(job), seq=seq, **fields)),))


def big(seq):
    """A batch that needs some pages of its own."""
    return insert(f"big.{seq}", seq, metadata={"pad": random.Random(seq).randbytes(6000).hex()})


def kill_a_writer(path, *, after_s):
    """Kill a writer about *after_s* past its first commit; return the last batch it promised."""
    command = [sys.executable, "-m", "tests.journal.writer", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        promised = [writer.stdout.readline()]
        time.sleep(after_s)  # real time: the moment of the kill is meant to be any
        writer.kill()
        promised += writer.stdout.readlines()
    assert writer.returncode == -signal.SIGKILL
    return int([line for line in promised if line.endswith(b"\n")][-1])


def test_every_promised_batch_survives_a_kill_whole_and_no_other_in_part(path):
    moment = random.Random(7)
    for _ in range(10):
        promised = kill_a_writer(path, after_s=moment.uniform(0, 0.03))
        if moment.random() < 0.5:  # a look in between leaves its own files, and harms nothing
            reader = open_readonly(path)
            assert not reader.opened_cleanly()
            assert reader.last_seq() >= (promised + 1) * JOBS_A_BATCH
            reader.close()
        store = SqliteStore.open(path)  # checks the integrity of the file
        assert not store.opened_cleanly()
        batches, rest = divmod(store.last_seq(), JOBS_A_BATCH)
        assert rest == 0
        # At most the one that was being committed came in unannounced.
        assert batches - (promised + 1) in (0, 1)
        for number in range(batches):
            for job in jobs_of(number):
                row = store.get(job)
                assert row is not None
                assert row.state is State.SUBMITTED
                assert store.find(prompt_id_of(job, 1)) == (row,)
                assert len(store.events(job)) == 1
        assert store.counts()[State.SUBMITTED] == batches * JOBS_A_BATCH
        store.close(clean=False)


def test_only_an_orderly_end_is_a_clean_one(path):
    store = SqliteStore.open(path)
    assert store.opened_cleanly()  # there was nobody before
    store.close()
    store = SqliteStore.open(path)
    assert store.opened_cleanly()
    store.close(clean=False)
    store = SqliteStore.open(path)
    assert not store.opened_cleanly()
    store.close()


def test_a_full_disk_refuses_a_batch_and_the_store_goes_on(path):
    store = SqliteStore.open(path)
    store.commit(insert())
    store.close()

    db = file.connect(path, "rw")
    [(pages,)] = db.execute("PRAGMA page_count")
    db.execute(f"PRAGMA max_page_count={pages + 8}")
    store = SqliteStore(db, path, writable=True)
    committed = 0
    with pytest.raises(DiskFull):  # noqa: PT012
        for seq in range(2, 100):
            store.commit(big(seq))
            committed += 1
    assert 0 < committed < 10
    assert store.last_seq() == committed + 1
    assert store.counts()[State.QUEUED] == committed + 1
    store.commit(
        Batch(changes=(Update(row=Row(job=JobId("fox.01A"), seq=1, version=1), expected=0),))
    )

    db.execute(f"PRAGMA max_page_count={pages + 100}")
    assert store.commit(big(committed + 2)) == (True,)
    assert len(store.rows(limit=100)) == committed + 2
    store.close()


REAL_FULL_DISK = """
import os, sys
from pathlib import Path
from comfyd.errors import DiskFull
from comfyd.journal.sqlite import SqliteStore
from tests.journal.test_crash import big

folder = Path(sys.argv[1])
ballast = folder / "ballast"
path = folder / "state" / "journal.db"
store = SqliteStore.open(path)
ballast.write_bytes(bytes(300_000))
committed = 0
try:
    while True:
        store.commit(big(committed + 1))
        committed += 1
except DiskFull as error:
    # The page is refused by the WAL, which is written at COMMIT.
    assert error.__cause__.sqlite_errorname == "SQLITE_FULL", error.__cause__
assert committed > 3, committed
for _ in range(3):
    try:
        store.commit(big(committed + 1))
    except DiskFull:
        pass
    else:
        raise AssertionError("the disk is full, but took a batch")
assert store.last_seq() == committed
ballast.unlink()
assert store.commit(big(committed + 1)) == (True,)
store.close()
store = SqliteStore.open(path)
assert store.opened_cleanly()
assert [row.seq for row in store.rows(limit=10_000)] == list(range(committed + 1, 0, -1))
store.close()
print("ok")
"""


def test_a_really_full_disk_is_a_refusal_too(tmp_path):
    mount = 'mount -t tmpfs -o size=900k none "$1" && exec "$2" -c "$3" "$1"'
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    namespace = [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("may not make a namespace to mount a small disk in")
    finished = subprocess.run(
        [*namespace, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, REAL_FULL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout == "ok\n", finished.stderr


BROKEN_DISK = """
import resource, signal, sys
from pathlib import Path
from comfyd.errors import JournalError
from comfyd.journal.sqlite import SqliteStore
from tests.journal.test_crash import big

store = SqliteStore.open(Path(sys.argv[1]))
store.commit(big(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
for call in (lambda: [store.commit(big(seq)) for seq in range(2, 99)], store.last_seq):
    try:
        call()
    except JournalError as error:
        print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    store.commit(big(99))
except JournalError as error:
    print(type(error).__name__)
store.close()
"""


def test_any_other_failure_of_a_write_ends_all_trust(path):
    finished = subprocess.run(
        [sys.executable, "-c", BROKEN_DISK, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout.split() == ["JournalError"] * 3, finished.stderr
    store = SqliteStore.open(path)
    assert not store.opened_cleanly()  # closing it did not make it look orderly
    assert store.get(JobId("big.1")) is not None
    store.close()


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
    with pytest.raises(JournalError, match="aside") as refused:
        SqliteStore.open(path)
    assert not isinstance(refused.value, JournalTooNew)
    assert path.read_bytes() == content  # kept for whoever wants to look into it


def test_a_row_that_cannot_be_read_is_damage(path):
    store = SqliteStore.open(path)
    store.commit(insert())
    store.close()
    db = sqlite3.connect(path)
    with db:
        db.execute("UPDATE jobs SET data = ?", (b'{"job": 1}',))
    db.close()
    store = SqliteStore.open(path)
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
        db.execute("UPDATE jobs SET data = ?", (old,))
    db.close()
    store = SqliteStore.open(path)
    assert store.get(JobId("fox.01A")) == Row(job=JobId("fox.01A"), seq=1)
    store.close()


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
