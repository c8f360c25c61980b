"""``comfyd reload`` where no daemon runs; and what each command needs of the configuration."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import trio

from comfyd import app, config
from comfyd.config import Secrets
from comfyd.core.model import JobId, Row
from tests.cli.conftest import GRAPH, Serve, Site
from tests.cli.test_reads import call

FOX = JobId("fox.01J00000000000000000000001")
SECRET = "servers: [{name: a, url: 'http://127.0.0.1:9', headers: {Authorization: %s}}]\n"
SECRETS = ["{credential: token}", "{file: nobody-may-read-this}"]


def test_without_a_daemon_there_is_nobody_to_ask(site: Site):
    code, out, err = site("reload")
    assert (code, out) == (69, "")
    assert "No daemon is running" in err
    assert "To reload needs the running daemon; if the file names another state folder" in err


async def test_another_state_folder_needs_a_restart_and_the_daemon_hears_of_it(
    site: Site, daemon: Serve, monkeypatch: pytest.MonkeyPatch
):
    """As systemd calls it: the socket is where the daemon was started."""
    async with daemon():
        monkeypatch.setenv("MAINPID", str(os.getpid()))
        site.config.write_text(site.config.read_text() + "state: other\n")
        with trio.open_signal_receiver(signal.SIGHUP) as hangups:
            code, out, err = await call(site, "reload")
            assert (code, out) == (78, "")
            assert "that needs a restart" in err
            with trio.fail_after(5):
                assert await anext(hangups) == signal.SIGHUP


@pytest.mark.parametrize("main_pid", ["0", "none", str(2**22 + 1)])  # no pid is larger than 2**22
def test_without_the_process_that_systemd_names_it_is_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch, main_pid: str
):
    monkeypatch.setenv("MAINPID", main_pid)
    code, out, err = site("reload")
    assert (code, out) == (69, "")
    assert "To reload needs the running daemon" in err


def test_a_socket_that_is_there_but_cannot_be_asked_is_no_other_state_folder(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MAINPID", str(os.getpid()))
    control = config.state_of(site.config) / "control.sock"
    control.parent.mkdir(exist_ok=True)
    hangups: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda signum, _: hangups.append(signum))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong:
            wrong.bind(str(control))
            code, out, err = site("reload")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (code, out, hangups) == (69, "", [])
    assert "cannot be reached" in err
    assert "state folder" not in err


async def test_a_daemon_that_read_no_file_says_so(site: Site, daemon: Serve):
    async with daemon():
        code, out, err = await call(site, "reload")
        assert (code, out) == (78, "")
        assert "there is no configuration file to read again" in err
        assert "Nothing was changed." in err
        code, out, _ = await call(site, "reload", "--json")
        assert code == 78
        assert json.loads(out)["ok"] is False


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("state: there\n", "there"),
        ("state: there\nspool: [no, path]\nwhat: ever\n", "there"),
        ("spool: s\nstate: there\nservers: [\n", "there"),
        ("", "state"),
        ("state: [no, path]\n", "state"),
        ("servers: [\n", "state"),
        ("- a list\n", "state"),
    ],
)
def test_the_daemon_is_found_by_a_bad_file_too(tmp_path: Path, text: str, folder: str):
    file = tmp_path / "comfyd.yaml"
    file.write_text(text)
    assert config.state_of(file) == tmp_path / folder


# --- only who talks to servers needs the secrets -------------------------------------------------


@pytest.fixture(params=SECRETS)
def secretive(request: pytest.FixtureRequest, site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A secret that this process cannot have: it is systemd's to give, or somebody else's file."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    site.config.write_text(site.config.read_text() + SECRET % request.param)
    return site


def test_every_other_command_does_without(secretive: Site):
    secretive.journal(Row(job=FOX, seq=1, claimed_at=1.0))
    for words in (["status"], ["jobs"], ["show", FOX], ["submit", secretive.file("a.json", GRAPH)]):
        code, _, err = secretive(*words)
        assert code == 0, (words, err)
    for words in (["cancel", FOX], ["pause"], ["drain", "a"], ["check", FOX], ["reload"]):
        code, _, err = secretive(*words)
        assert code == 69, (words, err)  # there is no daemon; the configuration is no obstacle


def test_the_daemon_does_not(secretive: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "run", None)  # or the test would not end
    code, _, err = secretive("run")
    assert code == 78
    assert "headers.Authorization" in err


def test_check_config_takes_systemds_word_for_a_credential(site: Site, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    text = site.config.read_text()
    site.config.write_text(text + SECRET % SECRETS[0])
    assert site("check-config")[0] == 0
    site.config.write_text(text + SECRET % SECRETS[1])
    assert "cannot read" in site("check-config")[1]


def test_what_was_not_read_is_never_taken_for_a_secret(tmp_path: Path):
    file = tmp_path / "comfyd.yaml"
    file.write_text(SECRET % "{credential: token}")
    (server,) = config.load(file, Secrets.NONE).servers
    assert server.headers["Authorization"].reveal() == "unread"
    file.write_text(SECRET % "{credential: ../token}")
    (problem,) = config.check(file)
    assert "must be a credential's name" in problem.problem
