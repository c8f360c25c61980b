"""What strangers made is removed as far as it can be, and nothing beside it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from comfyd.errors import DiskFull
from comfyd.spool import clearing
from comfyd.spool.clearing import DEPTH, cleared
from comfyd.spool.layout import Spool
from tests.spool.conftest import nest, not_ours


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400, 0o500])
def test_what_is_ours_goes_whatever_its_mode(humble_spool: Spool, mode: int):
    top = humble_spool.stage / "top"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / "file").touch(0o000)
    (top / "sub").chmod(mode)
    top.chmod(mode)
    assert cleared(top) == ""
    assert not top.exists()


def test_what_cannot_go_hinders_nothing_beside_it(humble_spool: Spool):
    top = humble_spool.stage / "top"
    for name in ("a", "locked", "z"):
        (top / name / "deep").mkdir(parents=True)
        (top / name / "file").touch()
    not_ours(top / "locked")
    assert cleared(top) == "Permission denied"
    left = sorted(str(path.relative_to(top)) for path in top.rglob("*"))
    assert left == ["locked", "locked/deep", "locked/file"]


@pytest.mark.parametrize("levels", [DEPTH - 1, DEPTH, DEPTH + 1, 3 * DEPTH, 3000])
def test_no_depth_is_too_much(humble_spool: Spool, levels: int):
    top = humble_spool.stage / "top"
    top.mkdir()
    nest(top, levels)
    assert cleared(top) == ""
    assert not top.exists()


def test_who_goes_on_nesting_is_not_waited_for(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clearing, "MOVES", 3)
    top = spool.stage / "top"
    top.mkdir()
    nest(top, 10 * DEPTH)
    assert cleared(top) == "it is nested too deeply"
    monkeypatch.undo()
    assert cleared(top) == ""


def test_who_puts_a_file_back_meanwhile_is_not_waited_for(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
):
    top = spool.stage / "top"
    (top / "sub").mkdir(parents=True)
    rmdir = os.rmdir

    def late(name: Any, **options: Any) -> None:
        if name == "sub":
            (top / "sub" / "again").touch()
        rmdir(name, **options)

    monkeypatch.setattr(os, "rmdir", late)
    assert cleared(top) == "Directory not empty"
    assert (top / "sub" / "again").exists()


@pytest.mark.parametrize("where", ["in it", "itself"])
def test_no_link_is_followed(spool: Spool, tmp_path: Path, where: str):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    top = spool.stage / "top"
    if where == "in it":
        top.mkdir()
        (top / "link").symlink_to(precious)
    else:
        top.symlink_to(precious)
    assert cleared(top) == ""
    assert not os.path.lexists(top)
    assert (precious / "file").exists()


def test_a_link_put_in_the_place_of_a_folder_is_not_followed(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the look at it and its opening: its producer may still write beside it."""
    precious = tmp_path / "precious"
    precious.mkdir(0o500)
    (precious / "file").touch()
    top = spool.stage / "top"
    (top / "sub").mkdir(parents=True)
    look = os.stat

    def late(name: Any, **options: Any) -> os.stat_result:
        found = look(name, **options)
        if name == "sub":
            (top / "sub").rmdir()
            (top / "sub").symlink_to(precious)
        return found

    monkeypatch.setattr(os, "stat", late)
    assert cleared(top) == "Not a directory"
    monkeypatch.undo()
    assert (precious / "file").exists()
    assert precious.stat().st_mode & 0o777 == 0o500
    assert cleared(top) == ""


def test_what_is_not_there_is_no_trouble(spool: Spool):
    assert cleared(spool.stage / "gone") == ""


def test_a_disk_that_takes_nothing_is_a_pause(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    top = spool.stage / "top"
    top.mkdir()
    (top / "file").touch()

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(DiskFull):
        cleared(top)
    assert (top / "file").exists()
