"""Who may hold a folder's lock together, and that a dead holder holds nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from comfyd.errors import SpoolBusy
from comfyd.journal.lock import StateLock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from comfyd.journal.lock import StateLock
lock = StateLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def test_a_second_daemon_is_refused_until_the_first_lets_go(path):
    with StateLock(path).acquire():
        with pytest.raises(SpoolBusy, match="another comfyd"):
            StateLock(path).acquire()
        with pytest.raises(SpoolBusy, match="running comfyd"):
            StateLock(path).acquire_shared()
    with StateLock(path).acquire():
        pass


def test_a_reader_makes_no_file_that_a_daemon_might_not_open(path):
    with StateLock(path).acquire_shared():
        assert not path.exists()


def test_readers_read_together_and_keep_a_daemon_out_meanwhile(path):
    path.touch()
    first, second = StateLock(path).acquire_shared(), StateLock(path).acquire_shared()
    for reader in (first, second):
        with pytest.raises(SpoolBusy):
            StateLock(path).acquire()
        reader.release()
    with StateLock(path).acquire():
        pass


def test_what_the_file_holds_means_nothing(path):
    path.write_text("99999\n")
    with StateLock(path).acquire():
        pass
    assert path.read_text() == "99999\n"


def test_a_killed_holder_holds_nothing(path):
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SpoolBusy):
            StateLock(path).acquire()
        holder.kill()
    with StateLock(path).acquire():
        pass


def test_a_lock_is_taken_once_by_one_object_and_never_through_a_link(path, tmp_path):
    with StateLock(path).acquire() as lock, pytest.raises(RuntimeError, match="already held"):
        lock.acquire_shared()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        StateLock(elsewhere).acquire()
