"""The WebSocket's text messages.

A message is a hint that it is time to look, so a wrong one costs nothing and none is an error.
The one end signal is ``executing`` with ``node: null`` and a prompt id: ComfyUI's worker sends it
after the history record is in place (main.py, prompt_worker). ``execution_success``, ``_error`` and
``_interrupted`` come before that (issue #11540).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec

from comfyd.core.model import End, PromptId
from comfyd.core.wire.tolerant import Malformed, decode, line

MAX_PROMPT_ID_CHARS = 128  # a UUID has 36; older servers take any text
MAX_REMAINING = 2**53
MAX_REPAIR_CHARS = 16 * 2**20  # a repair takes ten times the memory, and seconds

MESSAGE_TYPES: Final = frozenset(
    {
        "status",
        "execution_start",
        "execution_cached",
        "executing",
        "progress",
        "progress_state",
        "executed",
        "execution_success",
        "execution_error",
        "execution_interrupted",
        "feature_flags",
        "logs",
        "binary",
        "invalid",
        "other",
    }
)
"""Every value ``label_of`` can give, and ``binary`` for frames that are not text."""


@dataclass(frozen=True, slots=True)
class Status:
    """The queue changed, or (with *sid*) the server greets a new connection."""

    type: ClassVar = "status"
    remaining: int
    sid: str | None = None


@dataclass(frozen=True, slots=True)
class Alive:
    """The prompt is running. *data* is the message's own, as JSON: `progress.told` reads it."""

    type: str
    prompt_id: PromptId
    data: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ending:
    """The prompt is about to be recorded."""

    type: str
    prompt_id: PromptId
    end: End


@dataclass(frozen=True, slots=True)
class Ended:
    """The end signal: the record is there."""

    type: ClassVar = "executing"
    prompt_id: PromptId


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message of no interest: feature flags, logs, whatever custom nodes send."""

    type: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Not a message, or a known type of the wrong shape. *problem* is fit for a log line."""

    type: str
    problem: str


Message = Status | Alive | Ending | Ended | Ignored | Invalid


class _Envelope(msgspec.Struct):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"null")


class _ExecInfo(msgspec.Struct):
    queue_remaining: int


class _StatusBody(msgspec.Struct):
    exec_info: _ExecInfo


class _StatusData(msgspec.Struct):
    status: _StatusBody
    sid: str | None = None


class _Prompt(msgspec.Struct):
    prompt_id: str


class _Executing(msgspec.Struct):
    node: str | None
    prompt_id: str


class _ExecutionError(msgspec.Struct):
    prompt_id: str
    exception_type: Any = None


_envelope = msgspec.json.Decoder(_Envelope)
_status = msgspec.json.Decoder(_StatusData)
_prompt = msgspec.json.Decoder(_Prompt)
_executing = msgspec.json.Decoder(_Executing)
_error = msgspec.json.Decoder(_ExecutionError)


def decode_message(text: str) -> Message:
    """Decode one text message. Never raises; unknown types and fields are ignored."""
    type_ = ""
    try:
        envelope, _ = decode(text, _envelope, lax=len(text) <= MAX_REPAIR_CHARS)
        type_ = envelope.type
        return _decode_data(type_, bytes(envelope.data))
    except Malformed as error:
        return Invalid(line(type_, 64), str(error))


def _decode_data(type_: str, data: bytes) -> Message:
    match type_:
        case "status":
            status, _ = decode(data, _status, lax=False)
            remaining = status.status.exec_info.queue_remaining
            if not 0 <= remaining <= MAX_REMAINING:
                raise Malformed("queue_remaining is out of range")
            return Status(remaining, status.sid)
        case "executing":
            executing, _ = decode(data, _executing, lax=False)
            prompt_id = _checked(executing.prompt_id)
            return Ended(prompt_id) if executing.node is None else Alive(type_, prompt_id, data)
        case "execution_start" | "execution_cached" | "progress" | "progress_state" | "executed":
            return Alive(type_, _checked(decode(data, _prompt, lax=False)[0].prompt_id), data)
        case "execution_success":
            return Ending(
                type_, _checked(decode(data, _prompt, lax=False)[0].prompt_id), End.SUCCESS
            )
        case "execution_interrupted":
            return Ending(
                type_, _checked(decode(data, _prompt, lax=False)[0].prompt_id), End.INTERRUPTED
            )
        case "execution_error":
            failed, _ = decode(data, _error, lax=False)
            prompt_id = _checked(failed.prompt_id)
            if failed.exception_type == "ExecutionBlocked":  # the prompt goes on (execution.py)
                return Alive(type_, prompt_id, data)
            return Ending(type_, prompt_id, End.ERROR)
        case _:
            return Ignored(line(type_, 64))


def _checked(prompt_id: str) -> PromptId:
    if not 0 < len(prompt_id) <= MAX_PROMPT_ID_CHARS:
        raise Malformed("prompt_id is empty or too long")
    return PromptId(prompt_id)


def label_of(message: Message) -> str:
    """The message's ``type`` label for metrics: always one of ``MESSAGE_TYPES``."""
    if isinstance(message, Invalid):
        return "invalid"
    known = message.type in MESSAGE_TYPES and message.type not in ("binary", "invalid")
    return message.type if known else "other"
