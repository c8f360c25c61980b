"""A Debian 12 of its own, booted by its own systemd as PID 1, in a folder and without a network.

Needs root, debootstrap and systemd-nspawn. The system is made once and kept below the user's cache
folder; each run boots a copy, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from tests.systemd.transcript import Transcript

SUITE: Final = "bookworm"
MIRROR: Final = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
PACKAGES: Final = "systemd,systemd-sysv,dbus,python3,python3-venv,procps"
TOOLS: Final = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}
BOOT_S: Final = 90
OFF_S: Final = 30
LOOK_S: Final = 0.2


class Failed(Exception):
    """The run did not go as it should; the text says how."""


class Machine:
    """A booted system. Commands run in it as root, in /root."""

    def __init__(self, root: Path, leader: int, transcript: Transcript) -> None:
        self.root = root
        self._leader = leader
        self._transcript = transcript

    @classmethod
    @contextlib.contextmanager
    def booted(cls, transcript: Transcript) -> Iterator[Self]:
        """Boot a fresh copy; at the end it is switched off and removed, whatever happened."""
        _tools()
        base = _base()
        with tempfile.TemporaryDirectory(prefix="comfyd-systemd-", dir="/var/tmp") as home:
            root = Path(home) / "root"
            subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
            (root / "etc/hostname").write_text("comfyd-test\n")
            with open(Path(home) / "console", "wb") as console:
                nspawn = subprocess.Popen(
                    ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit",
                     "--private-network", f"--directory={root}", "--machine=comfyd-test"],
                    stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                    start_new_session=True,
                )  # fmt: skip
            try:
                leader = _first_child(nspawn)
                machine = cls(root, leader, transcript)
                machine._wait_for_boot(Path(home) / "console")
                yield machine
            finally:
                _switch_off(nspawn)

    def _wait_for_boot(self, console: Path) -> None:
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            state = self.ask("systemctl is-system-running", check=False).strip()
            if state in {"running", "degraded"}:
                return
            time.sleep(LOOK_S)
        raise Failed(
            f"it did not boot in {BOOT_S} s:\n{console.read_text(errors='replace')[-3000:]}"
        )

    # --- commands --------------------------------------------------------------------------------

    def run(
        self,
        command: str,
        *,
        user: str = "root",
        code: int = 0,
        within_s: float = 60,
        env: str = "",
    ) -> str:
        """Run *command* with a shell, tell of it, and want its exit code to be *code*.

        Returns:
          Both its outputs.

        """
        self._transcript.command(command if user == "root" else f"({user}) {command}")
        done = self._enter(f"{env} ; {command}" if env else command, user, within_s)
        self._transcript.output(done.stdout)
        if done.returncode != code:
            raise Failed(f"exit code {done.returncode} instead of {code}: {command}\n{done.stdout}")
        return done.stdout

    def ask(self, command: str, *, user: str = "root", check: bool = True) -> str:
        """Run *command* and say nothing; its output."""
        done = self._enter(command, user, 30)
        if check and done.returncode:
            raise Failed(f"exit code {done.returncode}: {command}\n{done.stdout}")
        return done.stdout

    def _enter(self, command: str, user: str, within_s: float) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self._leader}", "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        home = "/root"
        if user != "root":
            enter += ["runuser", "-u", user, "--"]
            home = f"/home/{user}"
        try:
            return subprocess.run(
                [*enter, "/bin/bash", "-c", f"cd {home}; {command}"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", timeout=within_s, check=False,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "LANG": "C.UTF-8"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"not done within {within_s:g} s: {command}") from None

    def until(self, what: str, condition: Callable[[], object], within_s: float) -> float:
        """Wait until *condition* is true; how long that took, in seconds."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > within_s:
                raise Failed(f"not within {within_s:g} s: {what}")
            time.sleep(LOOK_S)
        took_s = time.monotonic() - began_s
        self._transcript.holds(f"{what} (after {took_s:.1f} s)")
        return took_s


def _tools() -> None:
    if os.geteuid():
        raise Failed("this needs root: it boots a system")
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        subprocess.run(
            install,
            check=True,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            timeout=300,
        )


def _base() -> Path:
    """The system to copy: made the first time, which takes a minute and a network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyd-systemd-test"
    base = cache / SUITE
    if not base.exists():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache))
        aside.chmod(0o755)
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, aside, MIRROR],
            check=True, stdout=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        aside.rename(base)
    return base


def _first_child(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + BOOT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"systemd-nspawn ended with {process.returncode}")
        for pid in _children(process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    return pid
        time.sleep(LOOK_S)
    raise Failed("systemd-nspawn started no systemd")


def _children(pid: int) -> list[int]:
    found = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(word) for word in found.stdout.split()]


def _switch_off(nspawn: subprocess.Popen[bytes]) -> None:
    """Ask it to power off; if it does not, kill it by its process ids."""
    children = _children(nspawn.pid)
    nspawn.send_signal(signal.SIGTERM)
    try:
        nspawn.wait(OFF_S)
    except subprocess.TimeoutExpired:
        for pid in children:  # PID 1 of the container: all of it goes with it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        nspawn.kill()
        nspawn.wait(OFF_S)
