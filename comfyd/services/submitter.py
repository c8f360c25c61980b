"""The submitter: one committed intent becomes one POST /prompt, never repeated here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final, NoReturn

import trio

from comfyd.comfyui.client import Client
from comfyd.core import workflow
from comfyd.core.facts import Accepted, Answer, NotSent, Rejected, SubmitUnknown, Unsendable
from comfyd.core.model import Row, State, prompt_id_of
from comfyd.core.orders import Submit
from comfyd.core.wire.rejection import decode_rejection
from comfyd.errors import (
    JobFileError,
    ProtocolViolation,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)
from comfyd.spool import jobfile
from comfyd.spool.layout import Spool

# The request was understood and will never do. Everything else in 4xx is a proxy's, a
# misconfiguration's or an overload's, and says nothing about the job.
_PERMANENT: Final = frozenset({400, 413, 422})


def _nothing_to_draw() -> NoReturn:
    raise JobFileError("it asks for a random number that was not drawn when it was claimed")


def body_of(spool: Spool, row: Row, *, unique_prefix: bool) -> bytes:
    """The POST body of the attempt that *row* intends. Blocking.

    Raises:
      JobFileError: The claimed file is gone, was changed, or is no job any more.

    """
    assert row.prompt_id is not None
    assert row.client_id is not None
    try:
        fd = os.open(spool.claimed / row.payload, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise JobFileError(f"its file in claimed/ cannot be read: {error.strerror}") from error
    with open(fd, "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise JobFileError("its file in claimed/ was changed by someone else; submit it again")
    document = jobfile.load(data, row.payload, draw=_nothing_to_draw, drawn=row.drawn)
    graph = document.graph
    if unique_prefix:
        graph = workflow.make_unique(graph, row.job, row.attempt)
    return workflow.body(
        graph, document.extra_data, row.prompt_id, row.client_id, row.job, row.attempt
    )


async def submit(
    order: Submit,
    client: Client,
    spool: Spool,
    *,
    unique_prefix: bool,
    on_posted: Callable[[], None],
) -> Answer:
    """Carry out *order*: exactly one POST.

    Args:
      on_posted: Told as soon as the server said 200: a ``status`` must follow on the WebSocket.

    Cancellation: what the server did is then unknown, and the journal says so.

    """
    row, token = order.row, order.token
    if row.state is not State.SUBMITTING or row.prompt_id != prompt_id_of(row.job, row.attempt):
        raise ProtocolViolation(f"rule post_without_intent: job {row.job} is {row.state.value}")
    try:
        body = await trio.to_thread.run_sync(
            lambda: body_of(spool, row, unique_prefix=unique_prefix)
        )
    except JobFileError as error:
        return Unsendable(token=token, message=error.message)
    try:
        reply = await client.submit(body)
    except ServerRefused:
        return NotSent(token=token, reason="refused")
    except ServerUnreachable as error:
        if error.sent:
            return SubmitUnknown(token=token, reason="timeout")
        return NotSent(token=token, reason="unreachable")
    except ServerProtocol:
        return SubmitUnknown(token=token, reason="protocol")
    except ServerStatus as error:
        if error.status in _PERMANENT:
            message, detail = decode_rejection(error.status, error.body.encode())
            return Rejected(token=token, message=message, detail=detail)
        if error.status < 500:
            return NotSent(token=token, reason="status", retry_after_s=error.retry_after_s)
        return SubmitUnknown(token=token, reason="status")
    if reply.prompt_id != row.prompt_id:
        return SubmitUnknown(token=token, reason="protocol")
    on_posted()
    return Accepted(token=token, number=reply.number, node_errors=reply.node_errors)
