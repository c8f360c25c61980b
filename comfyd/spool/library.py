"""The folder of named workflows, and how a job keeps the one it was dropped for.

A workflow that a job names is copied beside the job when the job is claimed: people go on editing
it, and what is queued runs as it was meant. Every step may be repeated after a crash at any point.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

from comfyd.core.model import JobId
from comfyd.core.strictjson import quoted
from comfyd.errors import DiskFull, JobFileError
from comfyd.spool import bundle
from comfyd.spool.jobfile import DOCUMENT_NAMES, is_yaml
from comfyd.spool.layout import Spool, extension_of, full_disk_told, job_of, open_dir

# Under claimed/, and none of them a job: a single file on its way into a bundle, and a copy of a
# workflow that is not complete.
_WRAPPED: Final = ".wrapped"
_PART: Final = ".part"

_MISSING: Final = {errno.ENOENT, errno.ENOTDIR}


def read_workflow(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """The workflow *name* in the folder of workflows.

    Args:
      name: A plain relative name.

    Raises:
      JobFileError: It is not there, is no regular file, is too large or cannot be read.

    """
    *folders, base = name.split("/")
    who = f"workflow: {quoted(name)}"
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with bundle.opened(folder_fd, folders) as fd:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = open(os.open(base, flags, dir_fd=fd), "rb")  # noqa: SIM115 -- closed below
        finally:
            os.close(folder_fd)
        with file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise JobFileError(f"{who} is no regular file in the folder of workflows.")
            data = file.read(max_bytes + 1)
    except OSError as error:
        if error.errno in _MISSING:
            raise JobFileError(
                f"{who} is neither beside the job document nor in the folder of workflows."
            ) from None
        if error.errno not in bundle.UNREADABLE | {errno.EISDIR}:
            raise
        raise JobFileError(f"{who} cannot be read ({error.strerror}).") from None
    if len(data) > max_bytes:
        raise JobFileError(
            f"{who} has more than {max_bytes} bytes, which jobs.max_file_bytes allows."
        )
    return data


def wrap(claimed_fd: int, payload: str) -> str:
    """Make a claimed single file a bundle.

    Returns:
      The bundle's name under ``claimed/``.

    Raises:
      DiskFull: Nothing was changed, or the bundle is there already.

    """
    job = job_of(payload)
    aside = f".{job}{_WRAPPED}"
    document = "job.yaml" if is_yaml(payload) else "job.json"
    try:
        with full_disk_told():
            os.mkdir(aside, 0o700, dir_fd=claimed_fd)
            os.rename(payload, f"{aside}/{document}", src_dir_fd=claimed_fd, dst_dir_fd=claimed_fd)
            with bundle.opened(claimed_fd, [aside]) as fd:
                os.fsync(fd)
            os.rename(aside, job, src_dir_fd=claimed_fd, dst_dir_fd=claimed_fd)
            os.fsync(claimed_fd)
    except DiskFull:
        with contextlib.suppress(FileNotFoundError):
            _tidy(claimed_fd, aside)
        raise
    return job


def pin(claimed_fd: int, payload: str, name: str, data: bytes) -> None:
    """Put the workflow *name* into the claimed bundle *payload*, durably.

    Raises:
      JobFileError: The bundle has something else in its place.
      DiskFull: The bundle is as it was.

    """
    *folders, base = name.split("/")
    aside = f".{payload}{_PART}"
    try:
        with full_disk_told():
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(aside, flags, 0o640, dir_fd=claimed_fd), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with (
                bundle.opened(claimed_fd, [payload]) as bundle_fd,
                bundle.opened(bundle_fd, folders, make=True) as folder_fd,
            ):
                os.rename(aside, base, src_dir_fd=claimed_fd, dst_dir_fd=folder_fd)
                for depth in range(len(folders) + 1):
                    with bundle.opened(bundle_fd, folders[:depth]) as fd:
                        os.fsync(fd)
            os.fsync(claimed_fd)
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY}:
            raise
        raise JobFileError(
            f"workflow: {quoted(name)} is not a file in the bundle, but something is in its place."
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside, dir_fd=claimed_fd)


def tidy(spool: Spool) -> None:
    """Undo what a crash left half-done: nothing of it has a row yet."""
    claimed_fd = open_dir(spool.claimed)
    try:
        for entry in os.listdir(claimed_fd):
            if entry.startswith("."):
                _tidy(claimed_fd, entry)
        os.fsync(claimed_fd)
    finally:
        os.close(claimed_fd)


def _tidy(claimed_fd: int, entry: str) -> None:
    if entry.endswith(_PART):
        os.unlink(entry, dir_fd=claimed_fd)
    elif entry.endswith(_WRAPPED):
        job = JobId(entry.removeprefix(".").removesuffix(_WRAPPED))
        for document in DOCUMENT_NAMES:
            with contextlib.suppress(FileNotFoundError):
                back = job + extension_of(document)
                os.rename(f"{entry}/{document}", back, src_dir_fd=claimed_fd, dst_dir_fd=claimed_fd)
        os.rmdir(entry, dir_fd=claimed_fd)
