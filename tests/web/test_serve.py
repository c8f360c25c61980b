"""The listener over real loopback: it starts, stops, and lives through what clients do to it."""

from __future__ import annotations

import logging
import socket

import httpx
import hypercorn.trio
import pytest
import trio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from structlog.testing import capture_logs

from comfyd.errors import ConfigError
from comfyd.web import serve as serving
from comfyd.web.serve import bind, serve

LARGE = "x" * 16_000_000  # more than two sockets hold together


async def small(request):
    return PlainTextResponse("OK\n")


async def large(request):
    return PlainTextResponse(LARGE)


async def bug(request):
    raise KeyError("bug")


APP = Starlette(routes=[Route("/", small), Route("/large", large), Route("/bug", bug)])


@pytest.fixture
async def listener(nursery):
    stop = trio.Event()
    with trio.fail_after(10):
        yield await nursery.start(_serve, stop)
    stop.set()


async def _serve(stop, *, task_status=trio.TASK_STATUS_IGNORED):
    await serve(APP, "127.0.0.1", 0, stop=stop, task_status=task_status)


def url(listener, path="/"):
    host, port = listener
    return f"http://{host}:{port}{path}"


async def test_it_answers_where_it_says(listener):
    assert listener[0] == "127.0.0.1"
    async with httpx.AsyncClient() as client:
        answer = await client.get(url(listener))
    assert answer.text == "OK\n"
    assert "server" not in answer.headers


async def test_it_ends_when_told_and_frees_its_port(nursery):
    stop, ended = trio.Event(), trio.Event()

    async def serve_and_tell(task_status):
        await serve(APP, "127.0.0.1", 0, stop=stop, task_status=task_status)
        ended.set()

    with trio.fail_after(10):
        address = await nursery.start(serve_and_tell)
        async with httpx.AsyncClient() as client:
            await client.get(url(address))
        stop.set()
        await ended.wait()
    with await bind(*address):
        pass


async def test_it_ends_when_cancelled(nursery):
    with trio.fail_after(10):
        async with trio.open_nursery() as inner:
            address = await inner.start(_serve, trio.Event())
            inner.cancel_scope.cancel()
    with await bind(*address):
        pass


async def test_a_reader_that_takes_nothing_does_not_keep_it_from_ending(monkeypatch, nursery):
    async def hang_up_at_last(stream):
        await trio.sleep(8)
        await stream.aclose()

    monkeypatch.setattr(serving, "WRITE_S", 0.5)
    async with trio.open_nursery() as inner:
        address = await inner.start(_serve, trio.Event())
        stream = await trio.open_tcp_stream(*address)
        nursery.start_soon(hang_up_at_last, stream)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        while b"xxx" not in await stream.receive_some(100):
            pass
        await trio.sleep(0.2)  # by now both sockets are full
        inner.cancel_scope.cancel()
        started_s = trio.current_time()
    assert trio.current_time() - started_s < 5
    await stream.aclose()


async def test_nonsense_during_a_large_answer(listener):
    async with await trio.open_tcp_stream(*listener) as stream:
        await stream.send_all(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert await stream.receive_some(100)
        await stream.send_all(b"garbage\r\n\r\n" * 100)
        await trio.sleep(0.1)
    async with httpx.AsyncClient(timeout=8) as client:
        assert (await client.get(url(listener))).text == "OK\n"


async def test_a_server_that_fails_as_a_whole_is_started_again(nursery, monkeypatch):
    real, starts = hypercorn.trio.serve, []

    async def fails_at_first(app, config, **more):
        starts.append(trio.current_time())
        if len(starts) < 3:
            config.create_sockets().insecure_sockets[0].close()
            raise ExceptionGroup("nursery", [trio.BusyResourceError("sending")])
        await real(app, config, **more)

    monkeypatch.setattr(hypercorn.trio, "serve", fails_at_first)
    monkeypatch.setattr(serving, "AGAIN_S", 0.05)
    stop = trio.Event()
    with trio.fail_after(10), capture_logs() as told:
        address = await nursery.start(_serve, stop)
        async with httpx.AsyncClient() as client:
            assert (await client.get(url(address))).text == "OK\n"  # it waited in the backlog
        stop.set()
    assert len(starts) == 3
    assert [each["event"] for each in told] == ["http_restarts"] * 2


async def test_a_failing_server_can_be_stopped(nursery, monkeypatch):
    async def fails(app, config, **more):
        await trio.lowlevel.checkpoint()
        raise RuntimeError("always")

    monkeypatch.setattr(hypercorn.trio, "serve", fails)
    stop = trio.Event()
    with trio.fail_after(5):
        async with trio.open_nursery() as inner:
            await inner.start(_serve, stop)
            stop.set()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: !!\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000,
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"",
    ],
    ids=range(10),
)
@pytest.mark.parametrize("reset", [False, True])
async def test_it_lives_through_nonsense(listener, sent, reset):
    async with await trio.open_tcp_stream(*listener) as stream:
        try:
            await stream.send_all(sent)
            await stream.send_eof()
            with trio.move_on_after(0.05):
                await stream.receive_some()
        except trio.BrokenResourceError:
            pass  # it may hang up on us at any point
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    async with httpx.AsyncClient(timeout=8) as client:
        assert (await client.get(url(listener))).text == "OK\n"


async def test_a_bug_of_ours_is_logged_once_and_the_rest_goes_on(listener, caplog):
    async with httpx.AsyncClient() as client:
        assert (await client.get(url(listener, "/bug"))).status_code == 500
        assert (await client.get(url(listener))).status_code == 200
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.name for record in errors] == ["comfyd.web.hypercorn"]


async def test_nothing_is_logged_of_a_good_request(listener, caplog, capfd):
    caplog.set_level(logging.INFO, logger="comfyd")
    async with httpx.AsyncClient() as client:
        await client.get(url(listener, "/?token=secret"), headers={"authorization": "secret"})
    assert [record for record in caplog.records if record.name.startswith("comfyd")] == []
    assert capfd.readouterr() == ("", "")


async def test_a_slow_head_is_not_waited_for(nursery, monkeypatch):
    monkeypatch.setattr(serving, "IDLE_S", 0.2)
    stop = trio.Event()
    with trio.fail_after(5):
        address = await nursery.start(_serve, stop)
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost:")
            assert await stream.receive_some() == b""
        stop.set()


async def test_a_taken_port_is_a_sentence():
    with await bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken") as caught:
            await serve(APP, "127.0.0.1", port, stop=trio.Event())
    assert caught.value.key == "metrics.listen"


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", "is no address of this machine"),  # TEST-NET-1, never ours
        ("no.such.host.invalid", "is not known here"),
    ],
)
async def test_an_impossible_address_is_a_sentence(host, says):
    with trio.fail_after(20), pytest.raises(ConfigError, match=says):
        await bind(host, 0)


async def test_a_name_and_ipv6_will_do():
    with await bind("localhost", 0):
        pass
    if socket.has_ipv6:
        try:
            with await bind("::1", 0) as sock:
                assert sock.family == socket.AF_INET6
        except ConfigError:
            pytest.skip("this machine has no ::1")
