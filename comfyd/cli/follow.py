"""Following jobs to their ends: by the folders that appear, and by what a daemon tells meanwhile.

The folders alone are enough, so waiting works without the right to ask the daemon.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from comfyd.cli.screen import counted, plain, span
from comfyd.spool.layout import Spool

MANIFEST_MAX_BYTES: Final = 64 << 20


@dataclass(slots=True)
class Followed:
    """One job as far as it is known.

    Attributes:
      state: ``waiting`` while nothing else is known, else one of the shown states.
      message: Why it ended without a result.
      total_s, outputs: Of a job that ended: seconds since it was claimed, and files.
      folder: Its result; None while there is none, or if it was taken away before we saw it.
      known_as: The job that it is: another one, if its key says that it was submitted before.

    """

    job: str
    state: str = "waiting"
    server: str = ""
    message: str = ""
    total_s: float | None = None
    outputs: int = 0
    folder: Path | None = None
    known_as: str = ""

    def __post_init__(self) -> None:
        self.known_as = self.known_as or self.job

    @property
    def ended(self) -> bool:
        return self.state in {"done", "failed", "cancelled"}

    def line(self) -> str:
        """In one line, for a pipe."""
        words = [f"{self.job}: {self.state}"]
        if self.known_as != self.job:
            words.append(f"as {self.known_as}")
        if self.server and not self.ended:
            words.append(f"on {self.server}")
        if self.state == "done":
            words.append(
                f"in {span(self.total_s)}, {counted(self.outputs, 'file')}" if self.folder else ""
            )
        return plain(" ".join(filter(None, words)) + (f": {self.message}" if self.message else ""))


@dataclass(slots=True)
class Follower:
    """Jobs on their way, in the order they were submitted."""

    spool: Spool
    jobs: dict[str, Followed] = field(default_factory=dict)
    _asked: int = 0

    @classmethod
    def of(cls, spool: Spool, jobs: Iterable[str]) -> Follower:
        return cls(spool, {job: Followed(job) for job in jobs})

    @property
    def open(self) -> list[Followed]:
        """Those that have not ended."""
        return [each for each in self.jobs.values() if not each.ended]

    def look(self) -> None:
        """Look for the results of open jobs. Blocking; two lstats a job."""
        for each in self.open:
            self._look_for(each)

    def _look_for(self, each: Followed) -> None:
        for place, manifest in (("done", "result.json"), ("failed", "error.json")):
            folder = self.spool.root / place / each.known_as
            found = _read(folder / manifest)
            if found is not None:
                each.folder = folder
                self._end(each, found, place)
                break

    def hear(self, status: dict[str, Any]) -> None:
        """Take over what a daemon's status says of open jobs."""
        at_hand = {job["job"]: job for job in status["at_hand"]}
        for each in self.open:
            job = at_hand.get(each.known_as)
            each.state = "waiting" if job is None else job["state"]
            each.server = "" if job is None else job["server"] or ""

    def missing(self, limit: int) -> list[Followed]:
        """Open jobs that the last status did not name, *limit* at most, others at each call.

        They wait, or have ended and their folder was taken away.
        """
        waiting = [each for each in self.open if each.state == "waiting"]
        start = self._asked % len(waiting) if waiting else 0
        self._asked = start + limit
        return (waiting[start:] + waiting[:start])[:limit]

    def told(self, each: Followed, story: dict[str, Any]) -> None:
        """Take over the story that a daemon or its journal told of *each*, if it has ended.

        Only with ``published`` set: until then the result is on its way to its folder.
        """
        if story["job"] != each.known_as:  # absorbed by that job, whose folder may be there
            each.known_as = story["job"]
            self._look_for(each)
            if each.ended:
                return
        if story["state"] in {"done", "failed", "cancelled"} and story["times"]["published"]:
            outputs = story["outputs"]
            each.state, each.server = story["state"], story["server"] or ""
            each.message = story["message"] or "its folder was taken away already"
            each.total_s = story["durations_s"]["total"]
            each.outputs = outputs["files"] if outputs else 0

    def _end(self, each: Followed, manifest: dict[str, Any], place: str) -> None:
        each.state = str(manifest.get("state", place))
        if each.state not in {"done", "failed", "cancelled"}:
            each.state = place
        each.server = str(manifest.get("server") or "")
        each.message = str(manifest.get("message") or "") if place == "failed" else ""
        durations_s = manifest.get("durations_s")
        total_s = durations_s.get("total") if isinstance(durations_s, dict) else None
        each.total_s = total_s if isinstance(total_s, int | float) else None
        outputs = manifest.get("outputs")
        each.outputs = len(outputs) if isinstance(outputs, list) else 0


def _read(path: Path) -> dict[str, Any] | None:
    """The manifest at *path*, {} if it is unreadable, None if it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = json.loads(file.read(MANIFEST_MAX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
