"""The teller: turns the core's notes into metrics and log lines, once they are committed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import structlog

from comfyd.core.notes import Note
from comfyd.metrics import Metrics
from comfyd.services.overview import Overview

_log: Any = structlog.get_logger("comfyd.jobs")


class Teller:
    """One line a note that an operator would want to read; the rest is in ``comfyd show``."""

    def __init__(self, metrics: Metrics, overview: Overview) -> None:
        self._metrics = metrics
        self._overview = overview

    def tell(self, notes: Iterable[Note]) -> None:
        notes = tuple(notes)
        self._metrics.observe(notes)
        self._overview.tell(notes)
        for note in notes:
            self._log(note)

    def _log(self, note: Note) -> None:
        data, where = note.data, {"job": note.job, "server": note.server}
        match note.kind:
            case "claimed":
                _log.info("job_claimed", job=note.job, invalid=data["invalid"])
            case "ended" if data["missed"] is not None:
                _log.warning("signal_missed", **where, cause=data["missed"], source=data["source"])
            case "lost":
                _log.warning("attempt_lost", **where, cause=data["cause"], charged=data["charged"])
            case "finished":
                total_s = round(data["durations_s"]["total"], 3)
                tell = _log.info if data["outcome"] == "done" else _log.warning
                tell(
                    "job_finished",
                    **where,
                    outcome=data["outcome"],
                    reason=data["reason"],
                    total_s=total_s,
                )
            case "moved" if data["state"] == "held":
                _log.warning("job_held", **where)
            case "retry":
                _log.debug("retry", **where, operation=data["operation"], reason=data["reason"])
            case _:
                _log.debug(note.kind, **where, **data)
