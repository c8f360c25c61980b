"""Reading a server's address, and telling a refused connection from any other that failed."""

from __future__ import annotations

import ssl
import traceback
from pathlib import Path

import pytest

from comfyd.comfyui.endpoint import Endpoint, connect_error
from comfyd.errors import ConfigError, ServerError, ServerRefused, ServerUnreachable


@pytest.mark.parametrize(
    ("url", "base_url", "authority"),
    [
        ("http://127.0.0.1:8188", "http://127.0.0.1:8188", "127.0.0.1:8188"),
        ("http://Host/", "http://host", "host"),
        ("https://host:443/a/b/", "https://host/a/b", "host"),
        ("https://host:80", "https://host:80", "host:80"),
        ("http://[::1]:8188", "http://[::1]:8188", "[::1]:8188"),
    ],
)
def test_addresses(url: str, base_url: str, authority: str) -> None:
    endpoint = Endpoint.parse(url)
    assert (endpoint.base_url, endpoint.authority) == (base_url, authority)


def test_a_repr_shows_no_header() -> None:
    assert "hunter2" not in repr(Endpoint.parse("http://h", {"Authorization": "hunter2"}))


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("ftp://host", "url"),
        ("http://", "url"),
        ("localhost:8188", "url"),
        ("http://host:99999", "url"),
        ("http://user:hunter2@host", "url"),
        ("http://host/?q=1", "url"),
        ("http://" + "a" * 70, "url"),
    ],
)
def test_unusable_urls_are_configuration_errors(url: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse(url)
    assert caught.value.key == key
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", "hunter2\r\nX: y"),
        ("Authorization", "hunter2\n"),
        ("Authorization", "hunter2é"),
        ("Authorization", ""),
        ("Bad Name", "hunter2"),
        ("Host", "hunter2"),
        ("Origin", "hunter2"),
        ("Sec-Fetch-Site", "hunter2"),
    ],
)
def test_headers_that_cannot_be_sent_are_named_without_their_value(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse("http://h", {name: value})
    assert name in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_ca_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ca_file"):
        Endpoint.parse("https://h", ca_file=tmp_path / "none.pem").ssl_context()


def test_refused_is_only_what_every_address_refused() -> None:
    def told(*causes: Exception) -> ServerError:
        error = OSError("all attempts to connect failed")
        error.__cause__ = ExceptionGroup("all failed", causes) if causes[1:] else causes[0]
        wrapped = RuntimeError("by a library")
        wrapped.__context__ = error
        return connect_error("h:1", wrapped)

    refused = ConnectionRefusedError(111, "Connection refused")
    no_v6 = OSError(99, "Cannot assign requested address")
    timed_out = TimeoutError(110, "Connection timed out")
    assert isinstance(told(refused), ServerRefused)
    assert isinstance(told(refused, refused), ServerRefused)
    assert isinstance(told(no_v6, refused), ServerRefused)
    for causes in ((timed_out,), (refused, timed_out), (no_v6,), (refused, ssl.SSLError("x"))):
        error = told(*causes)
        assert isinstance(error, ServerUnreachable)
        assert not error.sent
