"""The other end of the control socket, for the command line: blocking, and quick to import."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from comfyd.errors import ComfydError

REPLY_MAX_BYTES: Final = 64 << 20
_SUN_PATH_MAX: Final = 107  # bytes of a socket's path, its end mark left out (unix(7))
_CHUNK_BYTES: Final = 1 << 16


class DaemonUnreachable(ComfydError):
    """No daemon answered at the control socket (exit 69).

    Args:
      sent: Whether the request may have been carried out all the same.
      absent: Whether nobody listens there at all.

    """

    def __init__(self, message: str, *, sent: bool = False, absent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.absent = absent


def ask(path: Path, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send *request* to the daemon whose control socket is at *path*.

    Args:
      request: ``{"verb": name, ...}``, JSON values.
      timeout_s: Seconds for all of it.

    Returns:
      The daemon's answer as it is: look at its ``ok``.

    Raises:
      DaemonUnreachable: None is there, it may not be asked, or it did not answer in time.

    """
    deadline_s = time.monotonic() + timeout_s
    line = json.dumps(dict(request), allow_nan=False).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        _connect(sock, path)
        try:
            # It may refuse us and hang up before it has read all: what it said is still there.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(line)
            reply = _read_line(sock, deadline_s)
        except TimeoutError:
            late = f"The daemon did not answer within {timeout_s:g} s; it may still do as asked."
            raise DaemonUnreachable(late, sent=True) from None
    try:
        answer = json.loads(reply)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        gone = "The daemon stopped while it was asked; look at its status before asking again."
        raise DaemonUnreachable(gone, sent=True)
    return answer


def _connect(sock: socket.socket, path: Path) -> None:
    try:
        with address_of(path) as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        none = f"No daemon is running: nobody listens at {path}."
        raise DaemonUnreachable(none, absent=True) from None
    except PermissionError:
        raise DaemonUnreachable(f"Only root and {_owner(path)} may ask this daemon.") from None
    except BlockingIOError:
        raise DaemonUnreachable("The daemon is too busy to be asked; try again.") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise DaemonUnreachable(f"The daemon at {path} cannot be reached: {why}.") from None


def _read_line(sock: socket.socket, deadline_s: float) -> bytes:
    """All that comes up to the end of a line, or of the connection."""
    held = bytearray()
    while not held.endswith(b"\n") and len(held) <= REPLY_MAX_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        try:
            chunk = sock.recv(_CHUNK_BYTES)
        except ConnectionResetError:
            break
        if not chunk:
            break
        held += chunk
    return bytes(held)


def _owner(path: Path) -> str:
    try:
        return f"the user with id {path.stat().st_uid}"
    except OSError:
        return "its own user"


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What to bind or connect to for the socket at *path*, however long that path is (Linux)."""
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
