"""The audit finds what it is there for, and never passes in silence."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Made(Distribution):
    """A distribution that needs *requires* and says *metadata*."""

    def __init__(self, *requires: str, **metadata: str) -> None:
        self._requires = list(requires)
        self._said = Message()
        for name, value in metadata.items():
            self._said[name.replace("_", "-")] = value

    @property
    def requires(self) -> list[str]:
        return self._requires

    @property
    def metadata(self) -> Any:
        return self._said

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


def test_this_installation_is_what_is_pinned(audit):
    assert audit.offline() == []


def test_the_tools_of_the_audit_are_pinned_too(audit):
    assert "pip-audit" in audit.pins(audit.TOOL.read_text())


@pytest.mark.parametrize("line", ["trio", "trio>=1", "trio==1.*", "-e .", "trio @ https://x"])
def test_a_line_that_pins_nothing_is_found(audit, line):
    with pytest.raises(ValueError, match="pins no exact version"):
        audit.pins(f"# comment\nh11==0.16.0\n{line}\n")


def test_all_that_is_needed_is_found_through_extras_and_markers(audit):
    made = {
        "top": Made("One[fast]>1", "two; extra == 'dev'", "three; python_version < '3'"),
        "one": Made("four; extra == 'fast'", "five"),
        "two": Made("top"),
        "four": Made(),
        "five": Made("one"),
    }

    def find(name: str) -> Distribution:
        if name not in made:
            raise PackageNotFoundError(name)
        return made[name]

    assert audit.needed("top", ["dev"], find) == {"one", "two", "four", "five"}
    assert audit.needed("top", [], find) == {"one", "four", "five"}
    del made["four"]
    with pytest.raises(PackageNotFoundError):
        audit.needed("top", [], find)


def test_whatever_differs_is_said(audit):
    said = audit.unpinned({"a": "1", "b": "1", "old": "1"}, ["a", "b", "c"], {"a": "1", "x": "2"})
    assert list(said) == [
        "b is pinned to 1, and None is installed",
        "c is needed and not pinned in constraints.txt",
        "old is pinned, and nobody needs it",
    ]
    assert list(audit.unpinned({"a": "1", "win": "1"}, ["a"], {"a": "1"}, ["win"])) == []


@pytest.mark.parametrize(
    ("metadata", "free"),
    [
        ({"License_Expression": "MIT OR Apache-2.0"}, True),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"License": "BSD-3-Clause"}, True),
        ({"License_Expression": "GPL-3.0-or-later"}, False),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"}, False),
        ({"License_Expression": "LGPL-2.1 AND MIT"}, False),
        ({"License": "Proprietary"}, False),
        ({}, False),
    ],
)
def test_licences(audit, metadata, free):
    said = audit.licence(Made(**metadata))
    assert (list(audit.unfree({"a": said})) == []) is free


def test_imports_and_declarations_are_compared(audit, tmp_path):
    (tmp_path / "a.py").write_text(
        "import trio.abc, os\nfrom h11 import x\nfrom . import y\ndef f():\n    import nowhere\n"
    )
    modules = audit.imported(tmp_path)
    assert modules == {"trio", "h11", "nowhere"}
    assert list(audit.undeclared(modules, {"trio", "rich"})) == [
        "h11 is imported, and pyproject.toml does not name it",
        "nowhere is imported, and pyproject.toml does not name it",
        "rich is named in pyproject.toml, and nobody imports it",
    ]


# --- the service ---------------------------------------------------------------------------------


@pytest.fixture(params=[(404, {}), (200, {"info": {}}), (200, "nonsense")])
def useless(request: pytest.FixtureRequest) -> Iterator[str]:
    """A service that answers, and not what was asked."""
    status, told = request.param

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(told.encode() if isinstance(told, str) else json.dumps(told).encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("strict", "code"), [("", 0), ("1", 1)])
def test_without_its_service_nothing_passes_in_silence(
    audit, capsys, monkeypatch, useless, strict, code
):
    monkeypatch.setenv("AUDIT_STRICT", strict)
    assert audit.main(useless) == code
    assert "NOT CHECKED for known vulnerabilities" in capsys.readouterr().err


def test_a_service_that_is_not_there_is_said(audit, capsys, monkeypatch):
    monkeypatch.delenv("AUDIT_STRICT", raising=False)
    monkeypatch.setattr(audit, "offline", lambda: ["something is wrong"])
    assert audit.main("http://127.0.0.1:9") == 1
    said = capsys.readouterr().err
    assert "audit: something is wrong\n" in said
    assert "NOT CHECKED" in said
    assert "Connection refused" in said
