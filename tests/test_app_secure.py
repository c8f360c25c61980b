"""The composed daemon with TLS and secrets: towards servers, and on its own listener."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import bcrypt
import httpx
import pytest
import trio
import trustme

from comfyd import app, config
from comfyd.spool.layout import Spool, drop
from comfyd.web.control_client import ask
from tests.services.front import Front
from tests.test_app import GRAPH, until

TOKEN = "Bearer hunter2"


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


def speaking(authority: trustme.CA) -> ssl.SSLContext:
    """TLS of a server on 127.0.0.1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def write(folder: Path, url: str, *more: str) -> Path:
    (folder / "token").write_text(f"{TOKEN}\n")
    headers = "headers: {Authorization: {file: token}}"
    tls = ", ca_file: ca.pem" if url.startswith("https") else ""
    lines = [
        f"servers: [{{name: s, url: '{url}', {headers}{tls}}}]",
        "outputs: {min_free_bytes: 1MiB}",
        "tracker: {reconnect_first: 50ms, reconnect_max: 200ms}",
        "health: {interval: 100ms}",
        *(more or ["metrics: {listen: 127.0.0.1:0}"]),
    ]
    path = folder / "comfyd.yaml"
    path.write_text("\n".join(lines))
    return path


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[app.Daemon]:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            reread = partial(config.read, path)
            started = partial(app.run, config.load(path), reread=reread)
            daemon: app.Daemon = await nursery.start(started)
            yield daemon
            daemon.stop()


async def reload(path: Path) -> None:
    asked = partial(ask, config.state_of(path) / "control.sock", {"verb": "reload"}, 20.0)
    answer = await trio.to_thread.run_sync(asked)
    assert answer["result"]["ok"], answer


@pytest.mark.parametrize("tls", [True, False])
async def test_a_job_goes_through_with_credentials_on_every_request(tmp_path, authority, tls):
    async with Front.serving(speaking(authority) if tls else None) as front:
        path = write(tmp_path, front.url)
        spool = Spool(tmp_path / "spool")
        async with running(path):
            data = json.dumps(GRAPH).encode()
            job = await trio.to_thread.run_sync(drop, spool, "fox.json", data)
            await until((spool.done / job / "result.json").exists)
        result = json.loads((spool.done / job / "result.json").read_bytes())
        assert result["completion"] == "signal"  # so the WebSocket was up
    heads = [
        head
        for stream in front.streams
        for head in stream.received.split(b"\r\n\r\n")
        if b" HTTP/1.1\r\n" in head
    ]
    for route in (b"GET /ws?", b"POST /prompt ", b"GET /history/", b"GET /view?", b"GET /prompt "):
        assert any(route in head for head in heads), route
    assert all(b"authorization: bearer hunter2" in head.lower() for head in heads)
    assert not any(b"sec-websocket-extensions" in head.lower() for head in heads)  # no deflate
    assert "hunter2" not in (spool.done / job / "result.json").read_text()


async def test_nothing_is_told_to_a_server_that_nobody_vouches_for(tmp_path, authority):
    async with Front.serving(speaking(trustme.CA())) as front:
        async with running(write(tmp_path, front.url)) as daemon:
            while True:
                (server,) = (await daemon.snapshot()).servers
                if "certificate not trusted" in server.reason and len(front.streams) > 3:
                    break
                await trio.sleep(0.02)
            assert (server.state.value, server.connected) == ("down", False)
        assert b"".join(stream.received for stream in front.streams) == b""


async def test_a_certificate_for_another_host_is_none(tmp_path, authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("gpu.example").configure_cert(context)
    async with Front.serving(context) as front:
        async with running(write(tmp_path, front.url)) as daemon:
            while not (server := (await daemon.snapshot()).servers[0]).reason.count("trusted"):  # noqa: ASYNC110 - a snapshot tells nobody
                await trio.sleep(0.02)
        assert "IP address mismatch" in server.reason
        assert b"".join(stream.received for stream in front.streams) == b""


async def test_a_new_token_and_a_new_authority_hold_after_a_reload(tmp_path, authority):
    async with Front.serving(speaking(authority)) as front:
        path = write(tmp_path, front.url)
        trustme.CA().cert_pem.write_to_path(tmp_path / "wrong.pem")
        path.write_text(path.read_text().replace("ca.pem", "wrong.pem"))
        async with running(path) as daemon:
            write(tmp_path, front.url)
            (tmp_path / "token").write_text("Bearer new")
            await reload(path)
            while not (await daemon.snapshot()).servers[0].connected:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.02)
        (request,) = front.requests(b"GET /ws")
        assert b"authorization: bearer new" in request.lower()


async def test_an_authority_that_is_renewed_in_its_place_holds_after_a_reload(tmp_path, authority):
    """Nothing else changes: no name, and no token."""
    async with Front.serving(speaking(authority)) as front:
        path = write(tmp_path, front.url)
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        async with running(path) as daemon:
            while "not trusted" not in (await daemon.snapshot()).servers[0].reason:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.02)
            authority.cert_pem.write_to_path(tmp_path / "ca.pem")
            await reload(path)
            while not (await daemon.snapshot()).servers[0].connected:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.02)


async def test_the_listener_takes_up_tls_and_passwords_with_a_reload(tmp_path, authority):
    cert = authority.issue_cert("127.0.0.1")
    cert.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    web = tmp_path / "web.yml"

    def protect(password: str) -> None:
        hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
        web.write_text(
            "tls_server_config: {cert_file: both.pem, key_file: both.pem}\n"
            f"basic_auth_users: {{prometheus: {hashed}}}\n"
        )

    async def healthy(daemon: app.Daemon, password: str) -> int:
        async with httpx.AsyncClient(verify=context, auth=("prometheus", password)) as client:
            return (await client.get(f"{daemon.http_url}/-/healthy")).status_code

    protect("fox")
    listen = "metrics: {listen: 127.0.0.1:0, web_config: web.yml}"
    path = write(tmp_path, "http://127.0.0.1:9", listen)
    async with running(path) as daemon:
        assert daemon.http_url.startswith("https://")
        assert await healthy(daemon, "fox") == 200
        assert await healthy(daemon, "vixen") == 401
        protect("vixen")
        await reload(path)
        while True:
            try:
                assert await healthy(daemon, "vixen") == 200
            except httpx.TransportError:  # as the listener changes over
                continue
            break
        assert await healthy(daemon, "fox") == 401
        web.write_text("basic_auth_users: {prometheus: fox}\n")
        asked = partial(ask, tmp_path / "state" / "control.sock", {"verb": "reload"}, 20.0)
        answer = await trio.to_thread.run_sync(asked)
        assert f"{web}:1:32: basic_auth_users.prometheus: " in answer["result"]["problems"][0]
        assert await healthy(daemon, "vixen") == 200
