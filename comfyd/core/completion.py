"""When a prompt has ended, and what that makes of its job.

The end signal is ``executing`` with ``node: null`` and our ``prompt_id`` (ComfyUI main.py sends it
after the history record is in place). It is only a reason to look: the verdict is the record's, by
the last entry of ``status.messages``; ``status_str`` can be another prompt's (execution.py).
"""

from __future__ import annotations

import re
from typing import Final

from comfyd.core.model import (
    End,
    JobId,
    Outcome,
    PromptId,
    Reason,
    Record,
    Row,
    State,
    prompt_id_of,
)

# Where `workflow.make_unique` lets each attempt write.
_OWN_FOLDER: Final = re.compile(r"comfyd/([^/]+\.[0-9A-HJKMNP-TV-Z]{26})-\d+(?:/|$)")


def is_foreign(job: JobId, attempt: int, record: Record) -> bool:
    """Whether *record* carries our mark with another job or attempt: then it proves nothing."""
    return record.ours is not None and record.ours != (job, attempt)


def attempt_of(row: Row, prompt_id: PromptId) -> int | None:
    """Which attempt of the job *prompt_id* is; None if it is none."""
    attempts = range(row.attempt, 0, -1)
    return next((n for n in attempts if prompt_id_of(row.job, n) == prompt_id), None)


def judge(row: Row, record: Record) -> Outcome:
    """What *record* makes of the job, were it not being stopped."""
    match record.end:
        case End.SUCCESS:
            return Outcome(state=State.DONE)
        case End.INTERRUPTED:
            return Outcome(
                state=State.FAILED,
                reason=Reason.INTERRUPTED,
                message=(
                    f"The prompt was interrupted on server {row.server} by someone else;"
                    " submit the job again if that was not meant."
                ),
            )
        case End.ERROR:
            failure = record.failure
            if failure is None:
                return Outcome(
                    state=State.FAILED,
                    reason=Reason.EXECUTION_ERROR,
                    message=f"Server {row.server} recorded an error without a place; see its log.",
                )
            return Outcome(
                state=State.FAILED,
                reason=Reason.EXECUTION_ERROR,
                message=(
                    f"Node {failure.node} ({failure.node_type}) raised"
                    f" {failure.exception_type}: {failure.message.strip()}"
                ),
                detail={
                    "node": failure.node,
                    "class_type": failure.node_type,
                    "exception_type": failure.exception_type,
                    "exception_message": failure.message,
                },
            )


def may_be_partial(row: Row, record: Record) -> bool:
    """Whether outputs may be missing: all of the graph was not accepted, as far as is known."""
    short = record.end is End.SUCCESS and bool(record.unrun)
    return short and row.unconfirmed > 0 and not row.accept_partial


def perhaps_partial(row: Row, record: Record) -> str:
    """That outputs may be missing, as a sentence."""
    return (
        f"Server {row.server} did not run nodes {', '.join(record.unrun)}, and did not say, or was"
        " not heard to say, why: they may not have passed its checks."
    )


def judge_stopped(row: Row, record: Record, why: Outcome) -> Outcome:
    """The same for a prompt we were stopping: a success that came first stands.

    Except after partial acceptance: there a success is still short of outputs.
    """
    if record.end is End.SUCCESS and why.reason is not Reason.PARTIAL:
        return judge(row, record)
    return why


def mixed_up(job: JobId, record: Record) -> tuple[str, ...]:
    """That files are named which were made for other jobs: the server may have mixed them up.

    One sentence, however many files there are.
    """
    others = [
        (ref.node, found[1])
        for ref in record.files
        if (found := _OWN_FOLDER.match(ref.subfolder.replace("\\", "/"))) and found[1] != job
    ]
    if not others:
        return ()
    node, other = others[0]
    more = f", and {len(others) - 1} more are like it" if len(others) > 1 else ""
    return (f"Node {node} named a file that was made for another job, {other}{more}: look at it.",)


def success_warnings(record: Record) -> tuple[str, ...]:
    """What a person should know about a success that brought little."""
    if record.files:
        if all(ref.type == "temp" for ref in record.files):
            return ("Only previews came out: no node of this workflow saves its result.",)
        return ()
    if record.ui:
        return ()
    return ("The prompt succeeded without any output: no node reported a file or a value.",)
