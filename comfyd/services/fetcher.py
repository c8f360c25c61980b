"""The fetcher: from an end signal to a visible result. History, downloads, staging, the rename."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import trio

from comfyd.comfyui.client import Client
from comfyd.core.facts import (
    Answer,
    Collected,
    CollectFailed,
    Fetched,
    FetchResult,
    PublishConflict,
    PublishDelayed,
    Published,
    Uncollected,
)
from comfyd.core.model import FileRef, JobId, Row, Staged, State
from comfyd.core.orders import Collect, Fetch, Publish
from comfyd.core.policy import linear_s
from comfyd.core.result import Output, manifest
from comfyd.core.wire.tolerant import line
from comfyd.errors import AnswerTooLong, DiskFull, ServerError, ServerProtocol, ServerStatus
from comfyd.spool.delivery import (
    PublishResult,
    Stage,
    local_name,
    looks_wrong,
    publish,
)
from comfyd.spool.layout import Spool, free_bytes, full_disk_told

# A file that is not there, or is wrong, is asked for so often before that is believed.
_TRIES: Final = 3
_TRY_AGAIN_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Attributes: as in the configuration, ``history`` and ``outputs``.

    *max_bytes* holds for the outputs of one job together: that is what protects a disk.
    """

    history_attempts: int = 3
    history_backoff_s: float = 2.0
    max_bytes: int = 4 << 30
    min_free_bytes: int = 1 << 30
    include_temp: bool = False


async def fetch(
    order: Fetch,
    client: Client,
    limits: Limits,
    *,
    on_fetch: Callable[[str, float], None],
    on_retry: Callable[[ServerError], None],
    draw: Callable[[], float] = random.random,
) -> Answer:
    """GET /history/{id} at once; a failed exchange is tried again, waiting longer each time.

    Args:
      on_fetch: Told the result and the seconds it took, retries included.
      on_retry: Told each failure that is tried again.

    """
    assert order.row.prompt_id is not None
    began_s = trio.current_time()
    tries = 0
    while True:
        tries += 1
        result, record, reason = FetchResult.EMPTY, None, ""
        try:
            record = await client.history(order.row.prompt_id)
        except ServerProtocol as error:
            result, reason = FetchResult.UNREADABLE, str(error)
        except ServerError as error:
            result, reason = FetchResult.ERROR, str(error)
            if tries < limits.history_attempts:
                on_retry(error)
                await trio.sleep(linear_s(tries, limits.history_backoff_s, u=draw()))
                continue
        if record is not None:
            result = FetchResult.FOUND
        on_fetch(result.value, trio.current_time() - began_s)
        return Fetched(token=order.token, result=result, record=record, reason=reason)


class _Unobtainable(Exception):
    """One output cannot be had."""

    def __init__(self, cause: Uncollected, message: str, *, again: bool = True) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.again = again


async def collect(
    order: Collect,
    client: Client | None,
    spool: Spool,
    limits: Limits,
    *,
    now_s: Callable[[], float],
    on_retry: Callable[[ServerError], None],
    short: MutableMapping[JobId, int],
    waiting: Callable[[], str],
) -> Answer:
    """Download and verify what the record names, add what was submitted, and stage it all.

    For a job that is done every output must be there and right, and all together within
    ``outputs.max_bytes``; for one that failed, what can be had is added and the rest is a warning.
    A file that is named twice is fetched twice: each node's list is whole.

    Args:
      client: Of the server that ran it; None if there is nothing to fetch, or no such server.
      short: For jobs that wait for space, the bytes of outputs that were not enough: kept here, so
        that nothing is fetched again before there is more room than that.
      waiting: Why nothing is to be fetched now, as a sentence; "" if it may.

    """
    row = order.row
    assert row.outcome is not None
    short_bytes, stage = short.pop(row.job, 0), None
    try:
        if _wanted(row, include_temp=limits.include_temp):  # cheap first: this may go on for days
            if problem := waiting():
                raise DiskFull(problem)
            await trio.to_thread.run_sync(_check_room, spool, limits, short_bytes)
        stage = await trio.to_thread.run_sync(Stage.begin, spool, row.job)
        warnings: list[str] = []
        outputs: list[Output] = []
        counted: Counter[str] = Counter()
        left_bytes = limits.max_bytes
        for ref in _wanted(row, include_temp=limits.include_temp):
            index = counted[ref.node]
            counted[ref.node] += 1
            try:
                if client is None:
                    raise _Unobtainable(
                        Uncollected.SERVER, f"server {row.server} is not configured"
                    )
                left = replace(limits, max_bytes=left_bytes)
                output = await _obtain(ref, index, stage, client, left, on_retry)
                left_bytes -= output.bytes
                outputs.append(output)
            except _Unobtainable as error:
                if row.outcome.state is State.DONE or error.cause is Uncollected.SERVER:
                    return CollectFailed(
                        token=order.token,
                        cause=error.cause,
                        message=error.message,
                        again=error.again,
                    )
                warnings.append(error.message)
        staged = await trio.to_thread.run_sync(_finish, stage, row, outputs, warnings, now_s())
    except DiskFull as error:
        if stage is not None:  # another job may fit where this one does not
            short_bytes = await trio.to_thread.run_sync(_given_up, stage)
        short[row.job] = short_bytes
        return CollectFailed(token=order.token, cause=Uncollected.DISK, message=str(error))
    return Collected(token=order.token, staged=staged)


def _wanted(row: Row, *, include_temp: bool) -> list[FileRef]:
    """The record's products: outputs, and previews if they are asked for."""
    if row.record is None:
        return []
    types = {"output", "temp"} if include_temp else {"output"}
    return [ref for ref in row.record.files if ref.type in types]


async def _obtain(
    ref: FileRef,
    index: int,
    stage: Stage,
    client: Client,
    limits: Limits,
    on_retry: Callable[[ServerError], None],
) -> Output:
    """One file, downloaded and checked; its part lies in the stage."""
    tries = 0
    while True:
        tries += 1
        try:
            return await _download(ref, index, stage, client, limits)
        except ServerError as error:
            problem = _judged(ref, error)
            if tries >= _TRIES or problem.cause is Uncollected.SERVER or not problem.again:
                raise problem from error
            on_retry(error)
        except _Unobtainable as error:
            if tries >= _TRIES:
                raise
            on_retry(ServerProtocol(error.message))
        await trio.sleep(_TRY_AGAIN_S * tries)


def _judged(ref: FileRef, error: ServerError) -> _Unobtainable:
    name = _named(ref)
    match error:
        case ServerStatus(status=404 | 410 as status):
            return _Unobtainable(
                Uncollected.MISSING, f"The server no longer has {name} (HTTP status {status})."
            )
        case ServerStatus(status=400 | 403 as status) if status == 400 or _leaves(ref.subfolder):
            return _Unobtainable(
                Uncollected.MISSING, f"The server does not hand out {name} (HTTP status {status})."
            )
        case AnswerTooLong():
            return _Unobtainable(
                Uncollected.INVALID,
                f"With {name} the job's outputs are larger than outputs.max_bytes;"
                " raise that, or let the workflow save less.",
                again=False,
            )
        case ServerProtocol():
            return _Unobtainable(Uncollected.INVALID, f"The server sent no usable {name}: {error}.")
        case _:
            return _Unobtainable(Uncollected.SERVER, f"The {name} could not be fetched: {error}.")


def _named(ref: FileRef) -> str:
    return f"output {line(ref.filename, 200)!r} of node {line(ref.node, 200)}"


def _leaves(subfolder: str) -> bool:
    """Whether ComfyUI would see an attempt to leave its folder: a 403 of its own, not a proxy's."""
    return subfolder.startswith("/") or ".." in subfolder.split("/")


async def _download(
    ref: FileRef, index: int, stage: Stage, client: Client, limits: Limits
) -> Output:
    part = stage.part_path("download")
    with _opened(part, limits.min_free_bytes) as file:
        got = await client.view(ref, file.write, max_bytes=limits.max_bytes)
    wrong = looks_wrong(ref.filename, got.head)
    if wrong is not None:
        raise _Unobtainable(Uncollected.INVALID, f"The {_named(ref)} is wrong: {wrong}.")
    name = local_name(ref.node, index, ref.filename, got.head)
    with full_disk_told():
        part.rename(stage.part_path(name))
    return Output(ref=ref, file=name, bytes=got.size_bytes, sha256=got.sha256)


class _File:
    """A part file whose writes tell a full disk apart, before it is quite full."""

    def __init__(self, fd: int, min_free_bytes: int) -> None:
        self._fd = fd
        self._min_free_bytes = min_free_bytes

    def write(self, chunk: bytes) -> None:
        with full_disk_told():
            # Asked anew for each piece, microseconds: others write here too.
            if free_bytes(os.fstatvfs(self._fd)) - len(chunk) < self._min_free_bytes:
                raise DiskFull("the outputs would take space that outputs.min_free_bytes keeps")
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._fd, view) :]

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def _opened(part: Path, min_free_bytes: int) -> _File:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with full_disk_told():
        return _File(os.open(part, flags, 0o600), min_free_bytes)


def _check_room(spool: Spool, limits: Limits, short_bytes: int) -> None:
    """Raise DiskFull unless more than *short_bytes* may be taken. Blocking."""
    if free_bytes(os.statvfs(spool.stage)) - limits.min_free_bytes <= short_bytes:
        raise DiskFull("less space is free than the outputs need besides outputs.min_free_bytes")


def _given_up(stage: Stage) -> int:
    """Make room; how many bytes the outputs had taken. Blocking."""
    try:
        return stage.clear()
    except DiskFull:
        return 0  # read-only: nothing can be said of its size


def _finish(
    stage: Stage, row: Row, outputs: list[Output], warnings: list[str], now_s: float
) -> Staged:
    for output in outputs:
        stage.seal(output.file)
    missing = stage.add_payload(row)
    if missing:
        warnings.append(missing)
    assert row.outcome is not None
    name = "result.json" if row.outcome.state is State.DONE else "error.json"
    return stage.finish(name, manifest(row, outputs, published_at=now_s, warnings=warnings))


def show(order: Publish, spool: Spool) -> Answer:
    """One rename into ``done/`` or ``failed/``. Blocking."""
    row, token = order.row, order.token
    assert row.outcome is not None
    place: Literal["done", "failed"] = "done" if row.outcome.state is State.DONE else "failed"
    try:
        result = publish(spool, row, place=place)
    except DiskFull as error:
        return PublishDelayed(token=token, message=str(error))
    if result is PublishResult.CONFLICT:
        return PublishConflict(
            token=token,
            message=f"{place}/{row.job} was there already and is not ours; move it away.",
        )
    return Published(token=token)
