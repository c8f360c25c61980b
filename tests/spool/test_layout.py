"""Where things lie, what they are called, and that they get there whole."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.errors import ConfigError, DiskFull
from comfyd.spool import layout
from comfyd.spool.layout import MODES, Spool, drop, job_id_for, new_ulid, write_durably

ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01BX5ZZKBKACTAV9WEVGEMMVRZ"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- preparing -----------------------------------------------------------------------------------


def test_the_folders_are_made_with_their_modes_whatever_the_umask(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    before = os.umask(0o077)
    try:
        spool.prepare()
    finally:
        os.umask(before)
    assert {path.name: mode_of(path) for path in spool.root.iterdir()} == MODES
    assert mode_of(spool.root) == 0o755
    spool.prepare()  # twice is fine
    assert [list(path.iterdir()) for path in spool.root.iterdir()] == [[]] * 6


def test_modes_that_a_person_chose_stay(spool: Spool) -> None:
    spool.new.chmod(0o700)
    spool.done.chmod(0o2755)
    spool.prepare()
    assert (mode_of(spool.new), mode_of(spool.done)) == (0o700, 0o2755)


def test_a_consumer_may_take_what_is_only_a_try(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees a folder in ``done/`` for a moment; the daemon must start all the same."""
    make = Path.mkdir
    taken: list[Path] = []

    def mkdir(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        if path.parent == spool.done and not taken:
            path.rename(spool.root / "taken")
            taken.append(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    spool.prepare()
    assert taken
    assert list(spool.done.iterdir()) == list(spool.stage.iterdir()) == []


def test_a_missing_parent_is_not_made_up(tmp_path: Path) -> None:
    """A disk that is not mounted must not be replaced by a folder of the same name."""
    with pytest.raises(ConfigError, match="make it first"):
        Spool(tmp_path / "disk" / "spool").prepare()
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("name", ["", *MODES])
def test_symbolic_links_are_refused(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "spool"
    if name:
        root.mkdir()
    (root / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="symbolic link"):
        Spool(root).prepare()
    assert list(elsewhere.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("")
    with pytest.raises(ConfigError, match="real folder"):
        Spool(tmp_path / "spool").prepare()


@pytest.mark.parametrize("name", [".", "claimed", "stage", "done", "failed"])
def test_folders_that_others_may_write_are_refused(spool: Spool, name: str) -> None:
    (spool.root / name).chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        spool.prepare()


def test_two_file_systems_are_refused(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: str, target: str) -> None:
        if "/done/" in str(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ConfigError, match="one file system"):
        spool.prepare()
    assert list(spool.done.iterdir()) == []


def test_a_spool_that_cannot_be_written_is_refused(humble_spool: Spool) -> None:
    humble_spool.stage.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        humble_spool.prepare()


def test_a_full_disk_is_not_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFull):
        Spool(tmp_path / "spool").prepare()


# --- names ---------------------------------------------------------------------------------------


def test_ulids_sort_by_time_and_have_the_form() -> None:
    assert new_ulid(0.0, bytes(10)) == "0" * 26
    assert new_ulid(1469918176.385, b"\xff" * 10).startswith("01ARYZ6S41")
    assert new_ulid(1.000, b"\xff" * 10) < new_ulid(1.0025, bytes(10))
    assert new_ulid(2.0**48 / 1000 - 0.5, b"\xff" * 10) <= "7" + "Z" * 25


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("portrait.json", f"portrait.{ULID}"),
        ("portrait.v2.json", f"portrait_v2.{ULID}"),
        ("portrait", f"portrait.{ULID}"),
        (f"portrait.{OTHER}.json", f"portrait.{OTHER}"),
        (f"portrait.{OTHER}.yaml", f"portrait.{OTHER}"),
        (f"portrait.{OTHER}", f"portrait.{OTHER}"),
        (f"{OTHER}.json", f"job.{OTHER}"),
        (f"portrait.{OTHER.lower()}.json", f"portrait_{OTHER.lower()}.{ULID}"),
        (f"portrait.8{OTHER[1:]}.json", f"portrait_8{OTHER[1:]}.{ULID}"),
        ("../../etc/passwd", f"_.{ULID}"),
        ("-rf.json", f"rf.{ULID}"),
        ("---.json", f"job.{ULID}"),
        ("füchse 🦊.json", f"f_chse_.{ULID}"),
        ("\udcff.json", f"_.{ULID}"),
        ("a" * 200 + ".json", f"{'a' * 64}.{ULID}"),
        ("", f"job.{ULID}"),
    ],
)
def test_job_ids_come_from_names(name: str, job: str) -> None:
    assert job_id_for(name, ULID, used=lambda _: False) == job


def test_an_id_is_given_once() -> None:
    name = f"portrait.{OTHER}.json"
    assert job_id_for(name, ULID, used=lambda job: job == f"portrait.{OTHER}") == f"portrait.{ULID}"


@given(st.text())
def test_every_name_gives_a_safe_id_that_it_keeps(name: str) -> None:
    job = job_id_for(name, ULID, used=lambda _: False)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.[0-9A-Z]{26}", job)
    assert layout.is_job_id(job)
    for payload in (f"{job}.json", f"{job}.yaml"):
        assert layout.job_of(payload) == job
        assert job_id_for(payload, OTHER, used=lambda _: False) == job


@pytest.mark.parametrize("name", [".x", "x~", "x.tmp", "x.part", "x.json.swp", ".x.json"])
def test_names_of_files_in_the_making_are_ignored(name: str) -> None:
    assert layout.ignored(name)


@pytest.mark.parametrize("name", ["x", "x.json", "~x", "tmp", "x.tmp.json", "x.TMP"])
def test_other_names_are_not(name: str) -> None:
    assert not layout.ignored(name)


# --- durability ----------------------------------------------------------------------------------


def test_a_write_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, aside = tmp_path / "t", tmp_path / "a"
    write_durably(target, b"one", aside=aside)
    real = os.fsync

    def fsync(fd: int) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFull):
        write_durably(target, b"two", aside=aside)
    assert target.read_bytes() == b"one"
    assert not aside.exists()
    monkeypatch.setattr(os, "fsync", real)
    write_durably(target, b"two", aside=aside, mode=0o600)
    assert target.read_bytes() == b"two"
    assert mode_of(target) == 0o600


def test_nothing_in_the_way_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "t", b"x", aside=tmp_path / "a")
    assert not (tmp_path / "victim").exists()


def test_dropping_gives_the_id_at_once(spool: Spool) -> None:
    job = drop(spool, "port rait.yml", b"x")
    (path,) = spool.new.iterdir()
    assert path.name == f"{job}.yaml"
    assert path.read_bytes() == b"x"
    assert mode_of(path) == 0o640
    assert list(spool.tmp.iterdir()) == []
    assert job_id_for(path.name, ULID, used=lambda _: False) == job
    assert drop(spool, f"a.{OTHER}.json", b"", ulid=ULID) == f"a.{ULID}"
