"""What survives: kills at any moment, full disks and failing ones."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comfyd.core.model import JobId, Row, State, prompt_id_of
from comfyd.errors import DiskFull
from comfyd.journal import file
from comfyd.journal.sqlite import SqliteStore, open_readonly
from comfyd.journal.store import Batch, Update
from tests.journal.writer import JOBS_A_BATCH, big, insert, jobs_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "journal.db"


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
from tests.journal.writer import big

folder = Path(sys.argv[1])
ballast = folder / "ballast"
path = folder / "state" / "journal.db"
store = SqliteStore.open(path)
ballast.write_bytes(bytes(500_000))
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


# A crash, and no space for the index that SQLite makes of the log it finds.
REAL_FULL_START = """
import os, subprocess, sys
from pathlib import Path
from comfyd.errors import DiskFull
from comfyd.journal.sqlite import SqliteStore

folder = Path(sys.argv[1])
path = folder / "state" / "journal.db"
crash = "import os, sys; from pathlib import Path; from tests.journal.writer import big"
crash += "; from comfyd.journal.sqlite import SqliteStore; s = SqliteStore.open(Path(sys.argv[1]))"
crash += "; s.commit(big(1)); os._exit(0)"
subprocess.run([sys.executable, "-c", crash, str(path)], check=True)
assert path.with_name("journal.db-wal").stat().st_size > 0
path.with_name("journal.db-shm").unlink(missing_ok=True)
ballast = folder / "ballast"
try:
    with open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
try:
    SqliteStore.open(path)
except DiskFull as error:
    assert "No space left" in str(error), error
else:
    raise AssertionError("there is no space")
ballast.unlink()
store = SqliteStore.open(path)
assert [row.seq for row in store.rows(limit=9)] == [1]
print("ok")
"""


@pytest.mark.parametrize("program", [REAL_FULL_DISK, REAL_FULL_START], ids=["commit", "start"])
def test_a_really_full_disk_is_a_refusal_too(tmp_path, program):
    mount = 'mount -t tmpfs -o size=1200k none "$1" && exec "$2" -c "$3" "$1"'
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    namespace = [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("may not make a namespace to mount a small disk in")
    finished = subprocess.run(
        [*namespace, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout == "ok\n", finished.stderr


REFUSED_DISK = """
import sys
from pathlib import Path
from comfyd.errors import DiskFull
from comfyd.journal.sqlite import SqliteStore
from tests.journal.writer import big

store = SqliteStore.open(Path(sys.argv[1]))
seq, refused = 1, 0
while refused < 2 or seq < 9:
    try:
        assert store.commit(big(seq)) == (True,)
        seq += 1
    except DiskFull as error:
        assert error.__cause__.sqlite_errorname == "SQLITE_IOERR_WRITE", error.__cause__
        refused += 1
assert store.last_seq() == seq - 1
store.close()
store = SqliteStore.open(Path(sys.argv[1]))
assert store.opened_cleanly()
assert [row.seq for row in store.rows(limit=99)] == list(range(seq - 1, 0, -1))
store.close()
print("ok")
"""


def traced(path, log, program, *inject):
    """Run *program* on a new journal; how many of its writes strace saw, and what it said."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace(1)")
    shutil.rmtree(path.parent, ignore_errors=True)
    tracing = [strace, "-f", "-o", log, "-e", "trace=pwrite64", *inject]
    finished = subprocess.run(
        [*tracing, sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if not log.exists() or not log.read_text():
        pytest.skip(f"may not trace: {finished.stderr}")
    return log.read_text().count("pwrite64("), finished


OPENED = """
import sys
from pathlib import Path
from comfyd.journal.sqlite import SqliteStore

SqliteStore.open(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", ["EDQUOT", "EROFS"])
def test_a_quota_or_a_read_only_disk_refuses_a_batch_and_the_store_goes_on(path, tmp_path, number):
    opening, _ = traced(path, tmp_path / "log", OPENED)
    for after in (1, 2, 5, 9):
        # A write of a commit, the one that asks why; and both once more.
        nths = f"{opening + after}..{opening + after + 3}"
        inject = f"inject=pwrite64:error={number}:when={nths}"
        _, finished = traced(path, tmp_path / "log", REFUSED_DISK, "-e", inject)
        assert finished.stdout == "ok\n", finished.stderr


BROKEN_DISK = """
import resource, signal, sys
from pathlib import Path
from comfyd.errors import JournalError
from comfyd.journal.sqlite import SqliteStore
from tests.journal.writer import big

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


UNSYNCED = """
import sys
from pathlib import Path
from comfyd.errors import JournalError
from comfyd.journal.sqlite import SqliteStore
from tests.journal.writer import big

try:
    store = SqliteStore.open(Path(sys.argv[1]))
    for seq in range(1, 5):
        store.commit(big(seq))
except JournalError:
    print("stopped")
else:
    print("went on")
"""


@pytest.mark.parametrize(
    ("call", "nths"),
    # Of the folders and their parents; of the file, the WAL, its folder, and of commits.
    [("fsync", (1, 2, 3)), ("fdatasync", (4, 5, 6, 8))],
)
def test_no_failed_sync_is_passed_over(path, tmp_path, call, nths):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace(1)")
    log = tmp_path / "log"
    outcomes = []
    for nth in nths:
        shutil.rmtree(path.parent, ignore_errors=True)
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={nth}"]
        finished = subprocess.run(
            [strace, "-f", "-y", "-o", log, *inject, sys.executable, "-c", UNSYNCED, path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if not log.exists() or not log.read_text():
            pytest.skip(f"may not trace: {finished.stderr}")
        [injected] = [line for line in log.read_text().splitlines() if "INJECTED" in line]
        # SQLite syncs the names of its files without looking at the answer; we do it once more.
        by_sqlite_for_names = call == "fdatasync" and f"<{path.parent}>" in injected
        if not by_sqlite_for_names:
            outcomes.append(finished.stdout)
    assert len(outcomes) >= 3
    assert set(outcomes) == {"stopped\n"}
