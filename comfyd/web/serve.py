"""The HTTP listener: Hypercorn on trio around one ASGI application.

The socket is ours, for three reasons. A taken port is a sentence about the configuration. The
kernel drops a reader that stops reading; Hypercorn shields its writes from cancellation, so such a
reader would keep the daemon from stopping. And one client that sends nonsense at the wrong moment
can make Hypercorn (0.18) fail as a whole (a BusyResourceError leaves its nursery): it is started
again on the same socket, and nobody else notices more than a pause.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from functools import partial
from typing import Any, Final, cast

import hypercorn.trio
import structlog
import trio
from hypercorn.config import Config, Sockets
from hypercorn.typing import ASGIFramework
from starlette.types import ASGIApp

from comfyd.errors import ConfigError

_log: Any = structlog.get_logger("comfyd.web.serve")

KEY: Final = "metrics.listen"
BACKLOG: Final = 100
WRITE_S: Final = 5.0  # a reader may take nothing for so long
IDLE_S: Final = 5.0  # for a whole request's head, and between two requests
STOP_S: Final = 3.0  # what is being answered may go on for so long after the stop
AGAIN_S: Final = 0.5  # between a failure and the next start; new connections wait in the backlog

_TCP_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)


async def bind(host: str, port: int) -> socket.socket:
    """A listening-ready TCP socket on *host* (a name or an address) and *port* (0: any free one).

    Raises:
      ConfigError: It cannot be had, and what to do.

    """
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        problem = f"the host {host!r} is not known here ({error.strerror}); write an address"
        raise ConfigError(KEY, problem) from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Accepted sockets inherit it (Linux): also a reader that is there but takes nothing.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(WRITE_S * 1000))
        sock.setblocking(False)
        sock.bind(address)
        # Listening already tells a port that another one has bound without listening.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(KEY, _why_not(host, port, error)) from error
    return sock


def _why_not(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is taken; stop what uses it, or choose another port"
        case errno.EACCES:
            return f"port {port} needs root's rights; choose one above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{host} is no address of this machine; choose one that is, or 0.0.0.0"
        case _:
            return f"cannot listen on {host} port {port}: {error.strerror}"


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    stop: trio.Event,
    tls: Tls | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* until *stop*; to be started with ``nursery.start``.

    Args:
      host, port: Where to listen; port 0 takes any free one.
      stop: Answers under way get STOP_S to end, then this returns.
      tls: Whether TLS is spoken, and how; None for never.

    Returns:
      By way of *task_status*: the address and port that were bound.

    Raises:
      ConfigError: The address cannot be had.

    Cancellation: like *stop*, but at once, except for what the kernel still writes (WRITE_S).

    """
    with await bind(host, port) as sock:
        address = sock.getsockname()
        task_status.started((address[0], address[1]))
        tls = Tls() if tls is None else tls
        while not stop.is_set():
            changed = tls.changed
            try:
                # A framework to it, an application to Starlette: the same thing in other words.
                await hypercorn.trio.serve(
                    cast("ASGIFramework", app),
                    _Config(sock, tls.context),
                    shutdown_trigger=partial(_either, stop, changed),
                )
            except* Exception as failure:  # noqa: BLE001
                # Hypercorn's own: those of *app* never come here, they were logged, with a 500.
                _log.warning("http_restarts", problem=repr(failure.exceptions))
            if not changed.is_set():
                with trio.move_on_after(AGAIN_S):
                    await stop.wait()


class Tls:
    """The TLS of a listener: None is plain HTTP. It may change while it serves."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.context = context
        self.changed = trio.Event()

    def change(self, context: ssl.SSLContext | None) -> None:
        """For new connections; what is being answered gets STOP_S to end."""
        self.context = context
        before, self.changed = self.changed, trio.Event()
        before.set()


async def _either(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def first(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(first, event)


class _Config(Config):
    """Hypercorn's settings: our socket, no access log, and its errors through our logging."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._context = context
        self.ssl_handshake_timeout = IDLE_S
        # A copy: what is given to trio is closed by it.
        self._socket = sock
        # Its "Running on" is nobody's business: the daemon says where it listens.
        self.errorlog = logging.getLogger("comfyd.web.hypercorn")
        self.errorlog.setLevel(logging.WARNING)
        self.accesslog = None  # it would hold every query, and Prometheus asks all day
        self.backlog = BACKLOG
        self.keep_alive_timeout = IDLE_S
        self.graceful_timeout = STOP_S
        self.h11_max_incomplete_size = 16 * 1024
        self.include_server_header = False

    def create_sockets(self) -> Sockets:
        ours = [self._socket.dup()]
        return Sockets([], ours, []) if self._context is None else Sockets(ours, [], [])

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self._context
