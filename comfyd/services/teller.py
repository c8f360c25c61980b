"""The teller: turns the core's notes into metrics and log lines, once they are committed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

import structlog

from comfyd.core.model import ServerName
from comfyd.core.notes import Note
from comfyd.core.snapshot import ServerState
from comfyd.metrics import Metrics
from comfyd.services.overview import Overview

_log: Any = structlog.get_logger("comfyd.jobs")

_FINE: Final = frozenset({ServerState.UP, ServerState.DRAINING})


class Teller:
    """One line for each thing that an operator would want to read; the rest is in ``comfyd show``.

    docs/logs.md lists them.
    """

    def __init__(self, metrics: Metrics, overview: Overview) -> None:
        self._metrics = metrics
        self._overview = overview
        self._states: dict[ServerName, ServerState] = {}

    def tell(self, notes: Iterable[Note]) -> None:
        """Tell of *notes*, and of every server whose state is another one than at the last call."""
        notes = tuple(notes)
        self._metrics.observe(notes)
        self._overview.tell(notes)
        lost = None  # by the note just before
        for note in notes:
            if note.kind != "retry" or note.job != lost:  # a loss says that it is made again
                self._log(note)
            lost = note.job if note.kind == "lost" else None
        for server, state, reason in self._overview.states():
            before = self._states.get(server)
            if state is not before:
                self._states[server] = state
                level = logging.INFO if state in _FINE else logging.WARNING
                more = {"reason": reason} if reason else {}
                was = {"was": before.value} if before else {}
                _log.log(level, "server_state", server=server, state=state.value, **was, **more)

    def _log(self, note: Note) -> None:
        data = note.data
        named = {"job": note.job, "server": note.server, "prompt": note.prompt}
        about = {name: value for name, value in named.items() if value is not None}
        match note.kind, data.get("state"):
            case "claimed", _:
                why = {"reason": data["reason"]} if data["invalid"] else {}
                _log.info("job_claimed", **about, payload=data["payload"], **why)
            case "retried", _:
                _log.info("job_retried", **about, new=data["new"])
            case "moved", "submitted" if "reason" not in data:
                _log.info("job_submitted", **about)
            case "started", _:
                _log.info("job_started", **about)
            case "moved", "stopping":
                _log.info("job_stopping", **about, reason=data.get("reason", "recalled"))
            case "ended", _:
                missed = {"missed": data["missed"]} if data["missed"] else {}
                level = logging.WARNING if missed else logging.INFO
                _log.log(
                    level, "job_ended", **about, end=data["end"], source=data["source"], **missed
                )
            case "lost", _:
                _log.warning("attempt_lost", **about, cause=data["cause"], charged=data["charged"])
            case "retry", _ if data["operation"] == "attempt":
                _log.info("job_requeued", **about, reason=data["reason"])
            case "retry", _ if data["operation"] in {"submit", "upload"}:
                _log.warning("submission_failed", **about, **data)
            case "moved", "held":
                _log.warning("job_held", **about, reason=data["reason"])
            case "fenced", _:
                _log.warning("fence_raised", **about)
            case "unfenced", _:
                _log.info("fence_lifted", **about)
            case "finished", _:
                level = logging.INFO if data["outcome"] == "done" else logging.WARNING
                why = {"reason": data["reason"]} if data["reason"] else {}
                total_s = round(data["durations_s"]["total"], 3)
                _log.log(
                    level, "job_finished", **about, outcome=data["outcome"], **why, total_s=total_s
                )
            case _:
                _log.debug("note", kind=note.kind, **(about | data))
