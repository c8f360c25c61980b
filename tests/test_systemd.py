"""The unit file agrees with the program, and with systemd where there is one."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from comfyd.cli.arguments import build_parser
from comfyd.cli.exits import Exit

UNIT = Path(__file__).parent.parent / "systemd" / "comfyd.service"


def settings(name: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def test_what_it_starts_is_a_command_of_ours():
    [command] = settings("ExecStart")
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert args.command == "run"
    assert args.config == Path("/etc/comfyd/comfyd.yaml")


def test_what_a_restart_cannot_mend_is_not_restarted():
    [codes] = settings("RestartPreventExitStatus")
    assert {int(code) for code in codes.split()} == {Exit.USAGE, Exit.BUSY, Exit.CONFIG}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LimitCORE", "0"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("PrivateDevices", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6"),
        ("SystemCallFilter", "@system-service"),
        ("User", "comfyd"),
        ("UMask", "0027"),
    ],
)
def test_what_it_may_not_do(name, value):
    assert settings(name) == [value]


def test_a_reload_is_asked_for_and_its_answer_waited_for():
    [command] = settings("ExecReload")
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert (args.command, args.config) == ("reload", Path("/etc/comfyd/comfyd.yaml"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_has_nothing_to_say_about_it(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/comfyd/bin/comfyd", shutil.which("true") or ""))
    for command in (
        ["verify", str(unit)],
        ["security", "--offline=true", "--threshold=20", str(unit)],
    ):
        done = subprocess.run(
            ["systemd-analyze", *command], capture_output=True, text=True, timeout=30, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
