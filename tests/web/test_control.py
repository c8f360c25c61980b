"""The control socket, over a real one: who may ask, what is answered, what is never waited for."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from comfyd.errors import ConfigError, JournalError, UsageError
from comfyd.web import control
from comfyd.web.control import LINE_MAX_BYTES, serve_control
from comfyd.web.control_client import DaemonUnreachable, ask


async def echo(request):
    await trio.lowlevel.checkpoint()
    return {"got": dict(request)}


async def refuse(request):
    raise UsageError("There is no job of that name.")


async def damaged(request):
    raise JournalError("The journal is damaged.")


async def endless(request):
    await trio.sleep_forever()


async def bug(request):
    raise trio.BrokenResourceError  # an error that a lost connection raises, too


VERBS = {"echo": echo, "refuse": refuse, "damaged": damaged, "endless": endless, "bug": bug}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "control.sock"


@pytest.fixture
async def served(nursery, path):
    with trio.fail_after(10):
        await nursery.start(serve_control, path, VERBS)
        yield path


async def asked(path, request, timeout_s=5.0):
    return await trio.to_thread.run_sync(ask, path, request, timeout_s)


async def connect(path):
    return await trio.open_unix_socket(path)


async def line_of(stream):
    held = b""
    while not held.endswith(b"\n"):
        chunk = await stream.receive_some()
        if not chunk:
            break
        held += chunk
    return held


async def send_until_hung_up(stream, data):
    try:
        while True:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


# --- asking ---


async def test_a_verb_gets_the_rest_of_the_request(served):
    answer = await asked(served, {"verb": "echo", "jobs": ["a", "ü\n"], "n": None})
    assert answer == {"ok": True, "got": {"jobs": ["a", "ü\n"], "n": None}}


@pytest.mark.parametrize(
    ("verb", "kind", "error"),
    [
        ("refuse", "UsageError", "There is no job of that name."),
        ("damaged", "JournalError", "The journal is damaged."),
    ],
)
async def test_an_error_is_a_sentence_and_its_class(served, verb, kind, error):
    assert await asked(served, {"verb": verb}) == {"ok": False, "error": error, "kind": kind}


@pytest.mark.parametrize("request_", [{}, {"verb": "nope"}, {"verb": ["echo"]}, {"verb": None}])
async def test_an_unknown_verb_is_told_the_known_ones(served, request_):
    answer = await asked(served, request_)
    assert answer["ok"] is False
    assert answer["kind"] == "UsageError"
    assert "bug, damaged, echo" in answer["error"]


async def test_several_requests_follow_each_other_in_any_pieces(served):
    async with await connect(served) as stream:
        lines = b"".join(json.dumps({"verb": "echo", "n": n}).encode() + b"\n\n" for n in range(5))
        for byte in range(0, len(lines), 7):
            await stream.send_all(lines[byte : byte + 7])
        got: list[dict[str, Any]] = []
        while len(got) < 5:
            got += [json.loads(line) for line in (await line_of(stream)).splitlines()]
    assert [answer["got"]["n"] for answer in got] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'"echo"', b"\xff\xfe", b'{"verb": NaN}', b"[" * 100_000, b'{"a":' * 100_000],
)
async def test_what_is_no_request_is_refused_and_the_next_one_answered(served, line):
    async with await connect(served) as stream:
        await stream.send_all(line + b"\n")
        assert json.loads(await line_of(stream))["kind"] == "UsageError"
        await stream.send_all(b'{"verb": "echo"}\n')
        assert json.loads(await line_of(stream))["ok"]


async def test_a_line_has_a_limit(served):
    async with await connect(served) as stream:
        fits = {"verb": "echo", "x": "x" * (LINE_MAX_BYTES - 100)}
        await stream.send_all(json.dumps(fits).encode() + b"\n")
        assert json.loads(await line_of(stream))["ok"]
        await send_until_hung_up(stream, b"x" * 65536)
    answer = await asked(served, {"verb": "echo", "x": "x" * LINE_MAX_BYTES})
    assert answer["error"] == f"A request has at most {LINE_MAX_BYTES} bytes."


async def test_half_a_line_is_never_asked(served):
    async with await connect(served) as stream:
        await stream.send_all(b'{"verb": "bug"}')
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def test_a_caller_that_leaves_hurts_nobody(served):
    for _ in range(3):
        async with await connect(served) as stream:
            await stream.send_all(b'{"verb": "echo"}\n' * 500)
    assert (await asked(served, {"verb": "echo"}))["ok"]


async def test_a_silent_caller_is_hung_up_on(served, monkeypatch):
    monkeypatch.setattr(control, "IDLE_S", 0.05)
    async with await connect(served) as stream:
        await stream.send_all(b'{"verb":')
        assert await stream.receive_some() == b""


async def test_a_caller_that_takes_no_answers_is_hung_up_on(served, monkeypatch):
    monkeypatch.setattr(control, "IDLE_S", 0.2)
    big = json.dumps({"verb": "echo", "x": "x" * 500_000}).encode() + b"\n"
    async with await connect(served) as stream:
        await send_until_hung_up(stream, big)


async def test_a_verb_has_a_deadline(served, monkeypatch):
    monkeypatch.setattr(control, "VERB_S", 0.05)
    answer = await asked(served, {"verb": "endless"})
    assert (answer["ok"], answer["kind"]) == (False, "TooSlowError")
    assert answer["error"].startswith("endless took longer")


async def test_so_many_callers_and_no_more(served, monkeypatch):
    async with trio.open_nursery() as nursery:
        streams = [await connect(served) for _ in range(control.CONNECTIONS_MAX)]
        for stream in streams:
            nursery.start_soon(stream.send_all, b'{"verb": "echo"}\n')
        for stream in streams:
            assert json.loads(await line_of(stream))["ok"]
        answer = await asked(served, {"verb": "echo"})
        assert answer["error"] == "Too many callers at once; try again."
        await streams.pop().aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await asked(served, {"verb": "echo"}))["ok"]
        for stream in streams:
            await stream.aclose()


async def test_a_bug_is_answered_and_ends_the_daemon(path):
    with pytest.RaisesGroup(trio.BrokenResourceError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, path, VERBS)
            answer = await asked(path, {"verb": "bug"})
            assert answer["error"].startswith("The daemon met a bug")
            await trio.sleep(5)
    assert not path.exists()


# --- who may ---


async def test_the_socket_is_for_its_owner_alone(served):
    mode = served.lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_another_user_is_refused_whatever_the_mode_says(served, monkeypatch):
    monkeypatch.setattr(control, "_peer_uid", lambda stream: os.geteuid() + 4321)
    answer = await asked(served, {"verb": "echo"})
    assert answer["error"] == "Only root and the daemon's own user may ask."


AS_NOBODY = """
import os, sys
from pathlib import Path
from comfyd.web.control_client import DaemonUnreachable, ask
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    print(ask(Path(sys.argv[1]), {"verb": "echo"}, 5)["error"])
except DaemonUnreachable as error:
    print(error)
"""


def give_mode(path, mode):
    path.parent.chmod(0o755)
    path.chmod(mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
@pytest.mark.parametrize(
    ("mode", "says"),
    [
        (0o600, "Only root and the user with id 0 may ask this daemon."),
        (0o666, "Only root and the daemon's own user may ask."),  # the kernel's word, not the mode
    ],
)
async def test_someone_else_may_not_ask(nursery, mode, says):
    with tempfile.TemporaryDirectory() as folder, trio.fail_after(10):
        path = Path(folder, "control.sock")
        await nursery.start(serve_control, path, VERBS)
        give_mode(path, mode)
        command = [sys.executable, "-c", AS_NOBODY, str(path)]
        done = await trio.run_process(command, capture_stdout=True)
        assert done.stdout.decode().strip() == says
        nursery.cancel_scope.cancel()


# --- where it is ---


async def test_a_dead_daemons_socket_is_replaced(path, nursery):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonUnreachable, match="No daemon is running"):
        await asked(path, {"verb": "echo"})
    with trio.fail_after(5):
        await nursery.start(serve_control, path, VERBS)
        assert (await asked(path, {"verb": "echo"}))["ok"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_not_a_socket_is_left_alone(path, kind):
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(ConfigError, match="is in the way"):
        await serve_control(path, VERBS)
    assert path.is_symlink() or path.exists()


async def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no control socket can be made"):
        await serve_control(tmp_path / "nowhere" / "control.sock", VERBS)


async def test_a_long_path_works_like_a_short_one(tmp_path, nursery):
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    path = folder / "control.sock"
    with trio.fail_after(5):
        await nursery.start(serve_control, path, VERBS)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert (await asked(path, {"verb": "echo"}))["ok"]


async def test_the_file_goes_with_the_server(path):
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, VERBS)
        assert path.exists()
        nursery.cancel_scope.cancel()
    assert not path.exists()


# --- the client's troubles ---


async def test_no_daemon(path):
    with pytest.raises(DaemonUnreachable, match="No daemon is running") as caught:
        await asked(path, {"verb": "echo"})
    assert not caught.value.sent


async def test_a_daemon_that_does_not_answer(served):
    with pytest.raises(DaemonUnreachable, match=r"within 0\.1 s") as caught:
        await asked(served, {"verb": "endless"}, 0.1)
    assert caught.value.sent


@pytest.mark.parametrize("said", [b"", b'{"ok": tr', b"[1]\n", b"\xff\n"])
async def test_a_daemon_that_dies_while_it_answers(path, said, nursery):
    async def die(stream):
        async with stream:
            await stream.receive_some()
            await stream.send_all(said) if said else None

    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    with trio.fail_after(5):
        await nursery.start(trio.serve_listeners, die, [trio.SocketListener(sock)])
        with pytest.raises(DaemonUnreachable, match="stopped while it was asked") as caught:
            await asked(path, {"verb": "echo"})
    assert caught.value.sent
    nursery.cancel_scope.cancel()
