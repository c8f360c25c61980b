"""``systemctl`` is run as it should be, and whatever it does is told and no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
import trio

from comfyd.services import unit
from comfyd.services.unit import restart_unit

UNIT = "comfyui@gpu-1.service"


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program of that name into the PATH; what it was called with is in ``called``."""
    called = tmp_path / "called"

    def put(script: str) -> Path:
        program = tmp_path / "bin" / "systemctl"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {called}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return called

    return put


async def test_a_unit_is_restarted_without_a_shell_or_a_password(systemctl):
    called = systemctl("exit 0")
    with structlog.testing.capture_logs() as logs:
        assert await restart_unit("a", UNIT, "it is wedged") == "ok"
    assert called.read_text().splitlines() == ["--no-ask-password", "restart", "--", UNIT]
    assert [line["event"] for line in logs] == ["server_restarting", "server_restarted"]
    assert logs[0]["why"] == "it is wedged"


async def test_a_refusal_is_told_in_its_own_words(systemctl):
    systemctl("echo 'Access denied' >&2; exit 4")
    with structlog.testing.capture_logs() as logs:
        assert await restart_unit("a", UNIT, "") == "failed"
    assert logs[-1]["problem"] == "Access denied"
    assert logs[-1]["log_level"] == "error"


async def test_one_that_does_not_end_is_ended(systemctl, monkeypatch):
    systemctl("exec sleep 60")
    monkeypatch.setattr(unit, "RESTART_S", 0.3)
    with trio.fail_after(10):
        assert await restart_unit("a", UNIT, "") == "timeout"


async def test_without_systemd_it_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await restart_unit("a", UNIT, "") == "failed"
