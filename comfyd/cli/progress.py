"""Jobs on their way, shown: a live table on a terminal, a line for each change in a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from comfyd.cli.follow import Followed, Follower
from comfyd.cli.screen import Table, console, is_terminal, rendered, span

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_HEIGHT_KEPT: Final = 6  # lines of the screen that are not rows
_BAR: Final = 40


class Show(Protocol):
    """Somewhere progress is shown."""

    def update(self, follower: Follower) -> None:
        """Show how things stand; to be called often, changed or not."""
        ...


def shown(stream: TextIO, *, changes: bool) -> AbstractContextManager[Show]:
    """A Show on *stream*.

    Args:
      changes: In a pipe, a line for every change, not only for every end.

    """
    if is_terminal(stream):
        return _live(stream)
    return contextlib.nullcontext(_Lines(stream, changes=changes))


class _Lines:
    def __init__(self, stream: TextIO, *, changes: bool) -> None:
        self._stream = stream
        self._changes = changes
        self._told: dict[str, str] = {}

    def update(self, follower: Follower) -> None:
        for job, each in follower.jobs.items():
            if each.state != self._told.get(job, "waiting"):
                self._told[job] = each.state
                if each.ended or self._changes:
                    print(each.line(), file=self._stream, flush=True)


@contextlib.contextmanager
def _live(stream: TextIO) -> Iterator[Show]:
    from rich.live import Live

    with Live(console=console(stream), auto_refresh=False) as live:
        yield _Screen(live)


class _Screen:
    def __init__(self, live: Live) -> None:
        self._live = live
        self._began_s = time.monotonic()

    def update(self, follower: Follower) -> None:
        self._live.update(self._drawn(follower), refresh=True)

    def _drawn(self, follower: Follower) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar

        jobs = list(follower.jobs.values())
        ended = sum(each.ended for each in jobs)
        bad = sum(each.ended and each.state != "done" for each in jobs)
        words = [f"{ended} of {len(jobs)} ended"]
        if bad:
            words.append(f"{bad} failed")
        words.append(span(time.monotonic() - self._began_s))
        console = self._live.console
        table = _table(_chosen(jobs, max(3, console.height - _HEIGHT_KEPT)))
        bar = ProgressBar(len(jobs), ended, width=_BAR, finished_style="green")
        width = console.width
        return Group(rendered(table, width), bar, rendered(" " + ", ".join(words), width))


def _chosen(jobs: list[Followed], room: int) -> list[Followed]:
    """Those worth the room: what moves first, then what ended badly; in their order."""
    if len(jobs) <= room:
        return jobs

    def dullness(each: Followed) -> int:
        if each.ended:
            return 2 if each.state == "done" else 1
        return 3 if each.state == "waiting" else 0

    kept = {each.job for each in sorted(jobs, key=dullness)[:room]}
    return [each for each in jobs if each.job in kept]


def _table(jobs: list[Followed]) -> Table:
    rows = [
        (
            each.job,
            each.state,
            each.server,
            span(each.total_s),
            str(each.outputs) if each.ended and each.outputs else "",
            each.message,
        )
        for each in jobs
    ]
    return Table(("JOB", "STATE", "SERVER", "TOOK", "FILES", ""), rows, spare=("SERVER", "FILES"))
