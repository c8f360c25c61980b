"""Results: put together in ``stage/``, shown by one rename into ``done/`` or ``failed/``.

Blocking throughout; call it in a worker thread. Every step may be repeated after a crash at any
point: a result appears whole, once, and what was submitted is never lost on the way.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Container
from pathlib import Path
from typing import Any, Final, Literal

from comfyd.core.model import JobId, Row, Staged
from comfyd.errors import JobFileError
from comfyd.spool import bundle
from comfyd.spool.clearing import cleared
from comfyd.spool.layout import (
    Spool,
    extension_of,
    fsync_dir,
    full_disk_told,
    open_dir,
    share,
    write_durably,
)
from comfyd.spool.library import tidy
from comfyd.spool.media import HEAD_BYTES, local_name, looks_wrong
from comfyd.spool.rename import rename_folder

__all__ = [
    "HEAD_BYTES",
    "PublishResult",
    "Stage",
    "local_name",
    "looks_wrong",
    "publish",
    "reap",
    "retire",
]

FILE_MODE: Final = 0o640
FOLDER_MODE: Final = 0o2750
MANIFESTS: Final = {"done": "result.json", "failed": "error.json"}

# What was dropped but is no job lies in the result under this name, moved as it was.
PAYLOAD: Final = "payload"
# A bundle lies in the result as a folder of this name, a single file as job.json or job.yaml.
BUNDLE: Final = "job"

# Ends the name under claimed/ of a bundle that is being removed; the name begins with a dot.
_RETIRED: Final = ".retired"
_CHANGED: Final = "what was submitted was changed in claimed/ by someone else"


class Stage:
    """One job's result while it is being put together: ``stage/<job>/``, 0700 until finished.

    The order is begin, then files and payload in any order, then finish.
    """

    def __init__(self, spool: Spool, job: JobId) -> None:
        self.path = spool.stage / job
        self._spool = spool
        self._outputs = 0
        self._bytes = 0

    @classmethod
    def begin(cls, spool: Spool, job: JobId) -> Stage:
        """Start afresh: whatever an earlier try left is wiped, but for a payload moved here.

        Raises:
          DiskFull: Try again when there is space.

        """
        stage = cls(spool, job)
        with full_disk_told():
            with contextlib.suppress(FileExistsError):
                stage.path.mkdir(0o700)
            share(stage.path, spool.done)
        stage.clear()
        return stage

    def clear(self) -> int:
        """Remove what was put here, but for a payload moved here: others may need the space.

        Returns:
          How many bytes of files were removed.

        Raises:
          DiskFull: The disk takes no changes now.

        """
        removed_bytes = 0
        with full_disk_told():
            for name in os.listdir(self.path):
                if name != PAYLOAD:
                    removed_bytes += (self.path / name).lstat().st_size
                    _wipe(self.path / name)
        return removed_bytes

    def part_path(self, name: str) -> Path:
        """Where to write the output *name* until it is sealed."""
        if not name or "/" in name or name.startswith(".") or name == PAYLOAD:
            raise ValueError(f"no name for an output: {name!r}")
        return self.path / f"{name}.part"

    def seal(self, name: str) -> int:
        """The output *name* is complete: make it durable and give it its name.

        Returns:
          Its size in bytes.

        Raises:
          DiskFull: Space ran out while its bytes were being written back.

        """
        part = self.part_path(name)
        with full_disk_told():
            fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(fd, FILE_MODE)
                os.fsync(fd)
                size_bytes = os.fstat(fd).st_size
            finally:
                os.close(fd)
            part.rename(self.path / name)
        self._outputs += 1
        self._bytes += size_bytes
        return size_bytes

    def add_payload(self, row: Row) -> str:
        """Add what was submitted: a copy of it, or the thing itself if it could not be read.

        Returns:
          A warning for the manifest if it is not there, or not as it was claimed; else "".

        Raises:
          DiskFull: Try again when there is space.

        """
        source = self._spool.claimed / row.payload
        if not row.sha256:
            return self._move_payload(source)
        if os.path.lexists(self.path / PAYLOAD):
            return _CHANGED  # found so before a crash
        if source.is_dir() and not source.is_symlink():
            return self._copy_bundle(source, row.sha256)
        try:
            fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return "what was submitted was removed from claimed/ by someone else"
        with open(fd, "rb") as file:
            data = file.read()
        name = f"job{extension_of(row.payload)}"
        aside = self.path / f"{name}.part"
        write_durably(self.path / name, data, aside=aside, mode=FILE_MODE, sync_dir=False)
        if hashlib.sha256(data).hexdigest() != row.sha256:
            return _CHANGED
        return ""

    def _copy_bundle(self, source: Path, sha256: str) -> str:
        target = self.path / BUNDLE
        try:
            with full_disk_told():
                target.mkdir(0o700)
            fd = open_dir(source)
            try:
                pieces = bundle.read(fd, into=target)
            finally:
                os.close(fd)
        except JobFileError as error:  # it was well when it was claimed
            _wipe(target)
            return self._move_payload(source) or f"{_CHANGED}: {error.message}"
        with full_disk_told():
            bundle.sync_folders(target, mode=FOLDER_MODE, file_mode=FILE_MODE)
        copied = bundle.digest({name: piece.sha256 for name, piece in pieces.items()})
        return "" if copied == sha256 else _CHANGED

    def _move_payload(self, source: Path) -> str:
        target = self.path / PAYLOAD
        if os.path.lexists(target):
            return ""  # moved before a crash
        try:
            with full_disk_told():
                source.rename(target)
        except FileNotFoundError:
            return "what was submitted was removed from claimed/ by someone else"
        except PermissionError as error:  # a folder that its owner made read-only for us
            return f"what was submitted stays in claimed/: {error.strerror}"
        fsync_dir(self.path)
        fsync_dir(source.parent)
        return ""

    def finish(self, manifest_name: str, document: dict[str, Any]) -> Staged:
        """Write the manifest; from here on the stage is complete and durable.

        Args:
          manifest_name: ``result.json`` or ``error.json``.
          document: JSON values; no NaN.

        Raises:
          DiskFull: Try again when there is space.

        """
        with full_disk_told():
            for name in os.listdir(self.path):
                if name.endswith(".part"):
                    (self.path / name).unlink()  # of a download that was given up
        # Half a surrogate pair from a server's text becomes the JSON escape of itself.
        data = (json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n").encode(
            "utf-8", "backslashreplace"
        )
        manifest = self.path / manifest_name
        aside = self.part_path(manifest_name)
        write_durably(manifest, data, aside=aside, mode=FILE_MODE, sync_dir=False)
        with full_disk_told():
            self.path.chmod(FOLDER_MODE)
            fsync_dir(self.path)
            fsync_dir(self._spool.stage)
        return Staged(
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            outputs=self._outputs,
            bytes=self._bytes,
        )


class PublishResult(enum.Enum):
    """How an attempt to publish went."""

    PUBLISHED = "published"
    ALREADY_TAKEN = "already_taken"  # published before; a consumer may have taken it away
    CONFLICT = "conflict"  # not published: something that is not ours has its name


def publish(spool: Spool, row: Row, *, place: Literal["done", "failed"]) -> PublishResult:
    """Show a finished stage as ``<place>/<job>``, at most once.

    Nothing but this rename takes a stage away, so no stage means that it was published: whatever
    stands in its place now, or does not, is a consumer's doing.

    Raises:
      DiskFull: Nothing is visible; try again when there is space.
      OSError: The rename or its fsync failed: whether it will last is unknown.

    """
    if row.staged is None:
        raise ValueError(f"nothing was staged for {row.job}")
    folder = spool.root / place
    manifest = MANIFESTS[place]
    sha256 = row.staged.manifest_sha256
    result = PublishResult.PUBLISHED
    stage_fd, folder_fd = open_dir(spool.stage), open_dir(folder)
    try:
        with full_disk_told():
            published = _sha256_of(folder / row.job / manifest) == sha256
            if published or not os.path.lexists(spool.stage / row.job):
                result = PublishResult.ALREADY_TAKEN
            elif _sha256_of(spool.stage / row.job / manifest) != sha256:
                return PublishResult.CONFLICT  # someone reached into stage/
            else:
                try:
                    rename_folder(stage_fd, folder_fd, row.job)
                except OSError as error:
                    if error.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                        return PublishResult.CONFLICT
                    raise
            os.fsync(folder_fd)
            os.fsync(stage_fd)
    finally:
        os.close(stage_fd)
        os.close(folder_fd)
    return result


def _sha256_of(path: Path) -> str | None:
    """The hash of a small file, or None if it is not there as one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES}:
            return None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        with open(fd, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(fd)


def retire(spool: Spool, row: Row) -> str:
    """Remove what was claimed for a published job; no error if it is gone.

    A bundle is renamed first, to what is no job's name: half of it is never taken for a job.

    Returns:
      A sentence for the log if something is left: what could not be parsed is never deleted.

    Raises:
      DiskFull: The disk takes no changes now, not even this one.

    """
    path = spool.claimed / row.payload
    if not row.payload or not os.path.lexists(path):
        return ""
    if not row.sha256:
        return f"claimed/{row.payload} could not be moved to its result and was left"
    if not path.is_dir() or path.is_symlink():
        with full_disk_told():
            path.unlink(missing_ok=True)
        return ""
    aside = path.with_name(f".{path.name}{_RETIRED}")
    if aside.exists():
        cleared(aside)
    try:
        with full_disk_told():
            path.rename(aside)
    except OSError as error:  # such as when its producer took us the right to
        left = error.strerror or str(error)
    else:
        fsync_dir(spool.claimed)
        left = cleared(aside)
    return f"claimed/{row.payload} could not be removed: {left}" if left else ""


def reap(spool: Spool, active_jobs: Container[JobId]) -> list[str]:
    """At start: remove stages of jobs that are not active, and what else a crash left half-done.

    A payload in a stage goes back to ``claimed/``.

    Returns:
      A sentence for the log about each that is left: a start does without.

    Raises:
      DiskFull: The disk takes no changes now.

    """
    tidy(spool)
    done_with = [
        spool.claimed / entry
        for entry in os.listdir(spool.claimed)
        if entry.startswith(".") and entry.endswith(_RETIRED)
    ]
    problems = []
    for entry in sorted(os.listdir(spool.stage)):
        if entry in active_jobs:
            continue
        path = spool.stage / entry
        payload = path / PAYLOAD
        # What begins with a dot is a copy, or a result that was being removed: its job is over.
        if not entry.startswith(".") and not path.is_symlink() and os.path.lexists(payload):
            try:
                with full_disk_told():
                    payload.rename(spool.claimed / f"{entry}.json")
                    fsync_dir(spool.claimed)
            except OSError as error:  # such as when its producer took us the right to
                problems.append(f"{payload} cannot be moved: {error.strerror}")
                continue
        done_with.append(path)
    for path in done_with:
        if left := cleared(path):
            problems.append(f"{path} is left: {left}; remove it as root")
    return problems


def _wipe(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
