"""What our dependencies are, and whether any of them is known to be vulnerable.

Offline: every distribution that an installation brings is pinned, installed as pinned, needed by
somebody, free to use, and imported by us only if we say that we need it. Online, by pip-audit: no
known vulnerability. Where its service cannot be reached, that is said, loudly; AUDIT_STRICT=1
makes it an error.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    distributions,
    packages_distributions,
)
from pathlib import Path
from types import MappingProxyType
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
PINS: Final = ROOT / "constraints.txt"
TOOL: Final = ROOT / ".ci" / "pip-audit.txt"
# Where pip-audit asks; this one of our dependencies is there if anything is.
SERVICE: Final = "https://pypi.org/pypi"
KNOWN: Final = "trio/0.35.0"
REACH_S: Final = 10.0
AUDIT_S: Final = 280.0

OURS: Final = "comfyd"
PYTHONS: Final = range(11, 16)
# What a package's own licence file says, where its metadata says nothing.
_READ: Final = {"promql-parser": "MIT"}
_FREE: Final = re.compile(r"\b(?:MIT|MIT-0|BSD|Apache|MPL|Mozilla|PSF|ISC)\b")
_BINDING: Final = re.compile(r"\b(?:A|L)?GPL|General Public", re.IGNORECASE)


class _Nothing(Distribution):
    """Stands for what is not installed here."""

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: object) -> Path:
        return ROOT


_NOTHING: Final = _Nothing()


# --- offline -------------------------------------------------------------------------------------


def pins(text: str) -> dict[str, str]:
    """Versions by canonical name; a line that pins nothing is a ValueError."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line:
            name, equals, version = line.partition("==")
            if not equals or not re.fullmatch(r"[0-9][A-Za-z0-9.+!-]*", version):
                raise ValueError(f"{line!r} pins no exact version")
            found[canonicalize_name(name)] = version
    return found


def needed(
    name: str,
    extras: Iterable[str],
    find: Callable[[str], Distribution],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> set[str]:
    """All that *name* with *extras* needs here, itself not included.

    Args:
      find: Raises PackageNotFoundError.
      environment: What markers are to see, where that is not what is so here.

    """
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        for text in find(at[0]).requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({**environment, "extra": at[1]}):
                inner = canonicalize_name(wanted.name)
                todo += [(inner, extra) for extra in ("", *wanted.extras)]
    return {each for each, _ in seen} - {canonicalize_name(name)}


def anywhere() -> set[str]:
    """All that a development installation needs with any Python that we support."""

    def find(name: str) -> Distribution:
        try:
            return distribution(name)
        except PackageNotFoundError:
            return _NOTHING

    return {
        name
        for minor in PYTHONS
        for name in needed(
            OURS,
            ["dev"],
            find,
            {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"},
        )
    }


def unpinned(
    pinned: Mapping[str, str],
    wanted: Iterable[str],
    installed: Mapping[str, str],
    elsewhere: Iterable[str] = (),
) -> Iterator[str]:
    """What the pins say otherwise than the installation; *elsewhere*, more may be needed."""
    wanted = set(wanted)
    for name in sorted(wanted):
        if name not in pinned:
            yield f"{name} is needed and not pinned in {PINS.name}"
        elif installed.get(name, "").removeprefix("v") != pinned[name]:
            yield f"{name} is pinned to {pinned[name]}, and {installed.get(name)} is installed"
    for name in sorted(pinned.keys() - wanted - set(elsewhere)):
        yield f"{name} is pinned, and nobody needs it"


def licence(dist: Distribution) -> str:
    """What it says of its licence."""
    data = dist.metadata
    said = data.get_all("License-Expression") or [
        each for each in data.get_all("Classifier") or [] if each.startswith("License ::")
    ]
    return "; ".join(said or data.get_all("License") or ["nothing"])[:200]


def unfree(licences: Mapping[str, str]) -> Iterator[str]:
    """Licences that were not weighed for a program under MIT."""
    for name, said in sorted(licences.items()):
        said = _READ.get(name, said) if said == "nothing" else said
        if _BINDING.search(said) or not _FREE.search(said):
            yield f"{name} has a licence to be looked at: {said}"


def imported(folder: Path) -> set[str]:
    """Top-level names that the modules in *folder* import, but for relative ones."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {name for name in found - sys.stdlib_module_names if not name.startswith("_")}


def undeclared(modules: Iterable[str], declared: set[str]) -> Iterator[str]:
    """Where what we import and what we say that we need are not the same."""
    of = packages_distributions()
    used = {canonicalize_name(each) for module in modules for each in of.get(module, [module])}
    for name in sorted(used - declared - {OURS}):
        yield f"{name} is imported, and pyproject.toml does not name it"
    for name in sorted(declared - used):
        yield f"{name} is named in pyproject.toml, and nobody imports it"


def offline() -> list[str]:
    """All problems that can be seen without asking anybody."""
    found = {canonicalize_name(each.name): each for each in distributions()}
    try:
        wanted = needed(OURS, ["dev"], distribution)
    except PackageNotFoundError as error:
        return [f"{error.name} is needed and not installed; run make again"]
    declared = {
        canonicalize_name(wish.name)
        for wish in map(Requirement, distribution(OURS).requires or ())
        if wish.marker is None or wish.marker.evaluate({"extra": ""})
    }
    checked = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [
        *unpinned(
            pins(PINS.read_text(encoding="utf-8")),
            wanted,
            {name: each.version for name, each in found.items()},
            anywhere(),
        ),
        *unfree({name: licence(found[name]) for name in wanted if name in found}),
        *undeclared(imported(ROOT / OURS), declared),
        *(checked.stdout.splitlines() if checked.returncode else []),
    ]


# --- online --------------------------------------------------------------------------------------


def unreachable(service: str) -> str:
    """Why *service* cannot be asked about vulnerabilities; "" if it can."""
    try:
        with urllib.request.urlopen(f"{service}/{KNOWN}/json", timeout=REACH_S) as answer:
            told = json.load(answer)
    except (OSError, ValueError) as error:
        return str(error)
    return "" if "vulnerabilities" in told else "its answer says nothing of vulnerabilities"


def tool() -> Path:
    """pip-audit, installed by its pins if it is not there yet."""
    home = ROOT / ".venv" / f"audit-{hashlib.sha256(TOOL.read_bytes()).hexdigest()[:8]}"
    program = home / "bin" / "pip-audit"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", str(TOOL)], check=True)
    return program


def vulnerable() -> int:
    """Run pip-audit over our pins; its exit code. What it cannot find is an error, too."""
    how = ["--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run([str(tool()), *how, "-r", str(PINS)], timeout=AUDIT_S, check=False)
    return done.returncode


def main(service: str = SERVICE) -> int:
    """0 if all is well, as far as it could be looked at."""
    problems = offline()
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    if not problems:
        print(f"audit: {PINS.name} is complete, exact and free to use")
    if why := unreachable(service):
        strict = bool(os.environ.get("AUDIT_STRICT"))
        print(
            f"audit: NOT CHECKED for known vulnerabilities: {service} cannot be asked ({why})."
            " Run make audit where it can.",
            file=sys.stderr,
        )
        return 1 if problems or strict else 0
    return vulnerable() or bool(problems)


if __name__ == "__main__":
    sys.exit(main())
