"""The control socket: everything that changes something, for root and the daemon's own user.

A Unix socket (mode 0600) that speaks JSON lines. A request is one line: ``{"verb": "pause", ...}``.
Its answer is one line: ``{"ok": true, ...}``, or ``{"ok": false, "error": sentence, "kind": name of
the error's class}``. Several requests may follow each other on one connection. What verbs there are
is the app's matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from comfyd.errors import ComfydError, ConfigError, UsageError
from comfyd.web.control_client import address_of

_log: Any = structlog.get_logger("comfyd.web.control")

LINE_MAX_BYTES: Final = 1 << 20
"""Of a request: some ten thousand job ids."""
IDLE_S: Final = 30.0  # for one whole line to come, and for an answer to be taken
VERB_S: Final = 300.0  # for one verb: the longest is the copy of a large journal
CONNECTIONS_MAX: Final = 16  # several people and scripts at once; more are told to come again
_CHUNK_BYTES: Final = 1 << 16

Verb = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Gets the request without ``verb``, gives what the answer holds besides ``ok``: JSON values.

Raises ComfydError for what the caller should read, UsageError if the request itself is wrong. Any
other exception is a bug and ends the daemon.
"""

_decoder = msgspec.json.Decoder(dict[str, Any])


async def serve_control(
    path: Path,
    verbs: Mapping[str, Verb],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests at *path* until cancelled; to be started with ``nursery.start``.

    A socket that a dead daemon left there is replaced: call this only with the state folder's lock.

    Raises:
      ConfigError: Something else stands at *path*, or no socket can be made there.
      ExceptionGroup: With what a verb raised, if that was a bug.

    Cancellation: at any time; a verb at work is cancelled with it, and the socket file removed.

    """
    places = trio.CapacityLimiter(CONNECTIONS_MAX)

    async def connection(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await _converse(stream, verbs, places)
            except _Gone:
                _log.debug("caller_gone")

    sock = _listen(path)
    try:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        task_status.started()
        await trio.serve_listeners(connection, [listener])
    finally:
        _remove(sock, path)


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.setblocking(False)
        # Linux makes the file with the mode of the socket: there is no moment with another one.
        os.fchmod(sock.fileno(), 0o600)
        with address_of(path) as address:
            sock.bind(address)
        sock.listen(CONNECTIONS_MAX)
    except OSError as error:
        sock.close()
        problem = f"no control socket can be made at {path}: {error.strerror or error}"
        raise ConfigError("state", problem) from error
    except ConfigError:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("state", f"{path} is in the way: it is not a socket; move it elsewhere")
    path.unlink(missing_ok=True)


def _remove(sock: socket.socket, path: Path) -> None:
    sock.close()
    path.unlink(missing_ok=True)


def _peer_uid(stream: trio.SocketStream) -> int:
    """The user that made the connection, by the kernel's word (struct ucred, unix(7))."""
    size = struct.calcsize("3i")
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


class _Gone(Exception):
    """The caller is no longer there, or takes nothing. Never a verb's error."""


async def _converse(
    stream: trio.SocketStream, verbs: Mapping[str, Verb], places: trio.CapacityLimiter
) -> None:
    if _peer_uid(stream) not in {0, os.geteuid()}:
        await _send(stream, _refusal(UsageError("Only root and the daemon's own user may ask.")))
        return
    try:
        places.acquire_nowait()
    except trio.WouldBlock:
        await _send(stream, _refusal(UsageError("Too many callers at once; try again.")))
        return
    try:
        held = bytearray()
        while (line := await _next_line(stream, held)) is not None:
            if len(line) > LINE_MAX_BYTES:
                much = UsageError(f"A request has at most {LINE_MAX_BYTES} bytes.")
                await _send(stream, _refusal(much))
                return
            if line.strip():
                await _send(stream, await _answer(stream, line, verbs))
    finally:
        places.release()


async def _next_line(stream: trio.SocketStream, held: bytearray) -> bytes | None:
    """Take the next line from *held*, which keeps what came after it; None if there is no more.

    What is longer than LINE_MAX_BYTES is given as far as it came.
    """
    with trio.move_on_after(IDLE_S):
        searched = 0
        while (end := held.find(b"\n", searched)) < 0 and len(held) <= LINE_MAX_BYTES:
            searched = len(held)
            try:
                chunk = await stream.receive_some(_CHUNK_BYTES)
            except trio.BrokenResourceError as error:
                raise _Gone from error
            if not chunk:
                return None  # what is not a whole line was never asked
            held += chunk
        size = end if end >= 0 else len(held)
        line = bytes(held[:size])
        del held[: size + 1]
        return line
    return None


async def _answer(
    stream: trio.SocketStream, line: bytes, verbs: Mapping[str, Verb]
) -> dict[str, Any]:
    try:
        request = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _refusal(UsageError("A request is one line with one JSON object."))
    name = request.pop("verb", None)
    verb = verbs.get(name) if isinstance(name, str) else None
    if verb is None:
        known = ", ".join(sorted(verbs))
        return _refusal(UsageError(f"The request names no verb that is known here: {known}."))
    try:
        with trio.move_on_after(VERB_S):
            return {"ok": True, **await verb(request)}
    except ComfydError as error:
        return _refusal(error)
    except Exception as bug:
        with contextlib.suppress(_Gone):
            sentence = "The daemon met a bug and stops; its log has the details."
            await _send(stream, _refusal(bug, sentence))
        raise
    late = f"{name} took longer than {VERB_S:.0f} s and was given up; look at the daemon's log."
    return _refusal(trio.TooSlowError(), late)


def _refusal(error: Exception, sentence: str | None = None) -> dict[str, Any]:
    return {"ok": False, "error": sentence or str(error), "kind": type(error).__name__}


async def _send(stream: trio.SocketStream, reply: Mapping[str, Any]) -> None:
    line = json.dumps(reply, separators=(",", ":")).encode() + b"\n"
    try:
        with trio.fail_after(IDLE_S):
            await stream.send_all(line)
    except (trio.BrokenResourceError, trio.TooSlowError) as error:
        raise _Gone from error
