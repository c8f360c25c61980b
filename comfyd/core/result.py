"""The manifest of a result: what ``result.json`` and ``error.json`` say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from comfyd.core.job import durations_s
from comfyd.core.model import FileRef, Row, State, Value
from comfyd.core.present import rfc3339

SCHEMA: Final = 1


class Output(Value, frozen=True):
    """One downloaded file.

    Attributes:
      file: Our name for it, beside the manifest.
      ref: The server's words for it.

    """

    ref: FileRef
    file: str
    bytes: int
    sha256: str


def manifest(
    row: Row, outputs: Iterable[Output], *, published_at: float, warnings: Iterable[str] = ()
) -> dict[str, Any]:
    """The document, as JSON values. *published_at* is when it was staged: the rename follows."""
    outcome = row.outcome
    assert outcome is not None
    times = {
        "claimed": row.claimed_at,
        "submitted": row.submitted_at,
        "started": row.started_at,
        "ended": row.ended_at,
        "published": published_at,
    }
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "job": row.job,
        "state": outcome.state.value,
        "server": row.server,
        "prompt_id": row.prompt_id,
        "attempts": row.attempt,
        "completion": None if row.completion is None else row.completion.value,
        "times": {name: None if at is None else rfc3339(at) for name, at in times.items()},
        "durations_s": {
            phase: round(seconds, 6)
            for phase, seconds in durations_s(row, published_at=published_at).items()
        },
    }
    if outcome.state is not State.DONE:
        assert outcome.reason is not None
        head |= {
            "reason": outcome.reason.value,
            "message": outcome.message,
            "detail": outcome.detail,
        }
    return head | {
        "outputs": [_output(output) for output in outputs],
        "ui": {} if row.record is None else row.record.ui,
        "drawn": row.drawn,
        "warnings": [*row.warnings, *warnings],
        "metadata": row.metadata,
    }


def _output(output: Output) -> dict[str, Any]:
    ref = output.ref
    return {
        "node": ref.node,
        "key": ref.key,
        "file": output.file,
        "source": {"filename": ref.filename, "subfolder": ref.subfolder, "type": ref.type},
        "bytes": output.bytes,
        "sha256": output.sha256,
    }
