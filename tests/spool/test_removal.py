"""Results go whole, whatever a consumer or a crash does; what is not over stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from comfyd.core.model import JobId, Row, State
from comfyd.core.retention import Kept, Place
from comfyd.errors import DiskFull
from comfyd.spool import delivery, removal
from comfyd.spool.layout import Spool
from comfyd.spool.removal import Removal
from tests.spool.conftest import nest, not_ours

JOB = JobId("fox.01ARZ3NDEKTSV4RRFFQ69G5FAV")
DONE = Kept(job=JOB, place=Place.DONE, at=5.0)
FAILED = Kept(job=JOB, place=Place.FAILED, at=5.0)
ROW = Row(job=JOB, seq=1, state=State.DONE, payload=f"{JOB}.json", sha256="ab", retired=True)


def publish(spool: Spool, kept: Kept) -> Path:
    folder = spool.root / kept.place.value / kept.job
    (folder / "job" / "deep").mkdir(parents=True)
    (folder / "job" / "deep" / "photo.png").write_bytes(b"x")
    (folder / "payload").write_bytes(b"what was no job")
    (folder / "result.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kept", [DONE, FAILED])
def test_a_result_goes_with_all_that_is_in_it(spool: Spool, kept: Kept):
    folder = publish(spool, kept)
    assert removal.there(spool, [kept]) == [kept]
    assert removal.remove(spool, kept) == (Removal.REMOVED, "")
    assert not folder.exists()
    assert os.listdir(spool.stage) == []
    assert removal.there(spool, [kept]) == []
    assert removal.remove(spool, kept) == (Removal.GONE, "")


@pytest.mark.parametrize("name", [JOB, f"{JOB}.json", f"{JOB}.yaml"])
def test_while_what_was_submitted_is_in_claimed_the_result_stays(spool: Spool, name: str):
    """It is what says, should the journal be lost, that the job was done."""
    folder = publish(spool, DONE)
    (spool.claimed / name).write_bytes(b"x")
    what, problem = removal.remove(spool, DONE)
    assert what is Removal.CLAIMED
    assert name in problem
    assert folder.exists()
    assert removal.lies(spool, ROW)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_not_ours(spool: Spool, tmp_path: Path, kind: str):
    place = spool.done / JOB
    precious = tmp_path / "precious"
    precious.mkdir()
    place.symlink_to(precious) if kind == "link" else place.write_bytes(b"x")
    assert removal.remove(spool, DONE)[0] is Removal.FOREIGN
    assert os.path.lexists(place)
    assert precious.exists()


def test_a_link_in_a_result_is_removed_and_not_followed(spool: Spool, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    (publish(spool, DONE) / "link").symlink_to(precious)
    assert removal.remove(spool, DONE) == (Removal.REMOVED, "")
    assert (precious / "file").exists()


def test_a_crash_half_way_leaves_nothing_in_sight_and_the_next_start_clears_it(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
):
    publish(spool, FAILED)

    class Crash(Exception):
        pass

    def crash(*args: Any, **kwargs: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", crash)
        with pytest.raises(Crash):
            removal.remove(spool, FAILED)
    assert os.listdir(spool.failed) == []
    assert os.listdir(spool.stage) == [f".{JOB}.removed"]
    delivery.reap(spool, set())
    assert os.listdir(spool.stage) == []
    # A payload in there was a copy's original once: it does not become a job again.
    assert os.listdir(spool.claimed) == []


def test_a_disk_that_takes_nothing_is_a_pause(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    folder = publish(spool, DONE)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(DiskFull):
        removal.remove(spool, DONE)
    assert folder.exists()


def test_what_nobody_but_root_may_empty_is_out_of_sight_and_hinders_no_start(
    humble_spool: Spool,
):
    locked = publish(humble_spool, FAILED) / "job" / "deep"
    not_ours(locked)
    what, problem = removal.remove(humble_spool, FAILED)
    assert what is Removal.LEFT
    assert "Permission denied; remove it as root" in problem
    assert os.listdir(humble_spool.failed) == []
    [left] = os.listdir(humble_spool.stage)
    assert removal.again(humble_spool) == [problem]
    assert delivery.reap(humble_spool, set()) == [problem]
    # All the rest is gone: it is large, as a rule.
    found = [path.name for path in (humble_spool.stage / left).rglob("*")]
    assert found == ["job", "deep", "photo.png"]
    not_ours(humble_spool.stage / left / "job" / "deep", mode=0o777)
    assert removal.again(humble_spool) == []
    assert os.listdir(humble_spool.stage) == []


def test_a_result_that_is_nested_endlessly_goes_all_the_same(spool: Spool):
    nest(publish(spool, FAILED))
    assert removal.remove(spool, FAILED) == (Removal.REMOVED, "")
    assert os.listdir(spool.stage) == []


def test_a_start_removes_what_is_nested_endlessly(spool: Spool):
    left = spool.stage / f".{JOB}.removed"
    left.mkdir()
    nest(left)
    assert delivery.reap(spool, set()) == []
    assert os.listdir(spool.stage) == []


def test_a_payload_that_may_not_be_moved_stays_and_hinders_no_start(humble_spool: Spool):
    payload = humble_spool.stage / JOB / "payload"
    payload.mkdir(parents=True)
    payload.chmod(0o500)
    (problem,) = delivery.reap(humble_spool, set())
    assert "payload cannot be moved: Permission denied" in problem
    payload.chmod(0o700)
    assert delivery.reap(humble_spool, set()) == []
    assert os.listdir(humble_spool.claimed) == [f"{JOB}.json"]


def test_a_result_that_may_not_be_moved_is_told_of(humble_spool: Spool):
    folder = publish(humble_spool, DONE)
    humble_spool.done.chmod(0o500)
    what, problem = removal.remove(humble_spool, DONE)
    assert what is Removal.REFUSED
    assert "cannot be moved" in problem
    assert folder.exists()


@pytest.mark.parametrize("where", ["done", "failed", "stage"])
def test_a_row_is_needed_while_anything_of_its_job_lies_about(spool: Spool, where: str):
    assert not removal.lies(spool, ROW)
    (spool.root / where / JOB).mkdir()
    assert removal.lies(spool, ROW)
