"""Telling systemd how the service is: the datagram protocol of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(**state: str) -> None:
    """Send *state*, such as ``READY="1"`` or ``STATUS="3 running"``; do nothing without systemd.

    ``RELOADING="1"`` gets the time that systemd wants with it. A manager that does not listen is no
    reason to stop: whatever fails here is systemd's to notice, by its own deadlines.

    Args:
      state: Values of one line each; line breaks become blanks.

    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if "RELOADING" in state:
        state["MONOTONIC_USEC"] = str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
    lines = (f"{key}={' '.join(value.splitlines())}" for key, value in state.items())
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
    ):
        sender.setblocking(False)  # systemd's queue may be full; the next STATUS says more anyway
        # A leading @ stands for the NUL of the abstract namespace.
        sender.connect("\0" + address[1:] if address[0] == "@" else address)
        sender.send("\n".join(lines).encode())


def watchdog_s() -> float | None:
    """For how long systemd waits for ``WATCHDOG=1``, in seconds; None if it does not watch us."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", "") or str(os.getpid())
    if not period_us.isdecimal() or int(period_us) == 0 or meant != str(os.getpid()):
        return None
    return int(period_us) / 1e6
