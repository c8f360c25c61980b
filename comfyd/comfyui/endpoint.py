"""Where a server is and how to reach it: one reading of the URL for HTTP and for the WebSocket."""

from __future__ import annotations

import errno
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import trio

from comfyd.errors import ConfigError, ServerError, ServerRefused, ServerUnreachable

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")

# The libraries set these; an Origin would make ComfyUI's own guard answer 403 (server.py).
_RESERVED = frozenset(
    {"host", "origin", "connection", "upgrade", "content-length", "transfer-encoding"}
    | {"accept-encoding", "expect", "te", "trailer"}
)

# The machine has no such address family; nothing can be listening there.
_NO_ROUTE_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address. Its repr never shows the headers: they may hold credentials.

    Attributes:
      prefix: Path before every route, without a trailing slash; "" for most servers.
      headers: Extra headers for every request.
      ca_file: Trust only the authorities in this file; None for the system's.

    """

    host: str
    port: int
    tls: bool
    prefix: str
    headers: tuple[tuple[str, str], ...]
    ca_file: Path | None

    @classmethod
    def parse(
        cls, url: str, headers: Mapping[str, str] | None = None, ca_file: Path | None = None
    ) -> Endpoint:
        """Read *url*.

        Raises:
          ConfigError: No usable http(s) URL, or a header that cannot be sent. Values of headers
            are never in the message.

        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host.encode("idna")
        except ValueError:
            raise ConfigError("url", "is not a valid URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError("url", "must be like http://host:8188")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("url", "must not hold credentials; use headers")
        if parts.query or parts.fragment or not url.isascii() or not url.isprintable():
            raise ConfigError("url", "must not have a query, a fragment or odd characters")
        for name, value in (headers or {}).items():
            if not _TOKEN.fullmatch(name) or name.lower().startswith("sec-"):
                raise ConfigError(f"headers.{name!r}", "is not a header name that can be set")
            if name.lower() in _RESERVED:
                raise ConfigError(f"headers.{name}", "cannot be set")
            if not _VALUE.fullmatch(value):
                raise ConfigError(f"headers.{name}", "must be printable ASCII, trimmed, not empty")
        tls = parts.scheme == "https"
        return cls(
            host=host,
            port=port or (443 if tls else 80),
            tls=tls,
            prefix=parts.path.rstrip("/"),
            headers=tuple((headers or {}).items()),
            ca_file=ca_file,
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    @property
    def authority(self) -> str:
        """``host:port`` as in a Host header; also what messages call the server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """A verifying context for https, None for http.

        Raises:
          ConfigError: ``ca_file`` cannot be used.

        """
        if not self.tls:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("ca_file", f"cannot be used: {error.strerror or error}") from error


async def dial(host: str, port: int, context: ssl.SSLContext | None) -> trio.abc.Stream:
    """Open a TCP stream, with TLS up and verified if there is a *context*.

    Raises:
      OSError: No connection; see ``connect_error``.
      trio.BrokenResourceError: The TLS handshake failed; its cause is the ``ssl.SSLError``.

    """
    stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
    if context is None:
        return stream
    secure = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    try:
        await secure.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(secure)
        raise
    return secure


def connect_error(where: str, error: BaseException) -> ServerError:
    """Our error for a connection that never came up: nothing was sent.

    It is ``ServerRefused`` only if every address there is to try refused: a name may resolve to
    several, and one that times out proves nothing about the server behind it.
    """
    leaves = list(_leaves(error))
    tried = [leaf for leaf in leaves if getattr(leaf, "errno", None) not in _NO_ROUTE_HERE]
    if tried and all(isinstance(leaf, ConnectionRefusedError) for leaf in tried):
        return ServerRefused(f"{where} refused the connection")
    reasons = dict.fromkeys(map(_reason, leaves))
    return ServerUnreachable(f"cannot connect to {where}: {'; '.join(reasons)}", sent=False)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The first failures behind *error*. httpcore wipes ``__cause__``; the context stays."""
    before = error.__cause__ or error.__context__
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    elif before is None or (isinstance(error, OSError) and error.errno is not None):
        yield error
    else:
        yield from _leaves(before)


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
