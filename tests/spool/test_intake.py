"""Claims: whatever is dropped becomes a row or stays, and nothing in it is ever trusted."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comfyd.core.model import Reason, Row, State
from comfyd.errors import DiskFull
from comfyd.spool import jobfile
from comfyd.spool.intake import BATCH, WINDOW, Intake, Taken
from comfyd.spool.layout import Spool, drop
from tests.spool.conftest import GRAPH, SEED, ULID, MakeIntake

RANDOM = (
    b'{"workflow": %s, "set": {"3.seed": "random"}, "priority": 5, "metadata": {"a": 1}}' % GRAPH
)


class Clock:
    def __init__(self) -> None:
        self.s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.s


def take(intake: Intake, *names: str) -> Taken:
    return intake.claim(intake.named(names or sorted(os.listdir(intake.spool.new))))


def rows(taken: Taken) -> list[Row]:
    return [claim.row for claim in taken.claims]


def put(spool: Spool, name: str, data: bytes = GRAPH) -> Path:
    path = spool.new / name
    path.write_bytes(data)
    return path


# --- claiming ------------------------------------------------------------------------------------


def test_a_job_file_becomes_a_queued_row(spool: Spool, make_intake: MakeIntake) -> None:
    put(spool, "fox.json", RANDOM)
    (row,) = rows(take(make_intake(spool)))
    assert (row.state, row.outcome, row.seq) == (State.QUEUED, None, 1)
    assert row.job.startswith("fox.")
    assert row.payload == f"{row.job}.json"
    assert row.sha256 == hashlib.sha256(RANDOM).hexdigest()
    assert (row.priority, row.metadata, row.drawn) == (5, {"a": 1}, {"3.seed": SEED})
    assert row.max_attempts == 3
    assert (spool.claimed / row.payload).read_bytes() == RANDOM
    assert os.listdir(spool.new) == []
    # What was claimed gives the same graph at every submission.
    job = jobfile.load(RANDOM, row.payload, draw=lambda: 0, drawn=row.drawn)
    assert job.graph["3"]["inputs"]["seed"] == SEED


def test_a_submitted_job_keeps_its_id_once(spool: Spool, make_intake: MakeIntake) -> None:
    intake = make_intake(spool)
    job = drop(spool, "fox.yaml", b'"3": {class_type: A, inputs: {}}')
    assert [row.job for row in rows(take(intake))] == [job]
    put(spool, f"{job}.json")  # the same again, while the first is there
    (row,) = rows(take(intake))
    assert row.job != job
    assert row.job.startswith("fox.")


@pytest.mark.parametrize("place", ["stage", "done", "failed", "journal"])
def test_an_id_that_was_used_is_not_kept(spool: Spool, make_intake: MakeIntake, place: str) -> None:
    job = f"fox.{ULID}"
    if place != "journal":
        (spool.root / place / job).mkdir()
    intake = make_intake(spool, known=lambda asked: place == "journal" and asked == job)
    put(spool, f"{job}.json")
    (row,) = rows(take(intake))
    assert row.job != job


def test_two_of_one_id_in_one_batch(spool: Spool, make_intake: MakeIntake) -> None:
    put(spool, f"fox.{ULID}.json")
    put(spool, f"fox.{ULID}.yaml")
    jobs = {row.job for row in rows(take(make_intake(spool)))}
    assert len(jobs) == 2
    assert f"fox.{ULID}" in jobs


def test_arrival_order_is_change_time_then_name(spool: Spool, make_intake: MakeIntake) -> None:
    intake = make_intake(spool)
    for name in ("b", "c", "a"):
        before = put(spool, name).stat().st_ctime_ns
        while put(spool, ".clock").stat().st_ctime_ns <= before:
            pass  # until the file system's clock, a tick of some milliseconds, moved on
    taken = take(intake, "a", "b", "c")
    assert [row.job[0] for row in rows(taken)] == ["b", "c", "a"]
    assert [row.seq for row in rows(taken)] == [1, 2, 3]
    assert all(seconds >= 0 for seconds in taken.pickup_s)


def test_names_in_the_making_and_gone_are_skipped(spool: Spool, make_intake: MakeIntake) -> None:
    for name in (".hidden", "x.part", "x.tmp", "x~", "x.swp"):
        put(spool, name)
    intake = make_intake(spool, settle_s=0)
    assert intake.named([*os.listdir(spool.new), "gone"]) == []
    assert intake.scan().ready == []
    put(spool, "x.json")
    entries = intake.named(["x.json"])
    (spool.new / "x.json").unlink()
    assert intake.claim(entries) == Taken([], [], [])


@pytest.mark.parametrize("name", [b"\xff\xfe.json", b"a\nb.json", b"-rf.json", b"\xf0\x9f\xa6\x8a"])
def test_any_name_can_be_dropped(spool: Spool, make_intake: MakeIntake, name: bytes) -> None:
    (spool.new / os.fsdecode(name)).write_bytes(GRAPH)
    (row,) = rows(take(make_intake(spool)))
    assert row.state is State.QUEUED
    assert row.payload.isascii()
    assert row.payload.isprintable()
    assert (spool.claimed / row.payload).is_file()


def test_a_batch_is_bounded(spool: Spool, make_intake: MakeIntake) -> None:
    for number in range(BATCH + 3):
        put(spool, f"{number}.json")
    intake = make_intake(spool, settle_s=0)
    ready = intake.scan().ready
    assert len(intake.claim(ready).claims) == BATCH
    assert len(intake.claim(intake.scan().ready).claims) == 3


# --- what is no job ------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)
        try:  # its address has room for some hundred bytes only
            listener.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def make_hard_link(path: Path) -> None:
    (path.parent.parent / "other").write_bytes(GRAPH)
    path.hardlink_to(path.parent.parent / "other")


def make_sparse(path: Path) -> None:
    path.write_bytes(GRAPH)
    os.truncate(path, 10 * 1024**3)


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "photo.png").write_bytes(b"no job")


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "symlink": (lambda path: path.symlink_to("/etc/hostname"), "symbolic link"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "symbolic link"),
    "loop": (lambda path: path.symlink_to(path), "symbolic link"),
    "folder": (make_folder, "no job.yaml or job.json"),
    "fifo": (os.mkfifo, "no regular file"),
    "socket": (make_socket, "no regular file"),
    "hard link": (make_hard_link, "hard links"),
    "sparse": (make_sparse, "10737418240 bytes; jobs.max_file_bytes allows 10000"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_things_are_moved_unread_and_become_failures(
    spool: Spool, make_intake: MakeIntake, kind: str
) -> None:
    make, says = ODD[kind]
    make(spool.new / "x.json")
    before = (spool.new / "x.json").lstat()
    (row,) = rows(take(make_intake(spool)))
    assert (row.state, row.sha256) == (State.COLLECTING, "")
    assert row.outcome is not None
    assert (row.outcome.state, row.outcome.reason) == (State.FAILED, Reason.INVALID_JOB)
    assert says in row.outcome.message
    after = (spool.claimed / row.payload).lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[2] / "precious.json")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def hard_link(path: Path) -> None:
    path.unlink()
    os.link(path.parents[2] / "precious.json", path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("swap", [link, fifo, hard_link])
def test_a_file_that_is_swapped_between_look_and_read_is_not_read(
    spool: Spool, make_intake: MakeIntake, swap: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (spool.root.parent / "precious.json").write_bytes(GRAPH)
    (spool.new / "x.json").write_bytes(GRAPH)
    real = os.open
    swapped: list[str] = []

    def slow_open(path: str, flags: int, *args: int, **fds: int) -> int:
        claimed = spool.claimed / path
        if str(path).startswith("x.") and claimed.exists() and not swapped:
            swapped.append(path)
            swap(claimed)
        return real(path, flags, *args, **fds)

    monkeypatch.setattr(os, "open", slow_open)
    (row,) = rows(take(make_intake(spool)))
    assert swapped
    assert (row.state, row.sha256) == (State.COLLECTING, "")


def test_a_device_is_not_opened(spool: Spool, make_intake: MakeIntake) -> None:
    try:
        os.mknod(spool.new / "x", 0o20666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")
    (row,) = rows(take(make_intake(spool)))
    assert row.outcome is not None
    assert "no regular file" in row.outcome.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[" * 9_000, "nested"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b'{"a": NaN}', "NaN"),
        (b'{"nodes": [], "links": []}', "Export Workflow (API)"),
    ],
)
def test_bad_content_becomes_a_failure_with_its_bytes_kept(
    spool: Spool, make_intake: MakeIntake, data: bytes, says: str
) -> None:
    put(spool, "x.json", data)
    (row,) = rows(take(make_intake(spool)))
    assert row.state is State.COLLECTING
    assert row.outcome is not None
    assert says in row.outcome.message
    assert row.sha256 == hashlib.sha256(data).hexdigest()
    assert (spool.claimed / row.payload).read_bytes() == data


def test_the_largest_file_allowed_is_read(spool: Spool, make_intake: MakeIntake) -> None:
    put(spool, "a", GRAPH + b" " * (10_000 - len(GRAPH)))
    put(spool, "b", GRAPH + b" " * (10_001 - len(GRAPH)))
    assert [row.state for row in rows(take(make_intake(spool)))] == [
        State.QUEUED,
        State.COLLECTING,
    ]


def test_an_unreadable_file_becomes_a_failure(humble_spool: Spool, make_intake: MakeIntake) -> None:
    put(humble_spool, "x.json").chmod(0)
    (row,) = rows(take(make_intake(humble_spool)))
    assert row.outcome is not None
    assert "cannot be read (Permission denied)" in row.outcome.message
    assert row.sha256 == ""


def test_our_own_bug_does_not_kill_us_at_every_start(
    spool: Spool, make_intake: MakeIntake, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw() -> int:
        raise ZeroDivisionError

    put(spool, "x.json", RANDOM)
    (row,) = rows(take(make_intake(spool, draw=lambda job: draw)))
    assert row.outcome is not None
    assert "please report it" in row.outcome.message
    assert "ZeroDivisionError" in row.outcome.message
    assert row.sha256 == hashlib.sha256(RANDOM).hexdigest()
    assert "job_file_not_judged" in "".join(capsys.readouterr())


# --- what cannot be moved, and when there is no space ---------------------------------------------


def test_what_cannot_be_moved_is_told_once_and_left(
    humble_spool: Spool, make_intake: MakeIntake
) -> None:
    intake = make_intake(humble_spool, settle_s=0)
    (humble_spool.new / "x").mkdir(0o500)
    put(humble_spool, "y.json")
    look = intake.scan()
    taken = intake.claim(look.ready)
    assert len(taken.claims) == 1
    assert len(taken.unmovable) == 1
    assert "'x'" in taken.unmovable[0]
    assert "Permission denied" in taken.unmovable[0]
    assert intake.scan().ready == intake.named(["x"]) == []
    (humble_spool.new / "x").rmdir()
    assert intake.scan().ready == []
    (humble_spool.new / "x").mkdir(0o500)
    assert len(intake.scan().ready) <= 1  # told again, unless it got the same inode


def test_what_can_be_moved_after_all_is_taken(humble_spool: Spool, make_intake: MakeIntake) -> None:
    intake = make_intake(humble_spool, settle_s=0)
    folder = humble_spool.new / "x"
    folder.mkdir()
    (folder / "job.json").write_bytes(GRAPH)
    folder.chmod(0o500)
    (told,) = intake.claim(intake.scan().ready).unmovable
    assert "chmod -R g+rwX" in told
    before = folder.stat().st_ctime_ns
    while folder.stat().st_ctime_ns <= before:  # until the file system's clock moved on
        folder.chmod(0o550)
    assert intake.claim(intake.scan().ready) == Taken([], [], [])  # told once
    before = folder.stat().st_ctime_ns
    while folder.stat().st_ctime_ns <= before:
        folder.chmod(0o770)
    (row,) = rows(intake.claim(intake.scan().ready))
    assert row.state is State.QUEUED


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_leaves_the_rest_in_new(
    spool: Spool, make_intake: MakeIntake, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        put(spool, name)
    intake = make_intake(spool)
    real, renames = os.rename, itertools.count()

    def rename(*args: str, **fds: Any) -> None:
        if next(renames) >= 1:
            raise OSError(number, "full")
        real(*args, **fds)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert len(take(intake).claims) == 1
        with pytest.raises(DiskFull):
            take(intake)
    assert [row.seq for row in rows(take(intake))] == [2, 3]


def test_an_error_that_proves_nothing_is_not_the_files_fault(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spool, "x")
    intake = make_intake(spool)
    real = os.open

    def out_of_files(path: str, flags: int, *args: int, **fds: int) -> int:
        if str(path).endswith(".json"):
            raise OSError(errno.EMFILE, "too many")
        return real(path, flags, *args, **fds)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", out_of_files)
        with pytest.raises(OSError, match="too many"):
            take(intake)
    (name,) = os.listdir(spool.claimed)
    assert [row.payload for row in rows(intake.adopt([name]))] == [name]


# --- settling ------------------------------------------------------------------------------------


def test_without_an_event_a_file_must_stay_unchanged(spool: Spool, make_intake: MakeIntake) -> None:
    clock = Clock()
    intake = make_intake(spool, settle_s=2.0, now_s=clock)
    path = put(spool, "x.json", b"{")
    look = intake.scan()
    assert (look.ready, look.again_s) == ([], 2.0)
    clock.s += 1.5
    assert intake.scan().again_s == 0.5
    with path.open("ab") as file:
        file.write(b"more")
    clock.s += 0.5
    look = intake.scan()
    assert (look.ready, look.again_s) == ([], 2.0)
    clock.s += 2.0
    look = intake.scan()
    assert [entry.name for entry in look.ready] == ["x.json"]
    assert look.again_s is None


def test_another_file_of_the_same_name_starts_anew(spool: Spool, make_intake: MakeIntake) -> None:
    clock = Clock()
    intake = make_intake(spool, settle_s=2.0, now_s=clock)
    put(spool, "x.json")
    intake.scan()
    clock.s += 2.0
    put(spool, ".x").rename(spool.new / "x.json")
    assert intake.scan().ready == []


def test_a_forged_time_does_not_help(spool: Spool, make_intake: MakeIntake) -> None:
    intake = make_intake(spool, settle_s=2.0)
    os.utime(put(spool, "old"), (0, 0))
    os.utime(put(spool, "new"), (2**33, 2**33))
    assert intake.scan().ready == []
    assert max(take(intake).pickup_s) < 60


def test_one_look_is_bounded_and_says_that_there_is_more(
    spool: Spool, make_intake: MakeIntake
) -> None:
    for number in range(WINDOW + 10):
        os.close(os.open(spool.new / str(number), os.O_CREAT | os.O_WRONLY))
    intake = make_intake(spool, settle_s=0)
    look = intake.scan()
    assert len(look.ready) == WINDOW
    assert look.again_s == 0.0


# --- adopting ------------------------------------------------------------------------------------


def test_a_claim_that_lost_its_row_is_adopted(spool: Spool, make_intake: MakeIntake) -> None:
    put(spool, "x.json", RANDOM)
    (first,) = rows(take(make_intake(spool)))
    make_folder(spool.claimed / f"bundle.{ULID}.json")
    (spool.claimed / "stray").write_text("")
    (spool.claimed / ".probe-1").mkdir()
    names = [*sorted(os.listdir(spool.claimed)), f"gone.{ULID}.json"]
    taken = make_intake(spool).adopt(names)
    by_job = {row.job: row for row in rows(taken)}
    assert by_job.keys() == {first.job, f"bundle.{ULID}"}
    assert by_job[first.job].sha256 == first.sha256
    assert by_job[first.job].state is State.QUEUED
    assert len(taken.unmovable) == 1
    assert "'stray'" in taken.unmovable[0]
