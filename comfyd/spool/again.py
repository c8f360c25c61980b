"""A job that has ended, once more: what was submitted is claimed again, from its result.

Blocking. The copy appears in ``claimed/`` by one rename, under the id of the new job; a crash
before its row is committed leaves a file that ``Intake.adopt`` makes a plain job of. So nothing is
lost, and nothing runs twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from comfyd.core.facts import Claimed
from comfyd.core.model import Row, State
from comfyd.errors import JobFileError
from comfyd.spool.delivery import PAYLOAD
from comfyd.spool.intake import Intake
from comfyd.spool.layout import (
    ULID_BYTES,
    Spool,
    extension_of,
    fsync_dir,
    full_disk_told,
    new_ulid,
    write_durably,
)

BUNDLE: Final = "job"  # the folder of a result that holds the bundle as it was submitted

_CHANGED: Final = "is not as it was submitted; submit it anew"


def claim_again(
    intake: Intake,
    row: Row,
    *,
    max_file_bytes: int,
    now_s: Callable[[], float],
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Claimed:
    """Claim what the final job *row* was made of as a new job, with its key and its drawn seeds.

    Args:
      max_file_bytes: Nothing larger is read.
      now_s: Seconds since the epoch.

    Raises:
      JobFileError: There is nothing to make it of; a sentence for whoever asked. Nothing was done.
      DiskFull: Nothing was done; try again when there is space.

    """
    spool = intake.spool
    payload = _put_back(spool, row, max_file_bytes, new_ulid(now_s(), random_bytes(ULID_BYTES)))
    taken = intake.adopt([payload])
    if not taken.claims:
        raise JobFileError(f"{payload} vanished from claimed/; submit the file again")
    new = taken.claims[0].row
    if new.sha256 != row.sha256:  # a bundle: a file was found so before it was copied
        _wipe(spool.claimed / new.payload)
        raise JobFileError(f"the bundle in its folder {_CHANGED}")
    return Claimed(row=replace(new, retry_of=row.job, key=row.key, drawn=row.drawn or new.drawn))


def _put_back(spool: Spool, row: Row, max_bytes: int, ulid: str) -> str:
    """Copy it to ``claimed/``; its name there."""
    place = "done" if row.state is State.DONE else "failed"
    folder = spool.root / place / row.job
    if not folder.is_dir():
        raise JobFileError(
            f"its folder was taken away from {place}/ and with it what was submitted; submit the"
            " file again"
        )
    extension = row.payload.removeprefix(row.job)
    payload = f"{row.job.rpartition('.')[0]}.{ulid}{extension}"
    aside = spool.stage / f".{payload}.part"  # a start clears stage/ of what a crash left there
    bundle = folder / BUNDLE
    if bundle.is_dir() and not bundle.is_symlink():
        _copy_bundle(bundle, spool.claimed / payload, aside)
        return payload
    name = f"{BUNDLE}{extension_of(row.payload)}"
    data = _read(folder / name, max_bytes)
    if data is None:
        odd = os.path.lexists(folder / PAYLOAD)
        what = "what was submitted is no job file" if odd else f"there is no {name} in its folder"
        raise JobFileError(f"{what}; submit a good one instead")
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise JobFileError(f"{name} in its folder {_CHANGED}")
    write_durably(spool.claimed / payload, data, aside=aside, mode=0o600)
    return payload


def _read(path: Path, max_bytes: int) -> bytes | None:
    """The content of a regular file of the size that is allowed; else None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = file.read(max_bytes + 1)
    return data if len(data) <= max_bytes else None


def _copy_bundle(bundle: Path, target: Path, aside: Path) -> None:
    """Args: aside: a folder for the copy while it is made."""
    copy = aside / BUNDLE
    with full_disk_told():
        try:
            aside.mkdir(0o700)
            shutil.copytree(bundle, copy, symlinks=True)
            for folder, _, files in os.walk(copy):
                for name in files:
                    _sync_file(Path(folder, name))
                fsync_dir(Path(folder))
            copy.rename(target)
        finally:
            _wipe(aside)
        fsync_dir(target.parent)


def _sync_file(path: Path) -> None:
    if path.is_symlink():
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _wipe(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
