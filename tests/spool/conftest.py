"""A spool on the real file system, and what the intake needs to fill rows."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comfyd.spool.intake import Intake
from comfyd.spool.layout import Spool

GRAPH = b'{"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}'
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
SEED = 4242
NOBODY = 65534
PRODUCER = 65533


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


@pytest.fixture
def humble_spool() -> Iterator[Spool]:
    """A spool for a process without privileges: as root, we are nobody for the time of the test."""
    parent = Path(tempfile.mkdtemp(prefix="comfyd-"))
    was = os.geteuid()
    try:
        if was == 0:
            os.chown(parent, NOBODY, NOBODY)
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        spool = Spool(parent / "spool")
        spool.prepare()
        yield spool
    finally:
        if was == 0:
            os.seteuid(0)
            os.setegid(0)
        for folder, names, _ in os.walk(parent):
            for name in names:
                path = Path(folder) / name
                if not path.is_symlink():
                    path.chmod(0o700)
        shutil.rmtree(parent)


@pytest.fixture
def impatient() -> Iterator[None]:
    """A call that blocks fails after 30 s: the test would not end."""

    def late(*_: object) -> None:
        raise TimeoutError("something was waited for")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def nest(folder: Path, levels: int = 1200) -> None:
    """Nest folders in *folder*, deeper than Python likes."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def not_ours(folder: Path, mode: int = 0o755) -> None:
    """Give *folder* to a producer: a spool's daemon (`humble_spool`) may not change its mode."""
    if os.getuid() != 0:
        pytest.skip("only root can give folders away")
    before = os.geteuid()
    os.seteuid(0)
    try:
        os.chown(folder, PRODUCER, -1)
        folder.chmod(mode)
    finally:
        os.seteuid(before)


MakeIntake = Callable[..., Intake]


@pytest.fixture
def make_intake() -> MakeIntake:
    """Makes an Intake with short, fixed settings."""

    def make(spool: Spool, **options: Any) -> Intake:
        return Intake(
            spool,
            **{
                "settle_s": 0.2,
                "max_file_bytes": 10_000,
                "max_attempts": 3,
                "next_seq": itertools.count(1).__next__,
                "draw": lambda job: lambda: SEED,
                "now_s": time.time,
                **options,
            },
        )

    return make
