"""The submitter: uploads, then one POST /prompt for one committed intent, never repeated here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn

import trio

from comfyd.comfyui.client import Client
from comfyd.core import workflow
from comfyd.core.facts import (
    Accepted,
    Answer,
    NotSent,
    Rejected,
    SubmitUnknown,
    Token,
    Unsendable,
)
from comfyd.core.model import PromptId, Row, State, prompt_id_of
from comfyd.core.orders import Submit
from comfyd.core.wire.rejection import decode_rejection
from comfyd.core.wire.tolerant import line
from comfyd.core.workflow import Graph, Input, quoted
from comfyd.errors import (
    JobFileError,
    ProtocolViolation,
    ServerError,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)
from comfyd.metrics import reason_of
from comfyd.spool import bundle, jobfile
from comfyd.spool.bundle import Piece
from comfyd.spool.claimedfile import Claim, opened_bundle, read_claim
from comfyd.spool.jobfile import JobDocument
from comfyd.spool.layout import Spool, open_dir

# The request was understood and will never do. Everything else in 4xx is a proxy's, a
# misconfiguration's or an overload's, and says nothing about the job.
_PERMANENT: Final = frozenset({400, 413, 422})

_CHANGED: Final = "its file in claimed/ was changed by someone else; submit it again"
_ENDING: Final = re.compile(r"[a-z0-9]{1,8}")


def _nothing_to_draw() -> NoReturn:
    raise JobFileError("it asks for a random number that was not drawn when it was claimed")


@dataclass(frozen=True, slots=True)
class Job:
    """What was claimed, read again for one attempt.

    Attributes:
      names: How the server calls the files it was given, by the input that each is for.

    """

    row: Row
    document: JobDocument
    claim: Claim
    names: dict[Input, str] = field(default_factory=dict)

    def body(self, *, unique_prefix: bool) -> bytes:
        """The POST body of the attempt that the row intends."""
        row = self.row
        assert row.prompt_id is not None
        assert row.client_id is not None
        graph = workflow.fill(self.document.graph, self.names)
        if unique_prefix:
            graph = workflow.make_unique(graph, row.job, row.attempt)
        return workflow.body(
            graph, self.document.extra_data, row.prompt_id, row.client_id, row.job, row.attempt
        )


def read_job(spool: Spool, row: Row) -> Job:
    """The job of *row*, exactly as it was claimed. Blocking.

    Raises:
      JobFileError: What was claimed is gone, was changed, or is no job any more.

    """
    claimed_fd = open_dir(spool.claimed)
    try:
        claim = read_claim(claimed_fd, row.payload, max_bytes=bundle.MAX_BYTES)
        if claim.sha256 != row.sha256:
            raise JobFileError(_CHANGED)

        def named(name: str) -> bytes:
            if claim.pieces is None or name not in claim.pieces:
                raise jobfile.not_found(name)
            with opened_bundle(claimed_fd, row.payload) as fd:
                return bundle.read_piece(fd, name, claim.pieces[name])

        document = jobfile.load(
            claim.document,
            claim.name,
            draw=_nothing_to_draw,
            drawn=row.drawn,
            beside=claim.beside,
            named=named,
        )
    except FileNotFoundError as error:
        raise JobFileError(f"its file in claimed/ cannot be read: {error.strerror}") from error
    finally:
        os.close(claimed_fd)
    return Job(row, document, claim)


def _piece_of(spool: Spool, job: Job, name: str) -> bytes:
    """The content of one file of the bundle. Blocking.

    Raises:
      JobFileError: It is gone, or was changed.

    """
    assert job.claim.pieces is not None
    claimed_fd = open_dir(spool.claimed)
    try:
        with opened_bundle(claimed_fd, job.row.payload) as fd:
            return bundle.read_piece(fd, name, job.claim.pieces[name])
    except FileNotFoundError:
        raise JobFileError(_CHANGED) from None
    finally:
        os.close(claimed_fd)


def _upload_name(name: str, piece: Piece) -> str:
    """Different for different content, so that the server never has another one by that name."""
    ending = name.rpartition("/")[2].rpartition(".")[2].lower()
    safe = ending if _ENDING.fullmatch(ending) and "." in name else "bin"
    return f"comfyd-{piece.sha256[:32]}.{safe}"


async def _upload(job: Job, client: Client, spool: Spool) -> None:
    """Give the server the files of *job*, one after the other, each content once."""
    assert job.claim.pieces is not None
    known: dict[str, str] = {}
    for target, name in job.document.files.items():
        piece = job.claim.pieces[name]
        ours = _upload_name(name, piece)
        if ours not in known:
            content = await trio.to_thread.run_sync(_piece_of, spool, job, name)
            try:
                known[ours] = await client.upload(ours, content)
            except ServerStatus as error:
                if error.status in _PERMANENT:
                    raise _Refused(name, piece.size_bytes, error) from error
                raise
        job.names[target] = known[ours]


class _Refused(Exception):
    """The server does not take this file: it is too large, or not to its liking."""

    def __init__(self, name: str, size_bytes: int, error: ServerStatus) -> None:
        self.status = error.status
        if error.status == 413:
            super().__init__(
                f"{quoted(name)} has {size_bytes} bytes, more than the server takes in one upload;"
                " start ComfyUI with a larger --max-upload-size (in MB), or submit a smaller file."
            )
            return
        said = line(error.body, 200)
        super().__init__(
            f"The server does not take {quoted(name)} (HTTP status {error.status}"
            f"{f': {said}' if said else ''}); look for the reason in its log, or in that of a proxy"
            " before it."
        )


def _not_sent(token: Token, error: ServerError) -> NotSent:
    """An upload failed: whatever the server has of it, no prompt is there."""
    status, after_s = None, None
    if isinstance(error, ServerStatus):
        status, after_s = error.status, error.retry_after_s
    reached = _reached(error)
    return NotSent(
        token=token,
        reason=reason_of(error),
        operation="upload",
        reached=reached,
        status=status,
        said=f"upload: {error}" if reached else "",
        retry_after_s=after_s,
    )


def _reached(error: ServerError) -> bool:
    """Whether the server was there: what failed then may be the job's fault."""
    match error:
        case ServerRefused():
            return False
        case ServerUnreachable():
            return error.sent
        case _:
            return True


async def submit(
    order: Submit,
    client: Client,
    spool: Spool,
    *,
    unique_prefix: bool,
    on_posted: Callable[[], None],
    on_graph: Callable[[PromptId, Graph], None] = lambda prompt_id, graph: None,
) -> Answer:
    """Carry out *order*: upload what the job brings, then exactly one POST.

    Args:
      on_graph: Told what is about to be sent.
      on_posted: Told as soon as the server said 200: a ``status`` must follow on the WebSocket.

    Cancellation: what the server did is then unknown, and the journal says so.

    """
    row, token = order.row, order.token
    if row.state is not State.SUBMITTING or row.prompt_id != prompt_id_of(row.job, row.attempt):
        raise ProtocolViolation(f"rule post_without_intent: job {row.job} is {row.state.value}")
    try:
        job = await trio.to_thread.run_sync(read_job, spool, row)
        if job.document.files:
            await _upload(job, client, spool)
        body = await trio.to_thread.run_sync(lambda: job.body(unique_prefix=unique_prefix))
    except JobFileError as error:
        return Unsendable(token=token, message=error.message)
    except _Refused as error:
        return Rejected(token=token, message=str(error), detail={"status": error.status})
    except ServerError as error:
        return _not_sent(token, error)
    on_graph(row.prompt_id, job.document.graph)
    try:
        reply = await client.submit(body)
    except ServerRefused:
        return NotSent(token=token, reason="refused")
    except ServerUnreachable as error:
        if error.sent:
            return SubmitUnknown(token=token, reason="timeout", said=str(error))
        return NotSent(token=token, reason="unreachable")
    except ServerProtocol as error:
        return SubmitUnknown(token=token, reason="protocol", said=str(error))
    except ServerStatus as error:
        if error.status in _PERMANENT:
            message, detail = decode_rejection(error.status, error.body.encode())
            return Rejected(token=token, message=message, detail=detail)
        if error.status < 500:
            return NotSent(
                token=token,
                reason="status",
                reached=True,
                status=error.status,
                said=str(error),
                retry_after_s=error.retry_after_s,
            )
        return SubmitUnknown(
            token=token,
            reason="status",
            status=error.status,
            said=str(error),
            retry_after_s=error.retry_after_s,
        )
    if reply.prompt_id != row.prompt_id:
        return SubmitUnknown(token=token, reason="protocol", said="it answered another prompt id")
    on_posted()
    return Accepted(
        token=token,
        number=reply.number,
        uploaded=bool(job.document.files),
        node_errors=reply.node_errors,
    )
