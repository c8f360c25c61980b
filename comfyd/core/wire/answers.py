"""The short HTTP answers: /queue, /prompt and /upload/image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from comfyd.core.model import PromptId
from comfyd.core.wire.messages import MAX_REMAINING
from comfyd.core.wire.rejection import bounded_node_errors
from comfyd.core.wire.tolerant import Malformed, decode
from comfyd.errors import ServerProtocol

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueueItem:
    """One prompt the server holds.

    Attributes:
      number: Its place: smaller runs first. None when the server gave no number.
      ours: The ``extra_data.comfyd`` tag, (job, attempt), or None.
      client_id: The connection it was submitted for.

    """

    prompt_id: PromptId
    number: float | None = None
    ours: tuple[str, int] | None = None
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """What /queue said; *pending* is in the order in which it will run."""

    running: tuple[QueueItem, ...] = ()
    pending: tuple[QueueItem, ...] = ()


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """What POST /prompt said. *node_errors* is not empty when outputs were dropped; bounded."""

    prompt_id: PromptId
    number: float | None = None
    node_errors: dict[str, Any] = field(default_factory=dict)


class _Item(msgspec.Struct, array_like=True):
    """[number, prompt_id, prompt, extra_data, outputs_to_execute, ...]: the graph stays unread."""

    number: Any
    prompt_id: str
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    extra_data: msgspec.Raw = msgspec.Raw(b"null")


class _Queue(msgspec.Struct):
    queue_running: list[_Item]
    queue_pending: list[_Item]


class _Listed(msgspec.Struct):
    prompt: _Item


class _Extra(msgspec.Struct):
    comfyd: Any = None
    client_id: Any = None


class _Submitted(msgspec.Struct):
    prompt_id: str
    number: Any = None
    node_errors: Any = None


class _ExecInfo(msgspec.Struct):
    queue_remaining: int


class _Remaining(msgspec.Struct):
    exec_info: _ExecInfo


class _Uploaded(msgspec.Struct):
    name: str
    subfolder: str = ""


_queue = msgspec.json.Decoder(_Queue)
_listing = msgspec.json.Decoder(dict[str, msgspec.Raw])
_listed = msgspec.json.Decoder(_Listed)
_extra = msgspec.json.Decoder(_Extra)
_submitted = msgspec.json.Decoder(_Submitted)
_remaining = msgspec.json.Decoder(_Remaining)
_uploaded = msgspec.json.Decoder(_Uploaded)


def _answer(path: str, body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decode(body, decoder)[0]
    except Malformed as error:
        raise ServerProtocol(f"the answer to {path} does not decode: {error}") from None


def decode_queue(body: bytes) -> QueueSnapshot:
    """Decode GET /queue. Elements beyond the known ones are ignored.

    Raises:
      ServerProtocol: Not a queue, or an item without a prompt id: then nothing is known.

    """
    queue = _answer("GET /queue", body, _queue)
    # The server lists its heap, not the order in which it will run.
    pending = sorted(map(_item, queue.queue_pending), key=_place)
    return QueueSnapshot(tuple(map(_item, queue.queue_running)), tuple(pending))


def decode_listing(body: bytes) -> tuple[QueueItem, ...]:
    """Decode GET /history?max_items=: which prompts have a record, oldest first; nothing else.

    A record that cannot be read is one of a prompt that is not ours.

    Raises:
      ServerProtocol: Not a list of records.

    """
    records = _answer("GET /history", body, _listing)
    return tuple(_listed_item(prompt_id, record) for prompt_id, record in records.items())


def _listed_item(prompt_id: str, record: msgspec.Raw) -> QueueItem:
    try:
        listed, _ = decode(bytes(record), _listed)
    except Malformed:
        return QueueItem(PromptId(prompt_id))
    return _item(listed.prompt)


def _place(item: QueueItem) -> tuple[float, str]:
    return (math.inf if item.number is None else item.number, item.prompt_id)


def _item(item: _Item) -> QueueItem:
    try:
        extra, _ = decode(bytes(item.extra_data), _extra, lax=False)
    except Malformed:
        extra = _Extra()  # not one of ours: we always send an object
    return QueueItem(
        PromptId(item.prompt_id),
        number_of(item.number),
        tag_of(extra.comfyd),
        extra.client_id if isinstance(extra.client_id, str) else None,
    )


def number_of(value: object) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def tag_of(value: object) -> tuple[str, int] | None:
    """Our mark in ``extra_data``: the job and its attempt."""
    match value:
        case {"job": str(job), "attempt": int(attempt)} if not isinstance(attempt, bool):
            return job, attempt
    return None


def decode_submit(body: bytes) -> SubmitReply:
    """Decode the 200 of POST /prompt.

    Raises:
      ServerProtocol: It does not say which prompt id was queued.

    """
    reply = _answer("POST /prompt", body, _submitted)
    if not reply.prompt_id:
        raise ServerProtocol("the answer to POST /prompt names no prompt id")
    return SubmitReply(
        PromptId(reply.prompt_id), number_of(reply.number), bounded_node_errors(reply.node_errors)
    )


def decode_remaining(body: bytes) -> int:
    """Decode GET /prompt: how many prompts are pending or running, others' included.

    Raises:
      ServerProtocol: It holds no such number.

    """
    remaining = _answer("GET /prompt", body, _remaining).exec_info.queue_remaining
    if not 0 <= remaining <= MAX_REMAINING:
        raise ServerProtocol("the answer to GET /prompt counts fewer than no prompts")
    return remaining


def decode_upload(body: bytes) -> str:
    """Decode POST /upload/image: the name by which a graph refers to the file from now on.

    Raises:
      ServerProtocol: It names no file.

    """
    uploaded = _answer("POST /upload/image", body, _uploaded)
    if not uploaded.name:
        raise ServerProtocol("the answer to POST /upload/image names no file")
    return f"{uploaded.subfolder}/{uploaded.name}" if uploaded.subfolder else uploaded.name
