"""Writes docs/job-states.md from the state table: run it when the table changes.

    python docs/make_job_states.py

A test holds the committed page to what this makes.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from comfyd.core import lifecycle, moves
from comfyd.core.model import State

PAGE = Path(__file__).parent / "job-states.md"

MEANING = {
    State.QUEUED: "The claimed file and the row exist; no prompt of it is anywhere.",
    State.HELD: "It waits for a person; the row says why.",
    State.SUBMITTING: "The intent (server, attempt, prompt id), before the first byte is sent.",
    State.SUBMITTED: "The server has the prompt, or had it.",
    State.STOPPING: "This attempt is being ended; the row says what comes of the job then.",
    State.COLLECTING: "The verdict is ours; outputs and manifest are being put together in stage/.",
    State.PUBLISHING: "The stage is complete and its manifest's SHA-256 known; the rename is next.",
    State.DONE: "Final: it lies, or lay, in done/.",
    State.FAILED: "Final: it lies, or lay, in failed/.",
    State.CANCELLED: "Final: it lies, or lay, in failed/, as cancelled.",
}

HEAD = """\
# Job states

Made by `docs/make_job_states.py` from the state table in `comfyd/core/lifecycle.py`.

A changed row is committed first, then its orders are released: a state says what is at least
intended before an action, and at least possible after it. After a crash the orders *at load* are
given; there is no other recovery.

"""


def page() -> str:
    """The page as it should be."""
    lines = ["| state | committed means | on entry | at load |", "|---|---|---|---|"]
    for state in State:
        entry = moves.ON_ENTRY.get(state)
        load = lifecycle.AT_LOAD.get(state)
        late = ", after `lost_grace`" if state is State.SUBMITTING else ""
        lines.append(
            f"| {state.value} | {MEANING[state]} | {entry.name.title() if entry else '-'} |"
            f" {load.name.title() + late if load else '-'} |"
        )
    lines += [
        "",
        "## What may happen in each state",
        "",
        "| state | fact | rule |",
        "|---|---|---|",
    ]
    order = list(State)
    rows = sorted(lifecycle.TABLE.items(), key=lambda row: order.index(row[0][0]))
    for (state, fact), rule in rows:
        name = f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"
        lines.append(f"| {state.value} | {fact.__name__} | `{name}`{_about(rule)} |")
    lines += [
        "",
        "Hints and wishes without a rule are ignored and counted; an answer without one is a bug.",
        "",
    ]
    return HEAD + "\n".join(lines)


def _about(rule: object) -> str:
    first = (inspect.getdoc(rule) or "").partition("\n")[0]
    return f": {first}" if first else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
