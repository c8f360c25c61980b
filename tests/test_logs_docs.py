"""docs/logs.md lists the events that the daemon logs, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import comfyd

PACKAGE = Path(comfyd.__file__).parent
PAGE = PACKAGE.parent / "docs" / "logs.md"
LOGGERS = {"_log", "log"}
METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
LEVELS = "debug|info|warning|error"
ELSEWHERE = {"simulator"}  # a server of its own


def logged(path: Path) -> Iterator[str]:
    """The names of events in one module; a call without a name that can be listed fails."""
    for call in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        logger, method = call.func.value, call.func.attr
        if isinstance(logger, ast.Name) and logger.id in LOGGERS and method in METHODS:
            name = call.args[method == "log"]
            where = f"{path.name}:{call.lineno}"
            assert isinstance(name, ast.Constant), f"{where}: an event without a fixed name"
            assert isinstance(name.value, str)
            assert re.fullmatch("[a-z][a-z_]*", name.value), f"{where}: {name.value!r}"
            yield name.value


def modules() -> list[Path]:
    paths = PACKAGE.rglob("*.py")
    return [path for path in paths if path.relative_to(PACKAGE).parts[0] not in ELSEWHERE]


def test_every_event_is_listed_and_no_other():
    ours = {name for path in modules() for name in logged(path)}
    listed = re.findall(rf"^\| `([a-z_]+)` \| (?:{LEVELS})", PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(ours)
    assert len(ours) > 20


def test_every_logger_is_found():
    """Whatever makes a logger calls it by a name that the test above looks for."""
    made = r"^(\w+).*= (?:structlog\.get_logger|logging\.getLogger|get_logger)\("
    for path in modules():
        for name in re.findall(made, path.read_text("utf-8"), re.MULTILINE):
            assert name in LOGGERS, path


def test_a_name_that_is_made_up_is_found_out(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text("_log.info(f'{kind}')\n")
    with pytest.raises(AssertionError, match=r"odd\.py:1: an event without a fixed name"):
        list(logged(path))
