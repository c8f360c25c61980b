"""A wedged ComfyUI is restarted by systemd, where the configuration names its unit."""

from __future__ import annotations

import subprocess
from typing import Any, Final, Literal

import structlog
import trio

RESTART_S: Final = 120.0  # a ComfyUI that does not end is killed by systemd after 90 s
KNOWN_S: Final = 10.0
SAID_CHARS: Final = 400

_log: Any = structlog.get_logger("comfyd.server")


async def restart_unit(server: str, unit: str, why: str) -> Literal["ok", "failed", "timeout"]:
    """``systemctl restart`` *unit*, within RESTART_S. It is never run by a shell, nor asks for a
    password: a rule of polkit must permit it (docs/operations.md).

    Cancellation: at any time; systemctl is ended, systemd carries on with what it was told.
    """
    _log.warning("server_restarting", server=server, unit=unit, why=why)
    command = ["systemctl", "--no-ask-password", "restart", "--", unit]
    try:
        with trio.fail_after(RESTART_S):
            done = await trio.run_process(
                command,
                check=False,
                capture_stdout=True,
                capture_stderr=True,
                stdin=subprocess.DEVNULL,
            )
    except trio.TooSlowError:
        _log.error("server_restart_failed", server=server, unit=unit, problem="no end in time")
        return "timeout"
    except OSError as error:
        _log.error("server_restart_failed", server=server, unit=unit, problem=str(error))
        return "failed"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[:SAID_CHARS]
        problem = said or f"systemctl ended with {done.returncode}"
        _log.error("server_restart_failed", server=server, unit=unit, problem=problem)
        return "failed"
    _log.info("server_restarted", server=server, unit=unit)
    return "ok"


async def is_known(unit: str) -> bool | None:
    """Whether systemd knows *unit*; None if it cannot be asked. Cancellation: at any time."""
    command = ["systemctl", "--no-pager", "cat", "--", unit]
    try:
        with trio.fail_after(KNOWN_S):
            done = await trio.run_process(
                command, check=False, capture_stdout=True, capture_stderr=True
            )
    except (trio.TooSlowError, OSError):
        return None
    return done.returncode == 0
