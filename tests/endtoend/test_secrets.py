"""Secrets that the daemon is given turn up nowhere but where they are sent."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import bcrypt
import trio

from tests.endtoend import graphs
from tests.endtoend.daemon import ROOT, Daemon
from tests.endtoend.waiting import until

CANARY = "canary-3f9a1c"
PASSWORD = "canary-77bd02"
PATIENCE_S = 60


def holding(folder: Path, *secrets: str) -> list[Path]:
    """The files under *folder* in which one of *secrets* can be read, in clear or in base64."""
    needles = [each.encode() for each in secrets]
    needles += [base64.b64encode(each)[:-4] for each in needles]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(needle in path.read_bytes() for needle in needles)]


async def test_no_secret_is_told(simulator, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    daemon = Daemon(home, simulator.url, {"log": {"level": "debug", "format": "json"}})
    (home / "key").write_text(f"Bearer {CANARY}\n")
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    (home / "web.yml").write_text(f"basic_auth_users: {{prometheus: {hashed}}}\n")
    server = {"name": "local", "url": simulator.url, "headers": {"Authorization": {"file": "key"}}}
    daemon.rewrite(servers=[server], metrics={"listen": "127.0.0.1:0", "web_config": "web.yml"})
    given = base64.b64encode(f"prometheus:{PASSWORD}".encode()).decode()
    login = {"Authorization": f"Basic {given}"}
    said = tmp_path / "said"
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            simulator.faults.set("post-fail=500:1")
            daemon.drop("good.json", graphs.picture(1))
            daemon.drop("bad.json", graphs.failing(2))
            daemon.drop("none.json", b"nonsense")
            await daemon.finish(3, within_s=30)
            pages = [await daemon.get(path, login) for path in ("/", "/metrics", "/api/v1/status")]
            cmdline = await trio.Path(f"/proc/{daemon.pid}/cmdline").read_bytes()
            told = [*pages, cmdline]
            for words in (["status", "--json"], ["jobs"], ["reload"], ["reload", "--json"]):
                done = await trio.run_process(
                    [sys.executable, "-m", "comfyd", *words, "-c", str(daemon.config)],
                    cwd=ROOT,
                    check=False,
                    capture_stdout=True,
                    capture_stderr=True,
                )
                told += [done.stdout, done.stderr]
            (home / "key").write_text(f"Bearer {CANARY}\nand another line\n")  # refused, unquoted
            daemon.rewrite(servers=[server])
            done = await trio.run_process(
                [sys.executable, "-m", "comfyd", "reload", "-c", str(daemon.config)],
                cwd=ROOT,
                check=False,
                capture_stderr=True,
            )
            assert done.returncode == 78
            told.append(done.stderr)
            await until(lambda: "reload_refused" in daemon.log())
    said.write_bytes(b"\n".join(told))
    assert b"servers" in said.read_bytes()
    assert holding(tmp_path, CANARY, PASSWORD) == [home / "key"]
