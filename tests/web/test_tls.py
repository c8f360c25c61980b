"""TLS on our listener, over real loopback, with an authority of our own."""

from __future__ import annotations

import ssl
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
import trustme

from comfyd import config
from comfyd.config.web import WebConfig
from comfyd.web.serve import Tls, serve
from tests.web.test_serve import APP


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def folder(tmp_path: Path, authority: trustme.CA) -> Path:
    issued(tmp_path, authority)
    return tmp_path


def issued(folder: Path, authority: trustme.CA) -> None:
    cert = authority.issue_cert("127.0.0.1")
    cert.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(each.bytes() for each in cert.cert_chain_pems))


def loaded(folder: Path, more: str = "") -> WebConfig:
    text = f"tls_server_config: {{cert_file: cert.pem, key_file: key.pem{more}}}\n"
    (folder / "web.yml").write_text(text)
    made = config.parse("metrics: {web_config: web.yml}", file=None, base=folder)
    assert made.metrics.web_config is not None
    return made.metrics.web_config


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
async def served(nursery, folder):
    """The listener's port and its TLS."""
    tls, stop = Tls(loaded(folder).context), trio.Event()
    with trio.fail_after(20):
        _, port = await nursery.start(partial(serve, APP, "127.0.0.1", 0, stop=stop, tls=tls))
        yield port, tls
    stop.set()


async def get(port: int, context: ssl.SSLContext, scheme: str = "https") -> str:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(f"{scheme}://127.0.0.1:{port}/")).text


async def soon(port: int, context: ssl.SSLContext, scheme: str = "https") -> None:
    """Until it is answered so; a connection that the one before took ends as it began."""
    while True:
        try:
            assert await get(port, context, scheme) == "OK\n"
        except httpx.TransportError:
            await trio.sleep(0.02)
            continue
        return


async def test_who_trusts_the_authority_reads(served, authority):
    assert await get(served[0], trusting(authority)) == "OK\n"


async def test_who_does_not_reads_nothing_and_nor_does_plain_http(served, authority):
    with pytest.raises(httpx.ConnectError):
        await get(served[0], ssl.create_default_context())
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await get(served[0], trusting(authority), "http")
    assert await get(served[0], trusting(authority)) == "OK\n"


async def test_one_who_never_finishes_the_handshake_holds_nobody_up(served, authority):
    silent = [await trio.open_tcp_stream("127.0.0.1", served[0]) for _ in range(5)]
    assert await get(served[0], trusting(authority)) == "OK\n"
    for stream in silent:
        await stream.aclose()


async def test_certificates_are_renewed_under_way(served, authority, folder):
    port, tls = served
    before = loaded(folder)
    issued(folder, authority)
    after = loaded(folder)
    assert before != after  # the same names, other certificates: a reload sees it
    another = trustme.CA()
    issued(folder, another)
    tls.change(loaded(folder).context)
    await soon(port, trusting(another))
    tls.change(None)
    await soon(port, trusting(another), "http")


async def test_the_oldest_version_is_what_was_asked_for(nursery, folder, authority):
    stop, tls = trio.Event(), Tls(loaded(folder, ", min_version: TLS13").context)
    with trio.fail_after(20):
        _, port = await nursery.start(partial(serve, APP, "127.0.0.1", 0, stop=stop, tls=tls))
        old = trusting(authority)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.ConnectError):
            await get(port, old)
        assert await get(port, trusting(authority)) == "OK\n"
    stop.set()


async def test_client_certificates(nursery, folder, authority):
    clients = trustme.CA()
    clients.cert_pem.write_to_path(folder / "clients.pem")
    more = ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: clients.pem"
    stop, tls = trio.Event(), Tls(loaded(folder, more).context)
    with trio.fail_after(20):
        _, port = await nursery.start(partial(serve, APP, "127.0.0.1", 0, stop=stop, tls=tls))
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await get(port, trusting(authority))
        known = trusting(authority)
        clients.issue_cert("prometheus").configure_cert(known)
        assert await get(port, known) == "OK\n"
        stranger = trusting(authority)
        trustme.CA().issue_cert("prometheus").configure_cert(stranger)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await get(port, stranger)
    stop.set()
