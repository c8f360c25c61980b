"""docs/security.md names controls and tests that exist; and what no other test is about."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| S")
]
TESTS = [(row[0], name) for row in ROWS for name in re.findall(r"`([^`]+::[^`]+)`", row[4])]


def test_every_threat_has_a_control_a_place_and_a_test():
    assert [row[0] for row in ROWS] == [f"S{number}" for number in range(1, 21)]
    for row in ROWS:
        assert all(row), row[0]
        assert {threat for threat, _ in TESTS} >= {row[0]}


@pytest.mark.parametrize(("threat", "name"), TESTS, ids=lambda each: each.rpartition("::")[2])
def test_the_test_exists(threat, name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    assert function in {node.name for node in tree.body if isinstance(node, kinds)}, threat


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_place_exists(row):
    places = re.findall(r"`([^`]+)`", row[3])
    assert places
    for place in places:
        assert (ROOT / place).is_file(), place


def test_the_linter_looks_for_dangerous_calls():
    """Ruff's S rules are bandit's; what is excused must be on this list."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    excused = {rule for rule in lint["ignore"] if rule.startswith("S")} - {"SIM"}
    assert excused == {"S101", "S311"}
    for pattern, rules in lint["per-file-ignores"].items():
        if pattern.startswith("comfyd"):
            found = {rule for rule in rules if re.match(r"S\d", rule)}
            assert found <= {"S113"}, pattern  # no timeout of httpx's own: ours covers more
    marks = re.compile(r"noqa:[^#\n]*\bS\d")
    assert [path for path in sources() if marks.search(path.read_text(encoding="utf-8"))] == []


def sources() -> list[Path]:
    return sorted((ROOT / "comfyd").rglob("*.py"))


def imports() -> set[str]:
    found: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def test_nothing_is_run_or_unpickled():
    assert imports() & {"pickle", "shelve", "marshal", "code", "runpy"} == set()
    runs = [path.name for path in sources() if "subprocess" in path.read_text(encoding="utf-8")]
    assert runs == ["unit.py"]  # systemctl, without a shell, with a unit of the configuration
    names = {
        node.func.id
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert names & {"eval", "exec", "compile", "__import__"} == set()


def test_nothing_here_decodes_pictures():
    assert imports() & {"PIL", "cv2", "imageio", "numpy", "wand", "av"} == set()
