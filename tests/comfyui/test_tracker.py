"""The tracker against the library's own server end, over memory, on a clock that jumps."""

from __future__ import annotations

import gc
import json
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from ssl import SSLContext
from typing import Any, cast

import pytest
import trio
import trio_websocket as tws
from trio.testing import MockClock, memory_stream_pair

from comfyd.comfyui import tracker as tracker_module
from comfyd.comfyui.listener import Timings
from comfyd.comfyui.tracker import Tracker
from comfyd.errors import ServerUnreachable
from tests.comfyui.log import Log
from tests.comfyui.misbehaving import closed_port

P = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
TIMINGS = Timings()


class Server:
    """Plays one script a connection: the nth connection gets the nth, later ones the last."""

    def __init__(self, nursery: trio.Nursery, *scripts: Callable[[Any], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._scripts = scripts
        self.connections = 0
        self.remaining: Callable[[], int | Exception] = lambda: 0
        self.asked: list[float] = []

    async def open_stream(
        self, host: str, port: int, context: SSLContext | None
    ) -> trio.abc.Stream:
        assert (host, port, context) == ("comfy", 8188, None)
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(script, theirs)
        await trio.lowlevel.checkpoint()
        return ours

    async def ask(self) -> int:
        self.asked.append(trio.current_time())
        await trio.sleep(0.01)
        answer = self.remaining()
        if isinstance(answer, Exception):
            raise answer
        return answer


def said(type_: str, **data: Any) -> str:
    return json.dumps({"type": type_, "data": data})


def status(remaining: int, **more: Any) -> str:
    return said("status", status={"exec_info": {"queue_remaining": remaining}}, **more)


class Socket:
    """The server's end after the upgrade, its greeting sent."""

    def __init__(self, ws: tws.WebSocketConnection, client_id: str) -> None:
        self.ws = ws
        self.client_id = client_id

    async def say(self, *messages: str | bytes) -> None:
        for message in messages:
            await self.ws.send_message(message)


def greeting(
    then: Callable[[Socket], Awaitable[None]], *, sid: str | None = None
) -> Callable[[trio.abc.Stream], Awaitable[None]]:
    """A script: upgrade, greet, and go on with *then*; at its end the stream is cut."""

    async def script(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            client_id = request.path.partition("clientId=")[2]
            ws = await request.accept()
            await ws.send_message(status(0, sid=sid or client_id))
            with suppress(tws.ConnectionClosed):  # the client left first
                await then(Socket(ws, client_id))
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)

    return script


async def stay(_: Any) -> None:
    await trio.sleep_forever()


def track(server: Server, log: Log, timings: Timings = TIMINGS, u: float = 0.0) -> Tracker:
    return Tracker(
        "http://comfy:8188/base",
        headers={"Authorization": "Bearer hunter2"},
        timings=timings,
        ask_remaining=server.ask,
        listener=log,
        now_s=trio.current_time,
        u=lambda: u,
        open_stream=server.open_stream,
    )


def shown(tracker: Tracker) -> str:
    return tracker.state


class Rig:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.log = Log()

    def start(self, *scripts: Callable[[Any], Awaitable[None]], **more: Any) -> Tracker:
        self.server = Server(self._nursery, *scripts)
        self.tracker = track(self.server, self.log, **more)
        self._nursery.start_soon(self.tracker.run)
        return self.tracker


@pytest.fixture
async def rig(nursery: trio.Nursery) -> Rig:
    return Rig(nursery)


# --- a healthy connection -------------------------------------------------------------------------


async def test_messages_become_hints_in_order(rig: Rig, autojump_clock: MockClock) -> None:
    async def then(socket: Socket) -> None:
        await socket.say(
            status(1),
            said("execution_start", prompt_id=P),
            b"\x00\x00\x00\x01preview",
            said("progress", prompt_id=P, value=1, max=2),
            said("crystools.monitor"),
            said("execution_error", prompt_id=P, exception_type="ExecutionBlocked"),
            said("execution_success", prompt_id=P),
            status(0),
            said("executing", prompt_id=P, node=None),
        )
        await stay(socket)

    tracker = rig.start(greeting(then))
    await trio.sleep(1)
    client_id = rig.log.values("connected")[0]
    assert [(what, value) for _, what, value in rig.log.told] == [
        ("message", "status"),
        ("remaining", 0),
        ("result", "ok"),
        ("connected", client_id),
        ("message", "status"),
        ("remaining", 1),
        ("message", "execution_start"),
        ("hint", (P, "alive")),
        ("progress", (P, "execution_start", {"prompt_id": P})),
        ("message", "binary"),
        ("message", "progress"),
        ("hint", (P, "alive")),
        ("progress", (P, "progress", {"prompt_id": P, "value": 1, "max": 2})),
        ("message", "other"),
        ("message", "execution_error"),
        ("hint", (P, "alive")),
        (
            "progress",
            (P, "execution_error", {"prompt_id": P, "exception_type": "ExecutionBlocked"}),
        ),
        ("message", "execution_success"),
        ("hint", (P, "ending")),
        ("message", "status"),
        ("remaining", 0),
        ("message", "executing"),
        ("hint", (P, "ended")),
    ]
    assert shown(tracker) == "connected"
    assert tracker.problem == ""


async def test_the_request_names_path_client_and_headers_but_no_origin(
    rig: Rig, autojump_clock: MockClock
) -> None:
    asked: list[bytes] = []

    async def listen(stream: trio.abc.Stream) -> None:
        asked.append(bytes(await stream.receive_some()))
        await trio.sleep_forever()

    rig.start(listen)
    await trio.sleep(1)
    head = asked[0].lower()
    assert head.startswith(b"get /base/ws?clientid=")
    assert b"host: comfy:8188\r\n" in head
    assert b"authorization: bearer hunter2\r\n" in head
    assert b"origin" not in head


async def test_large_messages_are_taken(rig: Rig, autojump_clock: MockClock) -> None:
    async def then(socket: Socket) -> None:
        await socket.say(said("executed", prompt_id=P, output={"text": ["x" * 5_000_000]}))
        await stay(socket)

    rig.start(greeting(then))
    await trio.sleep(1)
    assert rig.log.values("hint") == [(P, "alive")]


async def test_invalid_messages_are_counted_all_and_logged_once_a_minute(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async def then(socket: Socket) -> None:
        await socket.say(said("executing", node="4"))  # what a reconnect may bring
        for _ in range(7):
            await socket.say(said("executing", prompt_id=7, node=None), "{", status(0))
            await trio.sleep(10)
        await stay(socket)

    rig.start(greeting(then))
    await trio.sleep(100)
    assert rig.log.values("message").count("invalid") == 15
    assert rig.log.of("invalid") == [
        (0, "invalid", ("executing", True)),
        (60, "invalid", ("executing", True)),
    ]
    assert rig.log.values("hint") == []
    assert rig.log.values("disconnected") == []


async def test_idle_connections_last(rig: Rig, autojump_clock: MockClock) -> None:
    rig.start(greeting(stay))
    await trio.sleep(10_000)
    assert rig.log.values("disconnected") == []
    assert rig.server.connections == 1


# --- connecting -----------------------------------------------------------------------------------


async def test_a_stream_that_never_opens_times_out(rig: Rig, autojump_clock: MockClock) -> None:
    tracker = rig.start(stay)

    async def never(*_: object) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    tracker._open_stream = never
    await trio.sleep(10.2)
    assert rig.log.told == [(10, "result", "timeout")]
    assert shown(tracker) == "backoff"
    assert "took no connection" in tracker.problem


async def test_a_server_that_takes_the_connection_and_says_nothing_times_out(
    rig: Rig, autojump_clock: MockClock
) -> None:
    rig.start(stay)
    await trio.sleep(10.2)
    assert rig.log.told == [(10, "result", "timeout")]


async def test_a_server_that_upgrades_and_does_not_greet_times_out(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async def upgrade(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            ws = await request.accept()
            await ws.send_message(said("executing", node="4"))
            await ws.send_message(status(3))

    rig.start(upgrade)
    await trio.sleep(10.2)
    assert rig.log.of("result", "connected") == [(10, "result", "timeout")]


async def test_a_greeting_of_somebody_else_is_an_error(rig: Rig, autojump_clock: MockClock) -> None:
    rig.start(greeting(stay, sid="another"))
    await trio.sleep(0.2)
    assert rig.log.of("result", "connected") == [(0, "result", "error")]


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (b"", "error"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "rejected"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "rejected"),
        (b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", "rejected"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 100\r\n\r\ncut", "rejected"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
            "rejected",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "rejected"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "error"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "error"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 400_000, "rejected"),
    ],
)
async def test_a_handshake_that_fails_is_seen_at_once(
    rig: Rig, autojump_clock: MockClock, answer: bytes, result: str
) -> None:
    async def refuse(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        await trio.aclose_forcefully(stream)

    tracker = rig.start(refuse)
    await trio.sleep(0.2)
    assert rig.log.told == [(0, "result", result)]
    assert tracker.problem
    assert "hunter2" not in tracker.problem


async def test_refused_is_told_from_unreachable(rig: Rig, autojump_clock: MockClock) -> None:
    tracker = rig.start(stay)
    errors: list[OSError] = [
        ConnectionRefusedError(111, "Connection refused"),
        OSError(113, "No route"),
    ]

    async def fail(*_: object) -> trio.abc.Stream:
        raise errors.pop(0) if errors else OSError(113, "No route")

    tracker._open_stream = fail
    await trio.sleep(1.2)
    assert rig.log.values("result")[:2] == ["refused", "error"]


async def test_every_attempt_has_a_client_id_of_its_own(
    rig: Rig, autojump_clock: MockClock
) -> None:
    seen: list[str] = []

    async def mute(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            seen.append(request.path)
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)

    async def hang_up(socket: Socket) -> None:
        seen.append("/base/ws?clientId=" + socket.client_id)

    rig.start(mute, greeting(hang_up), mute, greeting(hang_up))
    await trio.sleep(100)
    assert len(seen) > 5
    assert len(set(seen)) == len(seen)


async def test_waits_double_and_only_a_lasting_connection_resets_them(
    rig: Rig, autojump_clock: MockClock
) -> None:
    times: list[float] = []

    def lasting(lifetime_s: float) -> Callable[[Any], Awaitable[None]]:
        async def then(_: Socket) -> None:
            times.append(trio.current_time())
            await trio.sleep(lifetime_s)

        return greeting(then)

    rig.start(*(lasting(s) for s in (0, 0, 0, 29, 0, 0, 0, 0, 31, 0, 0, 1000)))
    await trio.sleep(400)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx([0.5, 1, 2, 29 + 4, 8, 16, 30, 30, 31 + 0.5, 1, 2], abs=0.1)
    assert set(rig.log.values("disconnected")) == {"closed"}


async def test_a_server_that_is_back_is_connected_to_without_waiting(
    rig: Rig, autojump_clock: MockClock
) -> None:
    times: list[float] = []

    async def hang_up(_: Socket) -> None:
        times.append(trio.current_time())

    tracker = rig.start(greeting(hang_up))
    await trio.sleep(40)  # in the middle of a wait of 16 s
    told = trio.current_time()
    before = len(times)
    tracker.answers()
    await trio.sleep(3)
    gaps = [at - told for at in times[before:]]
    assert gaps == pytest.approx([0, 0.5, 1.5], abs=0.1)  # and it is not hammered


# --- losing it ------------------------------------------------------------------------------------


async def test_a_peer_that_never_answers_pings_is_lost(rig: Rig, autojump_clock: MockClock) -> None:
    async def mute(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            client_id = request.path.partition("clientId=")[2]
            ws = await request.accept()
            await ws.send_message(status(0, sid=client_id))
            nursery.cancel_scope.cancel()  # nobody reads from now on

    rig.start(mute)
    await trio.sleep(40.2)
    assert rig.log.of("disconnected") == [(40, "disconnected", "ping_timeout")]


async def test_a_pong_behind_a_slow_message_is_waited_for(
    rig: Rig, autojump_clock: MockClock
) -> None:
    message = said("executed", prompt_id=P, output="x" * 400_000).encode()
    head = b"\x81\x7f" + len(message).to_bytes(8, "big")

    async def slow(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            client_id = request.path.partition("clientId=")[2]
            ws = await request.accept()
            await ws.send_message(status(0, sid=client_id))
            nursery.cancel_scope.cancel()
        frame = head + message
        for at in range(0, len(frame), 40_000):
            await stream.send_all(frame[at : at + 40_000])
            await trio.sleep(15)  # 150 s together
        await trio.sleep_forever()

    rig.start(slow)
    await trio.sleep(171)
    assert rig.log.values("hint") == [(P, "alive")]
    assert [when for when, *_ in rig.log.of("disconnected")] == [170]  # 20 s after the last byte


async def test_a_message_beyond_the_limit_is_an_error(
    rig: Rig, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_MESSAGE_BYTES", 1000)

    async def then(socket: Socket) -> None:
        await socket.say(said("executed", prompt_id=P, output="x" * 2000))
        await stay(socket)

    rig.start(greeting(then))
    await trio.sleep(0.2)
    assert rig.log.values("disconnected") == ["error"]


@pytest.mark.parametrize(
    ("garbage", "cause"),
    [(b"\xff\xff\xff\xff", "error"), (b"\x81\x02\xff\xff", "error"), (b"", "closed")],
)
async def test_garbage_ends_the_connection(
    rig: Rig, autojump_clock: MockClock, garbage: bytes, cause: str
) -> None:
    async def spit(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            client_id = request.path.partition("clientId=")[2]
            ws = await request.accept()
            await ws.send_message(status(0, sid=client_id))
            nursery.cancel_scope.cancel()
        await stream.send_all(garbage)
        await trio.aclose_forcefully(stream)

    rig.start(spit)
    await trio.sleep(0.2)
    assert rig.log.of("disconnected") == [(0, "disconnected", cause)]


async def test_a_bug_in_the_listener_is_not_survived(
    autojump_clock: MockClock,
) -> None:
    class Buggy(Log):
        def on_remaining(self, remaining: int) -> None:
            raise OSError("a bug, and not the network")

    async with trio.open_nursery() as nursery:
        server = Server(nursery, greeting(stay))
        with pytest.RaisesGroup(OSError, flatten_subgroups=True, allow_unwrapped=True):
            await track(server, Buggy()).run()
        nursery.cancel_scope.cancel()


async def test_it_is_on_time_whatever_servers_do(rig: Rig, autojump_clock: MockClock) -> None:
    async def hang_up(stream: trio.abc.Stream) -> None:
        await trio.aclose_forcefully(stream)

    async def leave(_: Socket) -> None:
        await trio.sleep(5)

    tracker = rig.start(hang_up, stay, greeting(leave), hang_up, greeting(leave), u=0.999)
    seen = set()
    for _ in range(600):
        await trio.sleep(1)
        seen.add(tracker.state)
        assert tracker.on_time(), tracker.state
    assert seen == {"connecting", "connected", "backoff"}


async def test_a_task_that_hangs_is_late(rig: Rig, autojump_clock: MockClock) -> None:
    tracker = rig.start(stay)

    async def hang(*_: object) -> trio.abc.Stream:
        with trio.CancelScope(shield=True):
            await let_go.wait()
        raise ServerUnreachable("let go")

    let_go = trio.Event()
    tracker._open_stream = hang
    await trio.sleep(15)
    assert tracker.on_time()
    await trio.sleep(10)
    assert not tracker.on_time()
    let_go.set()
    await trio.sleep(0.1)
    assert tracker.on_time()


async def test_cancellation_ends_it_at_once(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        log = Log()
        with trio.move_on_after(5) as scope:
            await track(Server(nursery, greeting(stay)), log).run()
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(5, abs=0.01)
        assert log.values("disconnected") == []
        nursery.cancel_scope.cancel()


# --- deafness -------------------------------------------------------------------------------------


async def test_a_submission_nobody_tells_us_of_means_deaf(
    rig: Rig, autojump_clock: MockClock
) -> None:
    tracker = rig.start(greeting(stay))
    rig.server.remaining = lambda: 1
    await trio.sleep(1)
    tracker.posted()
    await trio.sleep(6)
    (at_s, _, cause) = rig.log.of("disconnected")[0]
    assert cause == "deaf"
    assert at_s == pytest.approx(6, abs=0.1)
    assert rig.log.values("remaining")[1:3] == [1, 1]
    assert len(set(rig.log.values("connected"))) == 2
    assert rig.log.values("stalled") == []


async def test_a_submission_told_before_or_after_the_answer_is_heard(
    rig: Rig, autojump_clock: MockClock
) -> None:
    async def then(socket: Socket) -> None:
        await trio.sleep(1)
        await socket.say(status(1))
        await trio.sleep(11)
        await socket.say(status(2))
        await stay(socket)

    tracker = rig.start(greeting(then))
    rig.server.remaining = lambda: 1 if trio.current_time() < 12 else 2
    await trio.sleep(1.5)
    tracker.posted()
    await trio.sleep(8)
    tracker.posted()
    await trio.sleep(100)
    assert rig.log.values("disconnected") == []


async def test_a_count_that_stays_wrong_means_deaf(rig: Rig, autojump_clock: MockClock) -> None:
    rig.start(greeting(stay))
    rig.server.remaining = lambda: 3
    await trio.sleep(45)
    assert [round(when) for when, *_ in rig.log.of("disconnected")] == [40]
    assert rig.log.values("disconnected") == ["deaf"]


@pytest.mark.parametrize("failure", ["error", "slow"])
async def test_without_a_prompt_answer_nobody_is_judged(
    rig: Rig, autojump_clock: MockClock, failure: str
) -> None:
    tracker = rig.start(greeting(stay))
    rig.server.remaining = lambda: ServerUnreachable("no answer")
    if failure == "slow":

        async def slow() -> int:
            await trio.sleep(6)
            return 7

        tracker._ask_remaining = slow
    await trio.sleep(1)
    tracker.posted()
    await trio.sleep(200)
    assert rig.log.values("disconnected") == []
    assert 10 < len(rig.server.asked) < 60 or failure == "slow"


async def test_two_deaf_connections_are_a_stalled_publisher_until_it_speaks(
    rig: Rig, autojump_clock: MockClock
) -> None:
    speak = trio.Event()

    async def late(socket: Socket) -> None:
        await speak.wait()
        await socket.say(status(1))
        await stay(socket)

    tracker = rig.start(greeting(stay), greeting(stay), greeting(stay), greeting(late))
    rig.server.remaining = lambda: 1
    await trio.sleep(1)
    tracker.posted()
    await trio.sleep(6)  # deaf at 6.0, connected again at 6.5
    tracker.posted()
    await trio.sleep(6)  # deaf again at 12: stalled, and staying
    assert shown(tracker) == "deaf"
    assert [round(when) for when, *_ in rig.log.of("stalled")] == [12]
    assert rig.server.connections == 2
    await trio.sleep(62)  # now only every 30 s
    assert rig.server.connections == 4
    tracker.posted()
    assert shown(tracker) == "deaf"
    assert [round(when) for when, *_ in rig.log.of("disconnected")] == [6, 42, 73]
    await trio.sleep(4)
    speak.set()
    await trio.sleep(1)
    assert shown(tracker) == "connected"
    assert rig.log.values("stalled") == [True, False]
    await trio.sleep(200)
    assert rig.log.values("disconnected") == ["deaf"] * 3
    assert len(set(rig.log.values("connected"))) == 4


async def test_a_goodbye_takes_a_second_at_most(rig: Rig, autojump_clock: MockClock) -> None:
    async def silent(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await tws.wrap_server_stream(nursery, stream)
            client_id = request.path.partition("clientId=")[2]
            ws = await request.accept()
            await ws.send_message(status(0, sid=client_id))
            nursery.cancel_scope.cancel()  # it will never answer a close frame

    tracker = rig.start(silent)
    rig.server.remaining = lambda: 1
    await trio.sleep(1)
    tracker.posted()
    await trio.sleep(6.2)
    (at_s, _, cause) = rig.log.of("disconnected")[0]
    assert cause == "deaf"
    assert at_s == pytest.approx(7, abs=0.1)


# --- real sockets ---------------------------------------------------------------------------------


async def reconnecting(url: str, log: Log, until: int, **more: Any) -> None:
    async def zero() -> int:
        return 0

    tracker = Tracker(
        url,
        timings=Timings(reconnect_first_s=0.01, reconnect_max_s=0.02),
        ask_remaining=zero,
        listener=log,
        now_s=trio.current_time,
        u=lambda: 0.0,
        **more,
    )
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tracker.run)
            await log.results(until)
            nursery.cancel_scope.cancel()


async def greet_and_hang_up(request: tws.WebSocketRequest) -> None:
    ws = await request.accept()
    await ws.send_message(status(0, sid=request.path.partition("clientId=")[2]))
    await ws.aclose()


async def test_no_socket_is_left_open_when_the_server_hangs_up_first(
    nursery: trio.Nursery,
) -> None:
    server = await nursery.start(tws.serve_websocket, greet_and_hang_up, "127.0.0.1", 0, None)
    log = Log()
    await reconnecting(f"http://127.0.0.1:{server.port}", log, 10)
    gc.collect()  # a socket left behind would warn here, and a warning is an error
    assert set(log.values("result")) == {"ok"}
    assert set(log.values("disconnected")) == {"closed"}
    nursery.cancel_scope.cancel()


async def test_a_closed_port_refuses() -> None:
    log = Log()
    await reconnecting(f"http://127.0.0.1:{closed_port()}", log, 2)
    assert set(log.values("result")) == {"refused"}


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
            f"-subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
        ).split(),
        check=True,
        capture_output=True,
        timeout=20,
    )
    return cert, key


async def test_a_private_authority_is_trusted_when_named(
    nursery: trio.Nursery, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def serve(stream: Any) -> None:
        try:
            await greeting(stay)(stream)
        except* (trio.BrokenResourceError, tws.ConnectionClosed):
            pass

    listeners = await trio.open_ssl_over_tcp_listeners(
        0, context, host="127.0.0.1", https_compatible=True
    )
    port = cast("trio.SocketListener", listeners[0].transport_listener).socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    log = Log()
    await reconnecting(f"https://127.0.0.1:{port}", log, 1, ca_file=cert)
    assert log.values("result") == ["ok"]
    nursery.cancel_scope.cancel()
