"""What is carried into the machine: this version, a next one, and all that they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from comfyd import __version__
from tests.systemd.installing import ROOT
from tests.systemd.machine import Failed

NEXT: Final = "0.2.0"  # the version that docs/install.md upgrades to
PIP: Final = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def pack(into: Path) -> None:
    """Put the wheels of both versions, constraints.txt and ``wheels/`` into the folder *into*."""
    _run(["make", "dist", f"PYTHON={sys.executable}"], ROOT)
    for made in (ROOT / "dist").iterdir():
        shutil.copy(made, into)
    wheel = into / f"comfyd-{__version__}-py3-none-any.whl"
    if not wheel.exists():
        raise Failed(f"make dist made no {wheel.name}")
    wheels = into / "wheels"
    constraints = ["-c", str(into / "constraints.txt")]
    _run(
        [*PIP, "download", "--only-binary=:all:", *constraints, "-d", str(wheels), str(wheel)], into
    )
    _run(_build(_next_version(into / "next"), into), into)
    shutil.rmtree(into / "next")


def _next_version(copy: Path) -> Path:
    """The same sources under the next version's number."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    file = copy / "comfyd" / "__init__.py"
    text, changed = re.subn(re.escape(f'"{__version__}"'), f'"{NEXT}"', file.read_text())
    if not changed:
        raise Failed(f"{file.name} does not say {__version__}")
    file.write_text(text)
    return copy


def _build(source: Path, into: Path) -> list[str]:
    return [*PIP, "wheel", "--no-deps", "--wheel-dir", str(into), str(source)]


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
