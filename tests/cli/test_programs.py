"""Commands that serve, as processes; and ``check-config``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from comfyd.__main__ import main
from tests.cli.conftest import Site

ROOT = Path(__file__).parents[2]
PROCESS_S = 20.0


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """``comfyd WORDS`` as a process, gone at the end whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "comfyd", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PROCESS_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_simulate_prints_its_address_and_ends_when_told(number: signal.Signals):
    with started("simulate", "--port", "0", "--fault", "history-delay=1s") as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/system_stats", timeout=5) as answer:
            assert json.load(answer)["system"]["comfyui_version"]
        process.send_signal(number)
        assert process.wait(PROCESS_S) == 0


def test_a_port_that_is_taken_is_told(site: Site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = site("simulate", "--port", port)
    assert (code, out) == (64, "")
    assert "in use" in err


def test_faults_are_listed(site: Site):
    code, out, err = site("simulate", "--list-faults")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["FAULT", "ARGUMENT", "WHAT", "IT", "DOES"]
    assert "post-ambiguous" in out


def test_run_serves_until_told_and_keeps_others_out(site: Site):
    with started("run", "-c", str(site.config)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "event=ready" in line:
                break
        assert site("status")[0] == 0
        code, out, err = site("run")
        assert (code, out) == (73, "")
        assert "another comfyd uses this folder" in err.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PROCESS_S) == 0
    assert "not running" in site("status")[2]


def test_run_with_a_bad_configuration_does_not_start(site: Site):
    site.config.write_text("servers: []\n")
    assert site("run")[0] == 78


# --- check-config --------------------------------------------------------------------------------


def test_a_good_configuration_is_said_to_be_good(site: Site):
    assert site("check-config") == (0, "", f"comfyd: {site.config}: good\n")
    assert site.json("check-config", str(site.config)) == {
        "file": str(site.config),
        "ok": True,
        "problems": [],
    }


def test_every_problem_is_one_line_of_data(site: Site):
    bad = site.home / "bad.yaml"
    bad.write_text("spoool: x\nwatch: {settle: 5}\n")
    code, out, err = site("check-config", str(bad))
    assert (code, err) == (78, "")
    first, second = out.splitlines()
    assert first.startswith(f"{bad}:1:1: spoool: ")
    assert second.startswith(f"{bad}:2:")
    assert ": watch.settle: " in second
    code, out, _ = site("check-config", str(bad), "--json")
    assert code == 78
    found = json.loads(out)
    assert [(each["line"], each["key"]) for each in found["problems"]] == [
        (1, "spoool"),
        (2, "watch.settle"),
    ]


def test_a_missing_file_is_told(site: Site):
    code, out, _ = site("check-config", str(site.home / "nowhere.yaml"))
    assert code == 78
    assert "cannot be read" in out


def test_nothing_to_check_is_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYD_CONFIG", raising=False)
    assert main(["check-config"]) == 64
    assert "no configuration file" in capsys.readouterr().err
