"""What a shell is offered at a TAB: asked as the shells ask, by variables and descriptor 8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from comfyd.cli.arguments import SHELLS
from comfyd.core.model import JobId, Row, State
from tests.cli.conftest import GRAPH, Serve, Site
from tests.cli.test_reads import call

ROOT = Path(__file__).parents[2]


def offered(site: Site, line: str) -> set[str]:
    """The words offered at the end of *line*, where ``comfyd`` has the site's configuration."""
    environ = {
        **os.environ,
        "COMFYD_CONFIG": str(site.config), "PYTHONPATH": str(ROOT), "COMP_TYPE": "9",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m comfyd 8>&1 9>/dev/null 1>/dev/null"],
        env=environ, capture_output=True, text=True, timeout=30, check=False, cwd=site.home,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return {word.strip() for word in done.stdout.split("\n") if word.strip()}


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script_of_its_own(site: Site, shell: str):
    code, out, err = site("completion", shell)
    assert (code, err) == (0, "")
    assert "comfyd" in out
    assert ("__fish_comfyd_complete" in out) is (shell == "fish")


def test_the_script_is_one_for_bash(site: Site):
    _, out, _ = site("completion", "bash")
    done = subprocess.run(["bash", "-n"], input=out, text=True, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_a_usage_error(site: Site):
    code, _, err = site("completion", "tcsh")
    assert code == 64
    assert "bash" in err


def test_commands_options_states_and_servers_are_offered(site: Site):
    secret = "headers: {Authorization: {file: nobody-may-read-this}}"
    site.config.write_text(f"servers: [{{name: gpu1, url: 'http://127.0.0.1:1', {secret}}}]\n")
    assert offered(site, "comfyd ca") == {"cancel"}
    assert {"--dry-run", "--json"} <= offered(site, "comfyd gc --")
    assert "gpu1" in offered(site, "comfyd drain ")
    assert offered(site, "comfyd jobs --state r") == {"running"}
    assert offered(site, "comfyd completion f") == {"fish"}


def test_jobs_are_those_that_the_command_can_be_for(site: Site):
    states = {"fox": State.DONE, "owl": State.HELD, "elk": State.QUEUED}
    site.journal(
        *(
            Row(job=JobId(f"{name}.01A"), seq=seq, state=state, retired=state.final)
            for seq, (name, state) in enumerate(states.items(), 1)
        )
    )
    assert {"fox.01A", "owl.01A", "elk.01A"} <= offered(site, "comfyd show ")
    assert offered(site, "comfyd show f") == {"fox.01A"}
    assert offered(site, "comfyd release o") == {"owl.01A"}
    assert offered(site, "comfyd release f") == set()
    assert offered(site, "comfyd retry f") == {"fox.01A"}


def test_without_a_journal_or_with_a_bad_configuration_none_is_offered(site: Site):
    assert offered(site, "comfyd show f") == set()
    site.config.write_text("what: 1\n")
    assert offered(site, "comfyd show f") == set()
    assert offered(site, "comfyd drain g") == set()


async def test_a_running_daemon_is_asked(site: Site, daemon: Serve):
    async with daemon():
        _, out, _ = await call(site, "submit", "--wait", site.file("fox.json", GRAPH))
        assert await trio.to_thread.run_sync(offered, site, "comfyd show f") == {out.strip()}
