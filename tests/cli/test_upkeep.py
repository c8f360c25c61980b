"""gc, snapshot and doctor, as they are typed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from comfyd.cli import examine
from comfyd.config import load
from comfyd.core.model import JobId, Row, State
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import SqliteStore
from comfyd.spool.layout import Spool
from tests.cli.conftest import GRAPH, Serve, Site
from tests.cli.test_reads import call
from tests.endtoend.waiting import until

NAMELESS = 62_345  # an id that no user and no group has

# --- gc ------------------------------------------------------------------------------------------


async def test_gc_says_what_it_removes_and_dry_run_removes_nothing(site: Site, daemon: Serve):
    site.config.write_text(site.config.read_text() + "retention: {done: {count: 1}}\n")
    async with daemon():
        files = [site.file(f"{name}.json", GRAPH) for name in "abc"]
        code, out, err = await call(site, "submit", "--wait", *files)
        assert code == 0, err
        jobs = out.split()
        await until(lambda: not os.listdir(site.spool.claimed))
        code, foreseen, err = await call(site, "gc", "--dry-run")
        assert code == 0
        assert "would remove 2 results" in err
        assert len(os.listdir(site.spool.done)) == 3
        code, out, err = await call(site, "gc")
        assert (code, out) == (0, foreseen)
        assert "removed 2 results" in err
        [left] = os.listdir(site.spool.done)
        assert {line.split()[0] for line in out.splitlines()} == {
            f"done/{job}" for job in jobs if job != left
        }
        assert "over count" in out
        code, out, _ = await call(site, "gc", "--json")
        assert json.loads(out) == {
            "dry_run": False, "results": [], "more": 0, "bytes": 0, "events": 0, "rows": 0,
            "problems": [],
        }  # fmt: skip


def test_gc_needs_the_daemon(site: Site):
    code, out, err = site("gc")
    assert (code, out) == (69, "")
    assert "To gc needs the running daemon." in err


# --- snapshot ------------------------------------------------------------------------------------


def jobs_in(snapshot: Path) -> set[str]:
    db = sqlite3.connect(snapshot)
    found = {job for (job,) in db.execute("SELECT job FROM jobs")}
    assert db.execute("SELECT * FROM settings WHERE name = 'whole'").fetchall() == []
    db.close()
    return found


async def test_a_snapshot_is_taken_while_the_daemon_runs(site: Site, daemon: Serve):
    async with daemon():
        _, out, _ = await call(site, "submit", "--wait", site.file("a.json", GRAPH))
        job = out.strip()
        target = site.home / "copy.db"
        code, out, err = await call(site, "snapshot", str(target))
        assert (code, out) == (0, f"{target}\n"), err
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert jobs_in(target) == {job}
        before = target.read_bytes()
        code, out, err = await call(site, "snapshot", str(target))
        assert (code, out) == (1, "")
        assert "replaces nothing" in err
        assert target.read_bytes() == before
        assert [name for name in os.listdir(site.home / "state") if "snapshot" in name] == []


@pytest.mark.parametrize("kind", ["elsewhere", "link", "hard link", "other"])
def test_a_daemon_that_was_taken_over_makes_nobody_read_or_remove_other_files(
    site: Site, kind: str
):
    state = site.home / "state"
    state.mkdir(exist_ok=True)
    precious = site.home / "precious"
    precious.write_text("secret")
    named = state / (".snapshot-" + 16 * "0" + ".db")
    match kind:
        case "elsewhere":
            named = precious
        case "link":
            named.symlink_to(precious)
        case "hard link":
            os.link(precious, named)
        case _:
            named = state / "comfyd.db"
            named.write_text("secret")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(state / "control.sock"))
        server.listen()

        def answer() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(1000)
                caller.sendall(json.dumps({"ok": True, "path": str(named)}).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        code, out, err = site("snapshot", str(site.home / "copy.db"))
        thread.join(10)
    assert (code, out) == (1, "")
    assert "no copy of its journal" in err or "cannot be read" in err
    assert precious.read_text() == "secret"
    assert not (site.home / "copy.db").exists()
    assert (state / "comfyd.db").exists() == (kind == "other")


def test_a_snapshot_is_taken_when_no_daemon_runs(site: Site):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))
    target = site.home / "copy.db"
    code, out, _ = site("snapshot", str(target), "--json")
    assert code == 0
    assert json.loads(out) == {"file": str(target), "bytes": target.stat().st_size}
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert jobs_in(target) == {"fox.01A"}


@pytest.mark.parametrize("links", [True, False])
def test_what_is_there_by_now_is_not_replaced(
    site: Site, monkeypatch: pytest.MonkeyPatch, links: bool
):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))
    target = site.home / "copy.db"
    link = os.link

    def somebody_is_quicker(aside: Path, name: Path) -> None:
        name.write_text("precious")
        if not links:
            raise OSError(95, "Operation not supported")
        link(aside, name)

    monkeypatch.setattr(os, "link", somebody_is_quicker)
    code, _, err = site("snapshot", str(target))
    assert code == 1
    assert "exists by now" in err
    assert target.read_text() == "precious"
    assert sorted(os.listdir(site.home)) == ["comfyd.yaml", "copy.db", "spool", "state"]


def test_a_file_system_without_links_will_do(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))

    def refuse(aside: Path, name: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert site("snapshot", str(site.home / "copy.db"))[0] == 0
    assert jobs_in(site.home / "copy.db") == {"fox.01A"}


@pytest.mark.parametrize("name", ["no/such/folder/x.db", ".", "comfyd.yaml"])
def test_a_snapshot_needs_a_new_name_in_a_folder(site: Site, name: str):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))
    code, out, _ = site("snapshot", str(site.home / name))
    assert (code, out) == (1, "")


def test_without_a_journal_there_is_nothing_to_copy(site: Site):
    code, _, err = site("snapshot", str(site.home / "copy.db"))
    assert code == 1
    assert "there is no journal" in err


# --- doctor --------------------------------------------------------------------------------------


def findings(out: str) -> dict[str, list[tuple[str, str, str]]]:
    """By subject: level, what, remedy; each that is not ok has a remedy."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for each in json.loads(out)["findings"]:
        told = (each["level"], each["what"], each["remedy"])
        found.setdefault(each["subject"], []).append(told)
        assert bool(each["remedy"]) is (each["level"] != "ok"), each
        assert each["what"].endswith("."), each
    return found


async def test_doctor_finds_nothing_wrong_with_a_daemon_that_works(site: Site, daemon: Serve):
    async with daemon() as simulator:
        site.config.write_text(
            site.config.read_text() + f"servers: [{{name: sim, url: '{simulator.url}'}}]\n"
        )
        code, out, err = await call(site, "doctor", "--json")
        found = findings(out)
        assert code == 0, out
        assert "nothing is wrong" in err
        assert [level for level, _, _ in found["server sim"]] == ["ok"]
        for subject in ("configuration", "daemon", "spool", "state", "events"):
            assert [level for level, _, _ in found[subject]] == ["ok"], subject
        code, out, _ = await call(site, "doctor")
        assert out.startswith("SUBJECT")


async def test_doctor_compares_clocks_and_versions(
    site: Site, daemon: Serve, monkeypatch: pytest.MonkeyPatch
):
    async with daemon() as simulator:
        site.config.write_text(
            site.config.read_text() + f"servers: [{{name: sim, url: '{simulator.url}'}}]\n"
        )
        monkeypatch.setattr(examine, "time", SimpleNamespace(time=lambda: time.time() + 90))
        _, out, _ = await call(site, "doctor", "--json")
        [_, (level, what, _)] = findings(out)["server sim"]
        assert level == "warning"
        assert "behind ours" in what
        monkeypatch.setattr(examine, "time", SimpleNamespace(time=lambda: time.time() - 90))
        _, out, _ = await call(site, "doctor", "--json")
        assert "ahead of ours" in findings(out)["server sim"][1][1]


def test_doctor_says_what_keeps_everything_down(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.config.write_text("servers: [{name: a, url: 'http://127.0.0.1:9'}]\nworkflows: nowhere\n")
    site.spool.stage.rmdir()
    code, out, err = site("doctor", "--json")
    found = findings(out)
    assert code == 1
    assert "problem" in err
    assert found["server a"][0][0] == "problem"
    assert found["workflows"][0][0] == "problem"
    assert "stage is missing" in found["spool"][0][1]
    assert "does not run" in found["daemon"][0][1]


def test_doctor_names_the_lines_of_a_bad_configuration(site: Site):
    site.config.write_text("watch: {settle: soon}\nfoo: 1\n")
    code, out, _ = site("doctor", "--json")
    assert code == 1
    assert len(findings(out)["configuration"]) == 2


def test_doctor_finds_a_spool_that_others_may_write(site: Site):
    site.spool.done.chmod(0o777)
    _, out, _ = site("doctor", "--json")
    [(level, what, remedy)] = findings(out)["spool"]
    assert level == "problem"
    assert "may be written by others" in what
    assert remedy == f"Run: chmod go-w {site.spool.done}"
    assert os.listdir(site.spool.done) == []


def test_doctor_does_without_what_only_systemd_can_give(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    server = "{name: a, url: 'http://127.0.0.1:9', headers: {X-Key: {credential: key}}}"
    site.config.write_text(site.config.read_text() + f"servers: [{server}]\n")
    code, out, _ = site("doctor", "--json")
    assert code == 0, out
    [(level, what, _)] = findings(out)["server a"]
    assert level == "ok"
    assert "its secret was not read" in what


def test_doctor_goes_on_where_a_secret_cannot_be_read(site: Site):
    server = "{name: a, url: 'http://127.0.0.1:9', headers: {X-Key: {file: gone}}}"
    site.config.write_text(site.config.read_text() + f"servers: [{server}]\n")
    code, out, _ = site("doctor", "--json")
    assert code == 1
    [(level, what, _)] = findings(out)["configuration"]
    assert (level, "cannot read" in what) == ("problem", True)
    [(level, what, _)] = findings(out)["server a"]
    assert (level, "its secret was not read" in what) == ("ok", True)
    assert findings(out)["spool"][-1][1] == "A job can be moved through it."


def may_run(uid: int) -> bool:
    """Whether that user may run this Python with this comfyd: not where they are in root's home."""
    program = [sys.executable, "-c", "import comfyd"]
    try:
        done = subprocess.run(
            program, user=uid, extra_groups=[], capture_output=True, timeout=60, check=False
        )
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.fixture
def handed_over():
    """A configuration of root's, with a spool and state that are a user's of no name or group."""
    if os.geteuid() != 0:
        pytest.skip("only root can look with another's rights")
    home = Path(tempfile.mkdtemp(prefix="comfyd-"))
    home.chmod(0o755)
    Spool(home / "spool").prepare()
    (home / "state").mkdir(0o700)
    SqliteStore.open(home / "state" / "comfyd.db").close()
    (home / "state" / "lock").touch(0o600)
    for path in (home / "state", *home.rglob("state/**/*"), *home.rglob("spool/**")):
        os.chown(path, NAMELESS, NAMELESS)
    (home / "comfyd.yaml").write_text("metrics: {listen: 127.0.0.1:0}\n")
    yield home / "comfyd.yaml"
    shutil.rmtree(home)


def doctor(file: Path) -> dict[str, list[tuple[str, str, str]]]:
    """What it finds as a program of root's."""
    command = [sys.executable, "-m", "comfyd", "-c", str(file), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if may_run(NAMELESS):
        told = f"looking with the rights of the user with id {NAMELESS}"
    else:
        told = f"looking with root's rights: the user with id {NAMELESS} may not run"
    assert told in done.stderr
    if not may_run(NAMELESS):
        pytest.skip(f"{sys.executable} is where only root may run it")
    return findings(done.stdout)


def test_doctor_as_root_reads_secrets_with_the_daemons_rights(handed_over: Path):
    token = handed_over.with_name("token")
    token.write_text("Bearer hunter2")
    token.chmod(0o600)  # root's
    headers = "headers: {Authorization: {file: token}}"
    handed_over.write_text(f"servers: [{{name: a, url: 'http://127.0.0.1:9', {headers}}}]\n")
    [(level, what, _)] = doctor(handed_over)["configuration"]
    assert (level, "token: Permission denied" in what) == ("problem", True)


def test_doctor_as_root_moves_with_the_daemons_rights(handed_over: Path):
    handed_over.with_name("spool").joinpath("claimed").chmod(0o500)
    [(level, what, _)] = doctor(handed_over)["spool"]
    assert (level, "Permission denied" in what) == ("problem", True)


@pytest.mark.parametrize("roots", [["lock"], ["comfyd.db"], ["", "lock", "comfyd.db"], None])
def test_doctor_as_root_finds_a_state_folder_that_the_daemon_may_not_write(
    handed_over: Path, roots: list[str] | None
):
    state = handed_over.with_name("state")
    if roots is None:
        state.chmod(0o500)
    else:
        for name in roots:
            os.chown(state / name, 0, 0)
    [(level, what, remedy)] = doctor(handed_over)["state"]
    assert (level, "Permission denied" in what) == ("problem", True)
    assert remedy == f"Run: chown -R {NAMELESS} {state} && chmod -R u+rwX {state}"
    subprocess.run(remedy.removeprefix("Run: "), shell=True, check=True, timeout=60)
    [(level, what, _)] = doctor(handed_over)["state"]
    assert (level, what) == ("ok", "Its journal can be read; it knows 0 jobs.")


def test_doctor_minds_secrets_that_everybody_may_read(site: Site):
    token = site.home / "token"
    token.write_text("Bearer hunter2")
    headers = f"headers: {{Authorization: {{file: {token}}}}}"
    server = f"servers: [{{name: a, url: 'http://127.0.0.1:9', {headers}}}]\n"
    site.config.write_text(site.config.read_text() + server)
    for mode, minded in ((0o640, False), (0o644, True)):
        token.chmod(mode)
        found = findings(site("doctor", "--json")[1])["server a"]
        said = ("warning", f"Everybody may use its secret, {token}.", f"Run: chmod o= {token}")
        assert (said in found) == minded


@pytest.mark.parametrize(
    ("mode", "said"), [(0o2770, "may remove what others submitted"), (0o1770, "not its group's")]
)
def test_doctor_minds_a_door_without_its_special_bits(site: Site, mode: int, said: str):
    site.spool.new.chmod(mode)
    [(level, what, remedy), _] = findings(site("doctor", "--json")[1])["spool"]
    assert (level, said in what) == ("warning", True)
    assert remedy == f"Run: chmod 3770 {site.spool.new}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to any group")
def test_doctor_minds_a_door_of_another_group(site: Site):
    os.chown(site.spool.new, -1, NAMELESS)
    site.spool.new.chmod(0o3770)
    [(level, what, remedy), _] = findings(site("doctor", "--json")[1])["spool"]
    assert level == "warning"
    assert f"{site.spool.new} belongs to the group {NAMELESS}, and done/ to " in what
    assert remedy.startswith("Run: chgrp ")


def test_doctor_names_a_lock_that_is_no_file(site: Site):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))
    lock = site.home / "state" / "lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to("elsewhere")
    code, out, _ = site("doctor", "--json")
    [(level, what, _)] = findings(out)["state"]
    assert (code, level) == (1, "problem")
    assert what.startswith(f"{lock} cannot be looked at")


def test_doctor_tells_how_many_files_the_daemon_may_open(site: Site):
    code = (
        "import resource, socket, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99));"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True);"
        "sys.stdin.read()"
    )
    state, pipe = site.home / "state", subprocess.PIPE
    state.mkdir(mode=0o700)
    config = load(site.config)
    [own] = examine._limits(config)
    command = [sys.executable, "-c", code, str(state / "control.sock")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        [its] = examine._limits(config)
        assert (its.level, its.what) == ("warning", "Only 99 files may be open at once.")
    assert list(examine._limits(config)) == [own]  # nobody listens there any more


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_doctor_finds_a_lock_of_the_spool_that_is_anothers(site: Site):
    lock = site.spool.root / ".lock"
    lock.touch(0o600)
    os.chown(lock, 65534, -1)
    [(level, what, remedy)] = findings(site("doctor", "--json")[1])["spool"]
    assert level == "problem"
    assert what == f".lock in {site.spool.root} is not root's, whose the spool is."
    assert remedy == f"Run: chown -R 0 {site.spool.root}"


def test_doctor_says_who_may_submit(site: Site):
    site.spool.new.chmod(0o3777)
    site.spool.tmp.chmod(0o3750)
    everybody, nobody, _ = findings(site("doctor", "--json")[1])["spool"]
    assert everybody[1] == f"Everybody may submit: {site.spool.new} has mode 3777."
    assert nobody[2] == f"Run: chmod 3770 {site.spool.tmp}"


def test_doctor_minds_pages_that_anybody_can_ask_for(site: Site):
    text = site.config.read_text()
    site.config.write_text(text.replace("127.0.0.1:0", "0.0.0.0:0"))
    [(level, what, _)] = findings(site("doctor", "--json")[1])["metrics"]
    assert (level, "without a password" in what) == ("warning", True)


def test_doctor_asks_systemd_for_the_unit_that_is_to_be_restarted(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    fake = site.home / "systemctl"
    fake.write_text('#!/bin/sh\ntest "$*" = "--no-pager cat -- there.service"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(site.home), prepend=os.pathsep)
    servers = [f"{{name: {n}, url: 'http://127.0.0.1:{p}', restart_unit: {n}.service}}" for n, p in
               (("there", 8), ("gone", 9))]  # fmt: skip
    site.config.write_text(site.config.read_text() + f"servers: [{', '.join(servers)}]\n")
    found = findings(site("doctor", "--json")[1])
    assert not any("systemd does not know" in what for _, what, _ in found["server there"])
    assert "restart_unit is gone.service, which systemd does not know." in found["server gone"][-1]


async def test_doctor_tells_what_only_the_daemon_finds(site: Site, daemon: Serve):
    async with daemon() as simulator:
        server = f"{{name: sim, url: '{simulator.url}'}}"
        site.config.write_text(site.config.read_text() + f"servers: [{server}]\n")
        view = {"name": "sim", "state": "down", "reason": "its certificate is not trusted"}
        asked = partial(examine._servers, load(site.config), {"servers": [view]})
        found = await trio.to_thread.run_sync(lambda: list(asked()))
        assert [each.level for each in found] == ["ok", "problem"]
        assert found[1].what == "The daemon finds it down: its certificate is not trusted."


def test_doctor_finds_what_retention_could_not_empty(site: Site):
    left = site.spool.stage / ".fox.01A.removed"
    left.mkdir()
    _, out, _ = site("doctor", "--json")
    (level, what, remedy) = findings(out)["spool"][-1]
    assert level == "warning"
    assert what == "Something is left in stage/ of 1 removed result."
    assert remedy == f"As root, run: rm -rf {left}"


def test_doctor_tells_a_stale_socket_from_a_daemon_that_hangs(site: Site):
    state = site.home / "state"
    state.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(state / "control.sock"))
    _, out, _ = site("doctor", "--json")
    assert findings(out)["daemon"][0][:2] == (
        "warning",
        "It does not run, and left its control socket: it was killed.",
    )
    with StateLock(state / "lock").acquire():
        _, out, _ = site("doctor", "--json")
    assert findings(out)["daemon"][0][0] == "problem"
    (state / "control.sock").unlink()
    (state / "control.sock").write_text("")
    _, out, _ = site("doctor", "--json")
    assert "is no socket" in findings(out)["daemon"][0][1]


def test_doctor_reads_the_journal_and_sees_what_was_set_aside(site: Site):
    site.journal(Row(job=JobId("fox.01A"), seq=1, state=State.DONE, retired=True))
    state = site.home / "state"
    state.chmod(0o755)
    (state / "comfyd.db.damaged-20260101").write_bytes(b"")
    _, out, _ = site("doctor", "--json")
    told = findings(out)["state"]
    assert [level for level, _, _ in told] == ["warning", "warning", "ok"]
    assert "knows 1 jobs" in told[2][1]
    (state / "comfyd.db").write_bytes(b"not a journal" * 1000)
    code, out, _ = site("doctor", "--json")
    assert code == 1
    assert findings(out)["state"][2][0] == "problem"


def test_doctor_finds_a_port_that_is_taken(site: Site):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        site.config.write_text(f"metrics: {{listen: '127.0.0.1:{port}'}}\n")
        _, out, _ = site("doctor", "--json")
    assert findings(out)["metrics"][0][0] == "problem"


def test_doctor_minds_free_space(site: Site):
    site.config.write_text("outputs: {min_free_bytes: 8000TiB}\n")
    code, out, _ = site("doctor", "--json")
    assert code == 1
    assert findings(out)["spool disk"][0][0] == "problem"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("", "ext4"), ("share", "nfs4"), ("share/deep", "nfs4"), ("shared", "ext4"), ("a b", "tmpfs")],
)
def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount(
    tmp_path: Path, path: str, kind: str
):
    (tmp_path / path).mkdir(parents=True, exist_ok=True)
    where = str(tmp_path)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 250:99 / / rw - ext4 /dev/a rw\n"
        f"2 1 0:198 / {where}/share rw shared:1 - nfs4 server:/x rw\n"
        f"3 1 0:199 / {where}/a\\040b rw - tmpfs tmpfs rw\n"
        "garbage\n"
    )
    assert examine.file_system_of(tmp_path / path, mounts) == kind
