"""The frame of every command: exit codes, where the configuration is, what is said where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from comfyd import __version__
from comfyd.__main__ import main
from comfyd.cli import status
from comfyd.cli.exits import Refused, Unreachable
from comfyd.errors import (
    ComfydError,
    ConfigError,
    DiskFull,
    JobFileError,
    JournalError,
    JournalTooNew,
    SpoolBusy,
    UsageError,
)
from tests.cli.conftest import GRAPH, Site

CODES = [
    (Refused("no"), 1),
    (UsageError("no"), 64),
    (JobFileError("no"), 65),
    (Unreachable("no"), 69),
    (JournalError("no"), 70),
    (DiskFull("no"), 70),
    (SpoolBusy("no"), 73),
    (JournalTooNew("no"), 78),
    (ConfigError("spool", "no"), 78),
    (PermissionError(13, "no"), 70),
    (ExceptionGroup("", [ExceptionGroup("", [SpoolBusy("no")])]), 73),
    (KeyboardInterrupt(), 130),
    (BaseExceptionGroup("", [KeyboardInterrupt()]), 130),
    (BrokenPipeError(), 0),
    (ExceptionGroup("", [BrokenPipeError()]), 0),
]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(status, "main", fail)


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: repr(value)[:40])
def test_every_error_has_its_exit_code_and_one_sentence(
    error: BaseException,
    code: int,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
):
    failing(monkeypatch, error)
    found, out, err = site("status")
    assert (found, out) == (code, "")
    quiet = isinstance(error, KeyboardInterrupt | BrokenPipeError | BaseExceptionGroup)
    if not quiet or code == 73:
        assert err.startswith("comfyd: ")
        assert "no" in err
        assert err.count("\n") == 1
    else:
        assert err == ""


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("oops"), ExceptionGroup("", [SpoolBusy("busy"), KeyError("oops")])]
)
def test_a_bug_shows_its_traceback(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    failing(monkeypatch, bug)
    assert main(["status"]) == 70
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "oops" in said.err
    assert "please report" in said.err
    assert said.out == ""


def test_a_family_of_errors_has_a_code_too(site: Site, monkeypatch: pytest.MonkeyPatch):
    class New(ComfydError):
        pass

    failing(monkeypatch, New("something new"))
    assert site("status") == (70, "", "comfyd: something new\n")


@pytest.mark.parametrize(
    "words",
    [
        ("bogus",),
        ("show",),
        ("status", "--bogus"),
        ("jobs", "--limit", "0"),
        ("jobs", "--limit", "٣"),
        ("jobs", "--state", "asleep"),
        ("submit",),
        ("submit", "x.json", "--priority", "high"),
        ("submit", "x.json", "--timeout", "5"),
        ("submit", "x.json", "--timeout", "5s"),
        ("submit", "x.json", "--set", "novalue"),
        ("submit", "x.json", "--set", "1.a=1", "--set", "1.a=2"),
        ("submit", "x.json", "--file", "1.image"),
        ("submit", "-", "-"),
        ("simulate", "--fault", "bogus"),
        ("simulate", "--port", "65536"),
        ("demo", "--server", "not a url"),
        ("demo", "--jobs", "0"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_as_written_is_usage(words: tuple[str, ...], site: Site):
    code, out, err = site(*words)
    assert (code, out) == (64, "")
    assert err.startswith("comfyd: ")
    assert err.count("\n") == 1


def test_without_a_command_help_is_on_stderr(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert "submit" in said.err


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["submit", "--help"]])
def test_help_and_version_are_data(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert (__version__ if words == ["--version"] else "usage: comfyd") in said.out


# --- where the configuration comes from ----------------------------------------------------------


def test_the_configuration_may_stand_before_or_after_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad = tmp_path / "bad.yaml"
    bad.write_text("spoool: x\n")
    assert main(["-c", str(bad), "status"]) == 78
    assert main(["status", "-c", str(bad)]) == 78
    assert main(["status", f"--config={bad}"]) == 78
    assert main(["-c", "/nowhere.yaml", "status", "-c", str(bad)]) == 78
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert set(said) == {said[0]}
    assert said[0].startswith(f"comfyd: {bad}:1:1: ")


def test_the_environment_names_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COMFYD_CONFIG", str(tmp_path / "nowhere.yaml"))
    assert main(["status"]) == 78
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_file_in_this_folder_is_found_and_defaults_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYD_CONFIG", raising=False)
    assert main(["status"]) == 0
    assert "using the defaults" in capsys.readouterr().err
    (tmp_path / "comfyd.yaml").write_text("spoool: x\n")
    assert main(["status"]) == 78


# --- processes -----------------------------------------------------------------------------------


def test_a_submission_loads_nothing_heavy(site: Site):
    path = site.file("fox.json", GRAPH)
    script = (
        "import sys; from comfyd.__main__ import main;"
        f"code = main(['-c', {str(site.config)!r}, 'submit', {path!r}]);"
        "heavy = {'trio', 'rich', 'httpx', 'starlette', 'hypercorn', 'sqlite3', 'structlog'};"
        "print(code, sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_reader_that_has_seen_enough_is_no_error(site: Site):
    script = f"{sys.executable} -m comfyd -c {site.config} simulate --list-faults | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={"PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "F", "")


def test_names_in_any_encoding_can_be_told(site: Site):
    name = b"no\xff\xe2\x80\xae\x1b[31m.json"
    done = subprocess.run(
        [sys.executable, "-m", "comfyd", "-c", str(site.config), "submit", name],
        capture_output=True,
        timeout=20,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 65
    assert done.stderr.startswith(b"comfyd: no")
    assert done.stderr.isascii()
    assert b"\x1b" not in done.stderr
    assert b"Traceback" not in done.stderr
