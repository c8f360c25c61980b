"""Results appear whole, once, and bring what was submitted; at whatever point a crash comes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from comfyd.core.model import JobId, Row, Staged
from comfyd.errors import DiskFull
from comfyd.spool import delivery, rename
from comfyd.spool.delivery import PublishResult, Stage
from comfyd.spool.layout import Spool

JOB = JobId("fox.01ARZ3NDEKTSV4RRFFQ69G5FAV")
BYTES = b'{"3": {}}'
Place = Literal["done", "failed"]


@pytest.fixture
def row(spool: Spool) -> Row:
    (spool.claimed / f"{JOB}.json").write_bytes(BYTES)
    return Row(job=JOB, seq=1, payload=f"{JOB}.json", sha256=hashlib.sha256(BYTES).hexdigest())


def odd_row(spool: Spool) -> Row:
    """Of something that is no file: never read, so without a hash."""
    (spool.claimed / f"{JOB}.json").symlink_to("/etc/hostname")
    return Row(job=JOB, seq=1, payload=f"{JOB}.json")


def staged(spool: Spool, row: Row, place: Place = "done") -> Row:
    stage = Stage.begin(spool, row.job)
    stage.part_path("9-0.png").write_bytes(b"picture")
    stage.seal("9-0.png")
    assert stage.add_payload(row) == ""
    return replace(row, staged=stage.finish(delivery.MANIFESTS[place], {"job": row.job}))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def tree(path: Path) -> list[str]:
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))


# --- staging -------------------------------------------------------------------------------------


def test_a_result_is_complete_private_until_shown_and_then_the_groups(
    spool: Spool, row: Row
) -> None:
    stage = Stage.begin(spool, JOB)
    assert mode_of(stage.path) & 0o077 == 0
    stage.part_path("9-0.png").write_bytes(b"picture")
    assert stage.seal("9-0.png") == 7
    stage.part_path("9-1.png").write_bytes(b"given up")
    assert stage.add_payload(row) == ""
    result = stage.finish("result.json", {"ui": "ein Füchslein \ud800"})
    manifest = (stage.path / "result.json").read_bytes()
    assert result == Staged(
        manifest_sha256=hashlib.sha256(manifest).hexdigest(), outputs=1, bytes=7
    )
    assert json.loads(manifest) == {"ui": "ein Füchslein \ud800"}
    assert delivery.publish(spool, replace(row, staged=result), place="done") is (
        PublishResult.PUBLISHED
    )
    done = spool.done / JOB
    assert tree(done) == ["9-0.png", "job.json", "result.json"]
    assert mode_of(done) == 0o2750
    assert {mode_of(path) for path in done.iterdir()} == {0o640}
    assert (done / "job.json").read_bytes() == BYTES
    assert delivery.retire(spool, row) == ""
    assert tree(spool.claimed) == tree(spool.stage) == []


def test_the_group_is_that_of_the_place(spool: Spool, row: Row) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give folders away to any group")
    os.chown(spool.done, -1, 1234)
    staged(spool, row)
    assert (spool.stage / JOB).stat().st_gid == 1234
    assert (spool.stage / JOB / "9-0.png").stat().st_gid == 1234


def test_beginning_again_wipes_what_a_crash_left(spool: Spool, row: Row) -> None:
    old = staged(spool, row)
    (spool.stage / JOB / "sub").mkdir()
    assert old.staged is not None
    Stage.begin(spool, JOB)
    assert tree(spool.stage) == [JOB]
    again = staged(spool, row).staged
    assert again == old.staged


@pytest.mark.parametrize("name", ["", ".x", "a/b", "../x", "payload"])
def test_outputs_cannot_have_every_name(spool: Spool, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        Stage.begin(spool, JOB).part_path(name)


def test_a_yaml_job_stays_one(spool: Spool, row: Row) -> None:
    (spool.claimed / row.payload).rename(spool.claimed / f"{JOB}.yaml")
    staged(spool, replace(row, payload=f"{JOB}.yaml"))
    assert (spool.stage / JOB / "job.yaml").read_bytes() == BYTES


def test_a_removed_or_changed_payload_is_a_warning(spool: Spool, row: Row) -> None:
    stage = Stage.begin(spool, JOB)
    (spool.claimed / row.payload).write_bytes(b"changed")
    assert "changed" in stage.add_payload(row)
    assert (stage.path / "job.json").read_bytes() == b"changed"
    (spool.claimed / row.payload).unlink()
    assert "removed" in Stage.begin(spool, JOB).add_payload(row)
    assert delivery.retire(spool, row) == ""


def test_a_full_disk_leaves_no_half_manifest(
    spool: Spool, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage.begin(spool, JOB)

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskFull):
            stage.add_payload(row)
        with pytest.raises(DiskFull):
            stage.finish("result.json", {})
    assert tree(stage.path) == []
    assert stage.add_payload(row) == ""
    stage.finish("result.json", {})


# --- what is no file -----------------------------------------------------------------------------


def make_symlink(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "photo.png").write_bytes(b"x")


def make_large(path: Path) -> None:
    path.write_bytes(b"x" * 100)


ODD = [make_symlink, make_folder, os.mkfifo, make_large]


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("crashes", [0, 1, 2, 3])
def test_odd_things_move_as_they_are_through_any_crash(
    spool: Spool, make: Callable[[Path], None], crashes: int
) -> None:
    """A crash after the move, after the manifest, after begin: the thing is never lost."""
    source = spool.claimed / f"{JOB}.json"
    make(source)
    before = source.lstat()
    row = Row(job=JOB, seq=1, payload=source.name)
    if crashes > 0:
        Stage.begin(spool, JOB).add_payload(row)
    if crashes > 1:
        Stage.begin(spool, JOB).finish("error.json", {})
    if crashes > 2:
        Stage.begin(spool, JOB)
    stage = Stage.begin(spool, JOB)
    assert stage.add_payload(row) == ""
    row = replace(row, staged=stage.finish("error.json", {}))
    assert delivery.publish(spool, row, place="failed") is PublishResult.PUBLISHED
    assert delivery.retire(spool, row) == ""
    after = (spool.failed / JOB / "payload").lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )
    assert tree(spool.claimed) == []


def test_an_odd_thing_that_vanished_is_a_warning(spool: Spool) -> None:
    row = odd_row(spool)
    (spool.claimed / row.payload).unlink()
    assert "removed" in Stage.begin(spool, JOB).add_payload(row)


def test_an_odd_thing_that_cannot_be_moved_stays_and_is_told(humble_spool: Spool) -> None:
    folder = humble_spool.claimed / f"{JOB}.json"
    folder.mkdir(0o500)
    if os.geteuid() == 0:
        pytest.skip("root moves everything")
    row = Row(job=JOB, seq=1, payload=folder.name)
    assert "stays in claimed/" in Stage.begin(humble_spool, JOB).add_payload(row)
    assert "was left" in delivery.retire(humble_spool, row)
    assert folder.is_dir()


# --- publishing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["done", "failed"])
def test_publishing_again_finds_it_published(spool: Spool, row: Row, place: Place) -> None:
    row = staged(spool, row, place)
    assert delivery.publish(spool, row, place=place) is PublishResult.PUBLISHED
    assert delivery.publish(spool, row, place=place) is PublishResult.ALREADY_TAKEN
    assert (spool.root / place / JOB / "9-0.png").read_bytes() == b"picture"


def test_what_a_consumer_took_is_not_delivered_again(spool: Spool, row: Row) -> None:
    row = staged(spool, row)
    delivery.publish(spool, row, place="done")
    (spool.done / JOB).rename(spool.root / "taken")
    assert delivery.publish(spool, row, place="done") is PublishResult.ALREADY_TAKEN
    assert tree(spool.done) == []


def test_what_a_consumer_changed_in_place_is_not_delivered_again(spool: Spool, row: Row) -> None:
    row = staged(spool, row)
    delivery.publish(spool, row, place="done")
    (spool.done / JOB / "result.json").unlink()
    assert delivery.publish(spool, row, place="done") is PublishResult.ALREADY_TAKEN


def plant_empty(path: Path) -> None:
    path.mkdir()


def plant_full(path: Path) -> None:
    path.mkdir()
    (path / "result.json").write_text("{}")


def plant_odd_manifest(path: Path) -> None:
    path.mkdir()
    (path / "result.json").mkdir()


def plant_fifo_manifest(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "result.json")


def plant_file(path: Path) -> None:
    path.write_text("mine")


def plant_symlink(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent.parent / "elsewhere")


def plant_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


PLANTS = [
    plant_empty,
    plant_full,
    plant_odd_manifest,
    plant_fifo_manifest,
    plant_file,
    plant_symlink,
    plant_dangling,
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("old_kernel", [False, True])
def test_nothing_is_ever_replaced(
    spool: Spool,
    row: Row,
    plant: Callable[[Path], None],
    old_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old_kernel:
        without_renameat2(monkeypatch)
    row = staged(spool, row)
    plant(spool.done / JOB)
    before = [(path, os.lstat(spool.root / path).st_ino) for path in tree(spool.root)]
    for _ in range(2):
        assert delivery.publish(spool, row, place="done") is PublishResult.CONFLICT
    assert before == [(path, os.lstat(spool.root / path).st_ino) for path in tree(spool.root)]
    # As a failure it still can be delivered.
    row = staged(spool, row, "failed")
    assert delivery.publish(spool, row, place="failed") is PublishResult.PUBLISHED


def test_a_stage_that_someone_reached_into_is_not_shown(spool: Spool, row: Row) -> None:
    row = staged(spool, row)
    (spool.stage / JOB / "result.json").unlink()
    assert delivery.publish(spool, row, place="done") is PublishResult.CONFLICT
    assert tree(spool.done) == []


def without_renameat2(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rename, "_renameat2", refuse)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_without_renameat2_it_works_the_same(
    spool: Spool, row: Row, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_renameat2(monkeypatch, number)
    row = staged(spool, row)
    assert delivery.publish(spool, row, place="done") is PublishResult.PUBLISHED
    assert tree(spool.done / JOB) == ["9-0.png", "job.json", "result.json"]
    assert mode_of(spool.done / JOB) == 0o2750
    assert delivery.publish(spool, row, place="done") is PublishResult.ALREADY_TAKEN


def test_without_renameat2_a_crash_halfway_is_finished(
    spool: Spool, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_renameat2(monkeypatch)
    row = staged(spool, row)

    def crash(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            delivery.publish(spool, row, place="done")
    assert tree(spool.done) == [JOB]  # the reserved name
    assert delivery.publish(spool, row, place="done") is PublishResult.PUBLISHED
    assert tree(spool.done / JOB) == ["9-0.png", "job.json", "result.json"]


def test_a_full_disk_delays(spool: Spool, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    without_renameat2(monkeypatch, errno.ENOSPC)
    row = staged(spool, row)
    with pytest.raises(DiskFull):
        delivery.publish(spool, row, place="done")
    monkeypatch.undo()
    assert delivery.publish(spool, row, place="done") is PublishResult.PUBLISHED


def test_other_errors_are_not_swallowed(
    spool: Spool, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_renameat2(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        delivery.publish(spool, staged(spool, row), place="done")


def test_publishing_what_was_not_staged_is_a_bug(spool: Spool, row: Row) -> None:
    with pytest.raises(ValueError, match="nothing was staged"):
        delivery.publish(spool, row, place="done")


# --- cleaning up ---------------------------------------------------------------------------------


def test_retiring_twice_is_fine_and_a_row_without_a_file_too(spool: Spool, row: Row) -> None:
    assert delivery.retire(spool, row) == delivery.retire(spool, row) == ""
    assert delivery.retire(spool, replace(row, payload="")) == ""


def test_stages_of_nobody_are_removed_but_never_a_payload(spool: Spool, row: Row) -> None:
    other = JobId(JOB.replace("fox", "cat"))
    staged(spool, row)
    (spool.claimed / f"{other}.json").mkdir()
    stage = Stage.begin(spool, other)
    stage.add_payload(Row(job=other, seq=2, payload=f"{other}.json"))
    (spool.stage / "stray").write_text("")
    assert delivery.reap(spool, {JOB}) == []
    assert sorted(os.listdir(spool.stage)) == [JOB]
    assert (spool.claimed / f"{other}.json").is_dir()
    assert delivery.reap(spool, set()) == []
