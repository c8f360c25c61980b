"""Where answers come from: the running daemon, or the journal when none runs.

Both give the same JSON values. Blocking.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from comfyd import __version__
from comfyd.cli.exits import Refused, Unreachable
from comfyd.config import Config
from comfyd.core.engine import PAUSED
from comfyd.core.model import Row, State
from comfyd.core.present import (
    SHOWN_STATES,
    job_story,
    job_summary,
    journal_state,
    rfc3339,
    shown_counts,
    shown_state,
)
from comfyd.core.snapshot import JOBS_MAX, JobView, Snapshot
from comfyd.errors import SpoolBusy, UsageError
from comfyd.journal.lock import StateLock
from comfyd.journal.memory import MemoryStore
from comfyd.journal.sqlite import open_readonly
from comfyd.journal.store import Reads
from comfyd.spool.layout import Spool
from comfyd.web.control_client import DaemonUnreachable, ask

ANSWER_S: Final = 10.0  # a read takes milliseconds; a daemon busy for longer is in trouble
CHECK_S: Final = 60.0  # an audit may wait for a server that hangs
PAGE: Final = 500  # rows in one answer


class Source(Protocol):
    """What can be read."""

    @property
    def notice(self) -> str:
        """What people should know about the answers, "" if nothing."""
        ...

    def status(self) -> dict[str, Any]:
        """``Snapshot.to_dict()``."""
        ...

    def page(self, state: str | None, limit: int, after: int | None) -> list[dict[str, Any]]:
        """Summaries, newest first, PAGE at most; after the one with that seq."""
        ...

    def story(self, text: str) -> dict[str, Any]:
        """The story of the one job that *text* means, or Refused."""
        ...


def ask_daemon(config: Config, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """The daemon's good answer.

    Raises:
      DaemonUnreachable: There is none, or it did not answer.
      Refused: It says no.

    """
    return ask_at(config.state, request, timeout_s)


def ask_at(state: Path, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """As `ask_daemon`, for who knows no more than the state folder."""
    answer = ask(state / "control.sock", request, timeout_s)
    if answer.get("ok") is not True:
        raise Refused(str(answer.get("error") or "The daemon refused without saying why."))
    return answer


@dataclass(frozen=True, slots=True)
class Live:
    """The running daemon."""

    config: Config
    notice: str = ""
    answer_s: float = ANSWER_S

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._ask({"verb": "status"})["status"]
        return status

    def page(self, state: str | None, limit: int, after: int | None) -> list[dict[str, Any]]:
        request = {"verb": "jobs", "state": state, "limit": limit, "after": after}
        page: list[dict[str, Any]] = self._ask(request)["jobs"]
        return page

    def story(self, text: str) -> dict[str, Any]:
        story: dict[str, Any] = self._ask({"verb": "show", "job": text})["story"]
        return story

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return ask_daemon(self.config, request, self.answer_s)


@dataclass(frozen=True, slots=True)
class Journaled:
    """The journal of a daemon that does not run; *at* is when it was last written."""

    config: Config
    reads: Reads
    at: float
    notice: str

    def status(self) -> dict[str, Any]:
        active = [row for row in self.reads.active() if not row.state.final]
        running = sum(shown_state(row) == "running" for row in active)
        return Snapshot(
            at=self.at,
            version=__version__,
            paused=self.reads.remembered().get(PAUSED) is True,
            counts=shown_counts(self.reads.counts(), running),
            oldest_at={
                "queued": self.reads.oldest(State.QUEUED),
                "submitted": self.reads.oldest(State.SUBMITTED),
            },
            jobs=tuple(_view(row) for row in active[:JOBS_MAX]),
            more=max(0, len(active) - JOBS_MAX),
            free_bytes=_free_bytes(self.config.spool),
        ).to_dict()

    def page(self, state: str | None, limit: int, after: int | None) -> list[dict[str, Any]]:
        kept = None if state is None else journal_state(state)
        rows = self.reads.rows(kept, limit=limit, after=after)
        return [job_summary(row) for row in rows if state in (None, shown_state(row))]

    def story(self, text: str) -> dict[str, Any]:
        rows = self.reads.find(text)
        if not rows:
            raise Refused(f"no job is known as {text!r}")
        if len(rows) > 1:
            names = ", ".join(row.job for row in rows[:5])
            raise Refused(f"{text!r} may mean {len(rows)} jobs: {names}; say which")
        return job_story(rows[0], self.reads.events(rows[0].job), full=True)


@contextlib.contextmanager
def opened(config: Config, answer_s: float = ANSWER_S) -> Iterator[Source]:
    """The daemon if it runs, else its journal.

    Args:
      answer_s: Seconds for each answer of the daemon.

    Raises:
      Unreachable: A daemon runs and does not answer, or this user may read neither.
      JournalError: The journal cannot be read.

    """
    try:
        ask_daemon(config, {"verb": "status"}, answer_s)
    except DaemonUnreachable as error:
        if error.sent:
            raise Unreachable(str(error)) from None
        with _journal(config, str(error)) as source:
            yield source
        return
    yield Live(config, answer_s=answer_s)


@contextlib.contextmanager
def _journal(config: Config, why: str) -> Iterator[Journaled]:
    path = config.state / "comfyd.db"
    with contextlib.ExitStack() as stack:
        try:
            if not _exists(path):
                notice = f"not running, and {_why_missing(config)} ({path} is not there)"
                yield Journaled(config, MemoryStore(), time.time(), notice)
                return
            stack.enter_context(StateLock(config.state / "lock").acquire_shared())
            at = _written_at(path)
            reads = open_readonly(path)
        except SpoolBusy:
            message = f"a daemon owns {config.state} but does not answer: {why}"
            raise Unreachable(message) from None
        except PermissionError as error:
            message = f"{why} Its journal may not be read either: {error.strerror}"
            raise Unreachable(message) from None
        stack.callback(reads.close)
        yield Journaled(config, reads, at, f"not running, as of {rfc3339(at)}")


def _why_missing(config: Config) -> str:
    """What it means that there is no journal: the folders show whether there was one."""
    spool = Spool(config.spool)
    with contextlib.suppress(OSError):
        if any(any(folder.iterdir()) for folder in (spool.done, spool.failed, spool.claimed)):
            return "its journal is gone: the next start rebuilds it from the spool and the servers"
    return "no daemon has run here yet"


def _exists(path: Path) -> bool:
    """Whether *path* is there; a PermissionError if that cannot be seen."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _written_at(path: Path) -> float:
    """When the journal was last committed to: SQLite writes to one of its two files."""
    found = [path.stat().st_mtime]
    with contextlib.suppress(FileNotFoundError):
        found.append(path.with_name(path.name + "-wal").stat().st_mtime)
    return max(found)


def _view(row: Row) -> JobView:
    marks = (row.claimed_at, row.submitted_at, row.started_at, row.ended_at)
    return JobView(
        job=row.job,
        state=shown_state(row),
        server=row.server,
        prompt_id=row.prompt_id,
        attempt=row.attempt,
        since=max(mark for mark in marks if mark is not None),
    )


def _free_bytes(folder: Path) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def check_state(state: str | None) -> None:
    """Refuse what is no state.

    Raises:
      UsageError: Says which there are.

    """
    if state is not None and state not in SHOWN_STATES:
        raise UsageError(f"there is no state {state!r}; there are {', '.join(SHOWN_STATES)}")


def newest(source: Source, state: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest *limit* summaries, asked for page by page."""
    found: list[dict[str, Any]] = []
    after = None
    while len(found) < limit:
        page = source.page(state, min(PAGE, limit - len(found)), after)
        if not page:
            break
        found += page
        after = page[-1]["seq"]
    return found
