"""What systemd would receive."""

from __future__ import annotations

import os
import socket
import time

import pytest

from comfyd import sdnotify


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path, monkeypatch):
    """A socket in systemd's place."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@comfyd-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield receiver


def test_state_is_sent_as_lines(systemd):
    sdnotify.notify(READY="1", STATUS="2 running,\n1 waiting")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=2 running, 1 waiting"


def test_a_reload_carries_the_time(systemd):
    before = time.monotonic_ns() // 1000
    sdnotify.notify(RELOADING="1")
    first, second = systemd.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")
    assert before <= int(second.partition("=")[2]) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1", "/nowhere/at/all"])
def test_without_systemd_nothing_happens(address, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    sdnotify.notify(WATCHDOG="1")


def test_a_full_queue_does_not_block(systemd):
    for _ in range(5000):
        sdnotify.notify(STATUS="x" * 1000)
    assert systemd.recv(4096).startswith(b"STATUS=x")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("60000000", "", 60.0),
        ("1500000", "ours", 1.5),
        ("60000000", "1", None),  # meant for another process: this one only inherited it
        ("0", "", None),
        ("", "", None),
        ("soon", "", None),
    ],
)
def test_how_long_systemd_waits(usec, pid, seconds, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert sdnotify.watchdog_s() == seconds


def test_without_systemd_nobody_waits(monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert sdnotify.watchdog_s() is None
