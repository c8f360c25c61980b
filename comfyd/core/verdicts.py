"""When a server says no: is it the job or the server, and who else is to be asked?

A workflow that ComfyUI rejects may only miss a model there, so each other server is asked once. One
that raised may have met a sick card, so one other server is asked for a second opinion. What the
second says too is the job's fault.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from comfyd.core.model import NodeFailure, Outcome, Reason, Row, ServerName

# How torch and ROCm say that the card, its driver or its memory failed, whatever was computed.
_CARD: Final = re.compile(
    r"\b(?:CUDA|cuda|cuDNN|CUDNN|cuBLAS|CUBLAS|HIP|hipBLAS|NCCL|NVML|MPS|XPU|DirectML|Level Zero)\b"
    r"|(?i:out of memory|OutOfMemory|illegal memory access|no kernel image|device-side assert)"
    r"|(?i:GPU is lost|device lost|ECC error|driver shutting down)"
)

# What servers say against a job.
_SAID: Final = frozenset(
    {Reason.REJECTED, Reason.PARTIAL, Reason.EXECUTION_ERROR, Reason.SERVER_PROTOCOL}
)


def blames_the_card(failure: NodeFailure | None) -> bool:
    """Whether an exception speaks of the card rather than of the workflow."""
    if failure is None:
        return False
    return _CARD.search(f"{failure.exception_type}: {failure.message}") is not None


def asks_elsewhere(row: Row, outcome: Outcome) -> bool:
    """Whether *outcome*, said by the server of *row*, calls for another server's opinion."""
    match outcome.reason:
        case Reason.REJECTED:
            return True
        case Reason.EXECUTION_ERROR:
            return not raised_before(row)
        case _:
            return False


def raised_before(row: Row) -> bool:
    """Whether the job has raised on another server already."""
    return any(said.outcome.reason is Reason.EXECUTION_ERROR for said in row.verdicts)


def has_said(row: Row, server: ServerName, origin: str) -> bool:
    """Whether that server has said no to this job."""
    return any((said.server, said.origin) == (server, origin) for said in row.verdicts)


def final(row: Row, outcome: Outcome) -> Outcome:
    """*outcome*, with what other servers said before it."""
    others = [said for said in row.verdicts if said.server != row.server]
    if not others or outcome.reason not in _SAID:
        return outcome
    alike = [said.server for said in others if said.outcome.message == outcome.message]
    message = outcome.message
    if alike:
        message += f" (the same on {', '.join(alike)})"
    for said in others:
        if said.server not in alike:
            message += f" On {said.server} before: {said.outcome.message}"
    told = [
        {"server": said.server, "reason": _reason(said.outcome), "message": said.outcome.message}
        for said in others
    ]
    return msgspec.structs.replace(
        outcome, message=message, detail={**outcome.detail, "elsewhere": told}
    )


def last(row: Row) -> Outcome:
    """How the job ends when nobody is left to ask."""
    said = row.verdicts[-1]
    before = msgspec.structs.replace(row, server=said.server, verdicts=row.verdicts[:-1])
    return final(before, said.outcome)


def warnings(row: Row) -> tuple[str, ...]:
    """What a person should know of a job that succeeded elsewhere."""
    return tuple(f"Server {said.server} did not: {said.outcome.message}" for said in row.verdicts)


def _reason(outcome: Outcome) -> str:
    assert outcome.reason is not None
    return outcome.reason.value
