"""``metrics.web_config``: TLS and passwords of our listener, in the file format of Prometheus'
exporters (its exporter-toolkit, web-configuration.md).

What of that format is not supported is refused: taken silently, it would promise protection.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from comfyd.config import document, values
from comfyd.config.document import Node, Scalar
from comfyd.config.section import reader_of, section, setting
from comfyd.config.server import Secret
from comfyd.config.values import Context, Failed, Reader, Refused, Reported, Secrets, attempt, child
from comfyd.errors import ConfigError

# 2^13 rounds take about a second on a slow machine: so much a login may cost us.
MAX_COST: Final = 13
USERS_MAX: Final = 100
_HASH: Final = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENTS: Final = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_HEADERS: Final = {
    "Content-Security-Policy": r"[\x20-\x7e]*",
    "X-Frame-Options": r"(?i:deny|sameorigin)?",
    "X-Content-Type-Options": r"(?i:nosniff)?",
    "X-XSS-Protection": r"[\x20-\x7e]*",
    "Strict-Transport-Security": r"[\x20-\x7e]*",
}


def _unsupported(instead: str) -> Reader[None]:
    """A reader of what Prometheus' exporters know and comfyd does not."""

    def read(node: Node, path: str, ctx: Context) -> None:
        raise Refused(f"is not supported here; {instead}", node)

    return read


def _version(node: Node, path: str, ctx: Context) -> ssl.TLSVersion:
    if isinstance(node, Scalar) and node.text in ("TLS10", "TLS11"):
        raise Refused(f"{node.text} is broken; use TLS12 or TLS13", node)
    return _VERSIONS[values.choice(*_VERSIONS)(node, path, ctx)]


def _client_auth(node: Node, path: str, ctx: Context) -> ssl.VerifyMode:
    if isinstance(node, Scalar) and node.text in ("RequestClientCert", "RequireAnyClientCert"):
        problem = f"{node.text} verifies nothing; use RequireAndVerifyClientCert"
        raise Refused(problem, node)
    return _CLIENTS[values.choice(*_CLIENTS)(node, path, ctx)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """``tls_server_config``."""

    cert_file: Path = setting(values.existing_file)
    key_file: Path = setting(values.existing_file)
    client_auth_type: ssl.VerifyMode = setting(_client_auth, ssl.CERT_NONE)
    client_ca_file: Path | None = setting(values.optional(values.authorities), None)
    min_version: ssl.TLSVersion = setting(_version, ssl.TLSVersion.TLSv1_2)
    max_version: ssl.TLSVersion = setting(_version, ssl.TLSVersion.TLSv1_3)
    cert: None = setting(_unsupported("put it in a file and name that in cert_file"), None)
    key: None = setting(_unsupported("put it in a file and name that in key_file"), None)
    client_ca: None = setting(_unsupported("put it in a file, for client_ca_file"), None)
    client_allowed_sans: None = setting(_unsupported("use an authority of your own"), None)
    cipher_suites: None = setting(_unsupported("OpenSSL's own choice holds; see min_version"), None)
    prefer_server_cipher_suites: None = setting(_unsupported("OpenSSL's own choice holds"), None)
    curve_preferences: None = setting(_unsupported("OpenSSL's own choice holds"), None)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together, as (key, problem)."""
        if self.min_version > self.max_version:
            yield "min_version", "must not be above max_version"
        if (self.client_auth_type is ssl.CERT_NONE) is not (self.client_ca_file is None):
            yield (
                "client_auth_type",
                "and client_ca_file need each other: say RequireAndVerifyClientCert and whose",
            )

    def context(self) -> ssl.SSLContext:
        """What a listener needs. Reads the files.

        Raises:
          ConfigError: They cannot be used.

        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version, context.maximum_version = self.min_version, self.max_version
        context.set_alpn_protocols(["http/1.1"])
        context.verify_mode = self.client_auth_type
        try:
            # An encrypted key would be asked about on a terminal: no password is a wrong one.
            context.load_cert_chain(self.cert_file, self.key_file, password="")
            if self.client_ca_file is not None:
                context.load_verify_locations(self.client_ca_file)
        except (OSError, ssl.SSLError) as error:
            why = error.strerror or str(error)
            problem = f"does not fit {self.key_file}, or one of them cannot be used: {why}"
            raise ConfigError("tls_server_config.cert_file", problem) from None
        return context

    def content(self) -> str:
        """A hash of what the files hold, so that renewed certificates are a change."""
        files = (self.cert_file, self.key_file, self.client_ca_file)
        data = (path.read_bytes() for path in files if path is not None)
        return hashlib.sha256(b"\0".join(data)).hexdigest()


def _headers(node: Node, path: str, ctx: Context) -> Mapping[str, str]:
    """Headers of all answers; an empty one is left out."""
    found: dict[str, str] = {}
    mapping = values.mapping_of(node, "header names to values")
    for name, value in mapping.values.items():
        pattern = _HEADERS.get(name)
        if pattern is None:
            known = ", ".join(_HEADERS)
            ctx.report(child(path, name), f"is not one of {known}", mapping.keys[name])
        elif not isinstance(value, Scalar) or not re.fullmatch(pattern, value.text.strip()):
            ctx.report(child(path, name), "is not a value of that header", value)
        else:
            found[name] = value.text.strip()
    return MappingProxyType(found)


def _no_headers() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """``http_server_config``. *http2* is an offer to clients that nobody has to take up: we speak
    HTTP/1.1."""

    http2: bool = setting(values.boolean, True)
    headers: Mapping[str, str] = setting(_headers, factory=_no_headers)


def _users(node: Node, path: str, ctx: Context) -> Mapping[str, Secret]:
    found: dict[str, Secret] = {}
    mapping = values.mapping_of(node, "names to bcrypt hashes")
    if len(mapping.values) > USERS_MAX:
        raise Refused(f"has more than {USERS_MAX} users", node)
    for name, value in mapping.values.items():
        here = child(path, name)
        if not name or ":" in name or not name.isprintable():
            ctx.report(here, "must be a printable name without a colon", mapping.keys[name])
            continue
        text = attempt(_hash, value, here, ctx)
        if not isinstance(text, Failed):
            found[name] = text
    return MappingProxyType(found)


def _hash(node: Node, path: str, ctx: Context) -> Secret:
    """Its text is in no message: it may be a password."""
    match = _HASH.fullmatch(node.text) if isinstance(node, Scalar) else None
    if match is None:
        raise Refused("must be a bcrypt hash, such as htpasswd -nBC 10 NAME makes", node)
    if not 4 <= int(match[1]) <= MAX_COST:
        raise Refused(f"has cost {match[1]}, which must be from 04 to {MAX_COST}", node)
    return Secret(match[0])


def _no_users() -> Mapping[str, Secret]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """The whole file."""

    tls_server_config: Tls | None = setting(values.optional(reader_of(Tls)), None)
    http_server_config: Http = section(Http)
    basic_auth_users: Mapping[str, Secret] = setting(_users, factory=_no_users)
    rate_limit: None = setting(_unsupported("32 requests are answered at once, as always"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    """What the file at *path* says.

    Attributes:
      tls: TLS is spoken, and nothing else; None for plain HTTP.
      context: Made of *tls*, with the certificates of that moment.
      content: Equal as long as those are the same.
      headers: For all answers; one without a value is left out.
      users: The bcrypt hash of each one's password; nobody is asked for one if there are none.

    """

    path: Path
    tls: Tls | None = None
    context: ssl.SSLContext | None = field(default=None, compare=False, repr=False)
    content: str = ""
    headers: Mapping[str, str] = field(default_factory=_no_headers)
    users: Mapping[str, Secret] = field(default_factory=_no_users)


def web_config(node: Node, path: str, ctx: Context) -> WebConfig:
    """A reader of the file's path: problems in the file are reported with their places there."""
    file = values.existing_file(node, path, ctx)
    if ctx.secrets is Secrets.NONE:
        return WebConfig(path=file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        root = document.parse(text)
    except OSError as error:
        raise Refused(f"cannot read {file}: {error.strerror}", node) from None
    except ValueError:
        raise Refused(f"{file} is not UTF-8 text", node) from None
    except ConfigError as error:
        problem = ConfigError(error.key, error.problem, file=file, line=error.line, col=error.col)
        ctx.problems.append(problem)
        raise Reported from None
    root = root or Scalar("", plain=True, line=1, col=1)
    inner = replace(ctx, file=file, base=file.parent)
    found = attempt(reader_of(_File), root, "", inner)
    if isinstance(found, Failed):
        raise Reported
    tls = found.tls_server_config
    try:
        context, content = (None, "") if tls is None else (tls.context(), tls.content())
    except ConfigError as error:
        inner.report(error.key, error.problem, root)
        raise Reported from None
    except OSError as error:
        raise Refused(f"cannot read {error.filename}: {error.strerror}", node) from None
    return WebConfig(
        path=file,
        tls=tls,
        context=context,
        content=content,
        headers=found.http_server_config.headers,
        users=found.basic_auth_users,
    )
