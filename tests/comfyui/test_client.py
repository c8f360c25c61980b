"""The HTTP client against a server that misbehaves byte by byte. Real sockets, loopback only."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from comfyd.comfyui.client import Client
from comfyd.core.model import FileRef
from comfyd.errors import (
    ServerError,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)
from tests.comfyui.misbehaving import Peer, Script, always, closed_port, serving

P = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
REMAINING = b'{"exec_info":{"queue_remaining":2}}'
QUEUED = b'{"prompt_id":"p","number":1,"node_errors":{}}'
REF = FileRef(node="9", key="images", filename="a b&c.png", subfolder="s/t", type="temp")
PATIENCE_S = 10


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_S):
        yield


@asynccontextmanager
async def client_of(url: str, **more: Any) -> AsyncIterator[Client]:
    settings = {
        "connect_timeout_s": 1.0,
        "submit_timeout_s": 1.0,
        "history_timeout_s": 1.0,
        "health_timeout_s": 1.0,
        "upload_timeout_s": 1.0,
        "download_idle_timeout_s": 1.0,
    }
    client = Client(url, **{**settings, **more})
    try:
        yield client
    finally:
        await client.aclose()


async def test_each_method_asks_what_comfyui_answers() -> None:
    async with serving(always(b"{}")) as served, client_of(served.url + "/base/") as client:
        assert await client.history(P) is None
        await client.interrupt(P)
        await client.delete(P)
        for ask in (client.queue, client.remaining, client.system_stats):
            with pytest.raises(ServerProtocol):
                await ask()
    lines = [request.split(b"\r\n", 1)[0].decode() for request in served.requests]
    assert lines == [
        f"GET /base/history/{P} HTTP/1.1",
        "POST /base/interrupt HTTP/1.1",
        "POST /base/queue HTTP/1.1",
        "GET /base/queue HTTP/1.1",
        "GET /base/prompt HTTP/1.1",
        "GET /base/system_stats HTTP/1.1",
    ]
    assert served.requests[1].endswith(b'{"prompt_id":"%s"}' % P.encode())
    assert served.requests[2].endswith(b'{"delete":["%s"]}' % P.encode())
    assert served.connections == 1


async def test_the_headers_are_ours_and_no_browsers() -> None:
    headers = {"Authorization": "Bearer hunter2"}
    async with (
        serving(always(REMAINING, "200 OK", "Set-Cookie: a=b")) as served,
        client_of(served.url, headers=headers) as client,
    ):
        assert [await client.remaining(), await client.remaining()] == [2, 2]
    sent = served.requests[1].lower()
    assert b"authorization: bearer hunter2" in sent
    assert b"accept-encoding: identity" in sent
    for absent in (b"origin:", b"sec-fetch", b"cookie:", b"gzip"):
        assert absent not in sent


async def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with serving(always(REMAINING)) as served, client_of(served.url) as client:
        assert await client.remaining() == 2


# --- submit ---------------------------------------------------------------------------------------


async def test_submit_sends_the_body_as_it_is() -> None:
    async with serving(always(QUEUED)) as served, client_of(served.url) as client:
        assert (await client.submit(b'{"prompt": {}}')).prompt_id == "p"
    assert served.requests[0].endswith(b'\r\n\r\n{"prompt": {}}')
    assert b"content-type: application/json" in served.requests[0].lower()


async def hang_up(peer: Peer) -> None:
    await peer.request()


async def reset(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def hang(peer: Peer) -> None:
    await peer.request()
    await trio.sleep_forever()


async def half_an_answer(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


async def half_a_head(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-")


async def trickle(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        await peer.send(b" ")
        await trio.sleep(0.05)


async def not_http(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")


async def after_one_answer(peer: Peer) -> None:
    """Answer once, then close on the next request: a stale kept-alive connection."""
    await peer.request()
    await peer.answer(REMAINING)
    await peer.request()


@pytest.mark.parametrize(
    "script", [hang_up, reset, hang, half_an_answer, half_a_head, trickle, not_http]
)
async def test_a_submission_without_an_answer_is_unknown_and_never_repeated(script: Script) -> None:
    async with serving(script) as served, client_of(served.url, submit_timeout_s=0.3) as client:
        with pytest.raises(ServerUnreachable) as caught:
            await client.submit(b"{}")
    assert caught.value.sent
    assert len(served.requests) == 1


async def test_a_submission_on_a_stale_connection_is_unknown_too() -> None:
    async with serving(after_one_answer, always(QUEUED)) as served, client_of(served.url) as client:
        assert await client.remaining() == 2
        with pytest.raises(ServerUnreachable) as caught:
            await client.submit(b"{}")
    assert caught.value.sent
    assert served.connections == 1


async def test_refused_means_nothing_was_sent() -> None:
    for host in ("127.0.0.1", "localhost"):
        async with client_of(f"http://{host}:{closed_port()}") as client:
            with pytest.raises(ServerRefused, match="refused the connection"):
                await client.submit(b"{}")


async def test_a_server_that_went_away_between_two_requests_refuses() -> None:
    async with serving(always(REMAINING)) as served, client_of(served.url) as client:
        await client.remaining()
        url = served.url
    async with client_of(url) as client:
        with pytest.raises(ServerRefused):
            await client.submit(b"{}")


async def test_no_connection_in_time_means_nothing_was_sent() -> None:
    # A full backlog: the kernel takes no further connection, and refuses none.
    with trio.socket.socket() as full:
        await full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [trio.socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                with trio.move_on_after(0.05):
                    await filler.connect(("127.0.0.1", port))
            async with client_of(f"http://127.0.0.1:{port}", connect_timeout_s=0.2) as client:
                with pytest.raises(ServerUnreachable, match=r"no connection in 0\.2 s") as caught:
                    await client.submit(b"{}")
        finally:
            for filler in fillers:
                filler.close()
    assert not caught.value.sent


async def test_a_name_that_does_not_resolve_means_nothing_was_sent() -> None:
    async with client_of("http://no-such-host.invalid") as client:
        with pytest.raises(ServerUnreachable, match="cannot connect") as caught:
            await client.submit(b"{}")
    assert not caught.value.sent
    assert not isinstance(caught.value, ServerRefused)


async def test_tls_that_fails_means_nothing_was_sent() -> None:
    async def greet(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await trio.sleep(0.2)

    async with (
        serving(greet) as served,
        client_of(served.url.replace("http:", "https:")) as client,
    ):
        with pytest.raises(ServerUnreachable, match="cannot connect") as caught:
            await client.submit(b"{}")
    assert not caught.value.sent


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 413, 429, 500, 502, 503])
async def test_any_other_status_is_passed_on_with_its_body(status: int) -> None:
    script = always(b"why", f"{status} X", "Location: http://127.0.0.1:1/", "Retry-After: 7")
    async with serving(script) as served, client_of(served.url) as client:
        for ask in (lambda: client.submit(b"{}"), client.remaining, lambda: view(client)):
            with pytest.raises(ServerStatus) as caught:
                await ask()
            assert (caught.value.status, caught.value.body) == (status, "why")
            assert caught.value.retry_after_s == 7.0
    assert len(served.requests) == 3


async def test_a_refusal_keeps_its_whole_body_and_other_errors_a_start() -> None:
    async with (
        serving(always(b"x" * 100_000, "400 Bad Request")) as served,
        client_of(served.url) as client,
    ):
        with pytest.raises(ServerStatus) as caught:
            await client.submit(b"{}")
        assert len(caught.value.body) == 100_000
        with pytest.raises(ServerStatus) as caught:
            await client.queue()
        assert len(caught.value.body) == 2000


async def test_an_answer_before_the_body_was_sent_counts() -> None:
    """aiohttp answers 413 as soon as it has seen the length, and closes."""

    async def early(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.answer(b"too large", "413 Request Entity Too Large", "Connection: close")

    async with serving(early) as served, client_of(served.url) as client:
        with pytest.raises((ServerStatus, ServerUnreachable)) as caught:
            await client.submit(b"x" * 2**24)
    # A reset may overtake the answer; then the truth is: unknown.
    assert getattr(caught.value, "status", 413) == 413
    assert getattr(caught.value, "sent", True)


# --- questions ------------------------------------------------------------------------------------


async def test_a_question_on_a_stale_connection_is_asked_once_more() -> None:
    async with (
        serving(after_one_answer, always(REMAINING)) as served,
        client_of(served.url) as client,
    ):
        assert [await client.remaining(), await client.remaining()] == [2, 2]
    assert served.connections == 2
    assert len(served.requests) == 3


async def test_once_more_is_not_twice_more() -> None:
    async with serving(after_one_answer, hang_up) as served, client_of(served.url) as client:
        await client.remaining()
        with pytest.raises(ServerUnreachable):
            await client.remaining()
    assert served.connections == 2


async def test_a_fresh_connection_that_breaks_is_not_tried_again() -> None:
    async with serving(hang_up) as served, client_of(served.url) as client:
        with pytest.raises(ServerUnreachable):
            await client.remaining()
    assert served.connections == 1


@pytest.mark.parametrize("script", [hang, half_an_answer, half_a_head, trickle, not_http])
async def test_every_exchange_ends_in_time(script: Script) -> None:
    async with serving(script) as served, client_of(served.url, history_timeout_s=0.3) as client:
        started = trio.current_time()
        with pytest.raises(ServerUnreachable):
            await client.queue()
        assert trio.current_time() - started < 1.5


def endless(head: bytes, chunk: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        while True:
            await peer.send(chunk)

    return script


CHUNKED = endless(b"Transfer-Encoding: chunked\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n")
UNTIL_CLOSE = endless(b"", b"x" * 65536)
LYING = endless(b"Content-Length: 99999999999999\r\n", b"x" * 65536)


@pytest.mark.parametrize("script", [CHUNKED, UNTIL_CLOSE, LYING])
async def test_an_endless_answer_is_cut_off(script: Script) -> None:
    async with serving(script) as served, client_of(served.url, health_timeout_s=5.0) as client:
        with pytest.raises(ServerProtocol, match="longer than 1048576 bytes"):
            await client.remaining()


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate"])
async def test_compression_nobody_asked_for_is_refused(coding: str) -> None:
    async with (
        serving(always(REMAINING, "200 OK", f"Content-Encoding: {coding}")) as served,
        client_of(served.url) as client,
    ):
        for ask in (client.remaining, lambda: view(client)):
            with pytest.raises(ServerProtocol, match="compressed"):
                await ask()


async def test_large_answers_within_the_cap_are_read() -> None:
    graph = b'{"1":"' + b"x" * 3_000_000 + b'"}'
    body = b'{"queue_running":[[0,"r",%s,{}]],"queue_pending":[]}' % graph
    async with serving(always(body)) as served, client_of(served.url) as client:
        assert [item.prompt_id for item in (await client.queue()).running] == ["r"]


async def test_cancelled_requests_leave_the_client_usable() -> None:
    async def slow(peer: Peer) -> None:
        while await peer.request():
            await trio.sleep(0.03)
            await peer.answer(REMAINING)

    async with serving(slow) as served, client_of(served.url) as client:
        for _ in range(60):
            with trio.move_on_after(0.01):
                await client.remaining()
        assert await client.remaining() == 2


# --- downloads ------------------------------------------------------------------------------------


async def view(
    client: Client, sink: Callable[[bytes], object] = len, max_bytes: int = 2**30
) -> Any:
    return await client.view(REF, sink, max_bytes=max_bytes)


async def test_a_file_comes_whole_hashed_and_in_large_pieces() -> None:
    content = bytes(range(256)) * 5000
    pieces: list[bytes] = []
    async with serving(always(content)) as served, client_of(served.url) as client:
        got = await view(client, pieces.append)
    assert b"".join(pieces) == content
    assert (got.size_bytes, got.head) == (len(content), content[:512])
    assert got.sha256 == hashlib.sha256(content).hexdigest()
    assert min(map(len, pieces[:-1])) >= 256 * 1024
    line = served.requests[0].split(b"\r\n", 1)[0]
    assert line == b"GET /view?filename=a%20b%26c.png&type=temp&subfolder=s%2Ft HTTP/1.1"


async def test_an_empty_file_is_a_file() -> None:
    async with serving(always(b"")) as served, client_of(served.url) as client:
        got = await view(client)
    assert (got.size_bytes, got.head) == (0, b"")


async def test_chunked_files_are_whole_when_their_end_was_said() -> None:
    async def chunked(peer: Peer) -> None:
        await peer.request()
        await peer.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )
        await trio.sleep_forever()

    async with serving(chunked) as served, client_of(served.url) as client:
        assert (await view(client)).size_bytes == 3


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"Content-Length: 100\r\n", ServerUnreachable),
        (b"Transfer-Encoding: chunked\r\n", ServerUnreachable),
        (b"", ServerProtocol),  # ends with the connection: cut or whole, who knows
    ],
)
async def test_a_cut_file_is_no_file(head: bytes, error: type[ServerError]) -> None:
    async def cut(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n3\r\nabc\r\n")

    async with serving(cut) as served, client_of(served.url) as client:
        with pytest.raises(error):
            await view(client)


@pytest.mark.parametrize("script", [CHUNKED, LYING, always(b"x" * 1_000_001)])
async def test_a_file_over_the_limit_is_an_error(script: Script) -> None:
    got = bytearray()
    async with serving(script) as served, client_of(served.url) as client:
        with pytest.raises(ServerProtocol, match="longer than 1000000 bytes"):
            await view(client, got.extend, max_bytes=1_000_000)
    assert len(got) <= 1_000_000


async def test_a_download_may_take_long_but_not_pause_long() -> None:
    async def pausing(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5242880\r\n\r\n")
        for pause_s in (0.2, 0.2, 0.2, 0.2, 60):
            await peer.send(b"x" * 2**20)
            await trio.sleep(pause_s)

    async with serving(pausing) as served:
        async with client_of(served.url, download_idle_timeout_s=0.4) as client:
            started = trio.current_time()
            got = await view(client)
            assert got.size_bytes == 5 * 2**20
            assert trio.current_time() - started > 0.7
        async with client_of(served.url, download_idle_timeout_s=0.1) as client:
            with pytest.raises(ServerUnreachable, match="no answer"):
                await view(client)


async def test_a_slow_disk_is_not_the_servers_fault() -> None:
    import time

    async with (
        serving(always(b"x" * 2**20)) as served,
        client_of(served.url, download_idle_timeout_s=0.2) as client,
    ):
        got = await view(client, lambda _: time.sleep(0.25))
    assert got.size_bytes == 2**20


async def test_what_the_sink_raises_is_passed_on() -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with serving(always(b"x" * 2**20)) as served, client_of(served.url) as client:
        with pytest.raises(OSError, match="No space left"):
            await view(client, full)
        with pytest.raises(ServerProtocol):
            await client.remaining()  # the client still works: it got an answer


async def test_a_name_no_url_can_hold_is_the_servers_fault() -> None:
    ref = FileRef(node="1", key="k", filename="x" * 100_000)
    async with serving(always(b"")) as served, client_of(served.url) as client:
        with pytest.raises(ServerProtocol, match="URL"):
            await client.view(ref, len, max_bytes=1)


# --- uploads --------------------------------------------------------------------------------------


async def test_an_upload_is_one_multipart_file() -> None:
    reply = b'{"name":"up.png","subfolder":"","type":"input"}'
    async with serving(always(reply)) as served, client_of(served.url) as client:
        assert await client.upload("up.png", b"\x00\r\n--data") == "up.png"
        with pytest.raises(ValueError, match="not a name"):
            await client.upload('a"; filename="b', b"")
    head, _, body = served.requests[0].partition(b"\r\n\r\n")
    boundary = head.split(b"boundary=")[1].split(b"\r\n")[0]
    parts = body.split(b"--" + boundary)
    assert parts[0] == b""
    assert parts[1].startswith(
        b'\r\nContent-Disposition: form-data; name="image"; filename="up.png"'
    )
    assert parts[1].endswith(b"\r\n\r\n\x00\r\n--data\r\n")
    assert parts[2] == b"--\r\n"


# --- secrets --------------------------------------------------------------------


async def test_no_error_shows_a_secret() -> None:
    headers = {"Authorization": "Bearer hunter2"}
    for script in (hang_up, reset, hang, not_http, always(b"x"), always(b"", "401 No")):
        async with (
            serving(script) as served,
            client_of(served.url, headers=headers, health_timeout_s=0.2) as client,
        ):
            with pytest.raises(ServerError) as caught:
                await client.remaining()
            assert "hunter2" not in "".join(traceback.format_exception(caught.value))
            assert "hunter2" not in repr(client.endpoint)
