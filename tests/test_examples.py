"""What the README and the unit file show is what the program is: read there, held to the code."""

from __future__ import annotations

import configparser
import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from comfyd import config
from comfyd.cli.arguments import build_parser
from comfyd.cli.exits import Exit
from comfyd.core.model import Outcome, Reason, Row, Source, State
from comfyd.core.result import manifest
from comfyd.errors import JobFileError
from comfyd.metrics import Metrics
from comfyd.spool import jobfile
from comfyd.spool.layout import MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The code blocks of *language*."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def table(head: str) -> list[list[str]]:
    """The rows of the table that starts with *head*, as cells."""
    lines = README[README.index(f"\n| {head} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    """What stands between backquotes in *cell*."""
    return re.findall(r"`([^`]+)`", cell)


def named_first(start: str) -> list[str]:
    """What the rows of all tables name first, of that which starts with *start*."""
    return re.findall(rf"^\| `({start}[^`]+)`", README, re.MULTILINE)


# --- the README ---------------------------------------------------------------------------------


def test_the_example_of_a_job_document_is_a_job():
    [document] = [block for block in fenced("yaml") if block.startswith("workflow:")]
    job = jobfile.load(document.encode(), "example.yaml", draw=lambda: 0)
    assert (job.priority, job.max_attempts, job.metadata) == (5, 3, {"ticket": 42})
    assert (job.graph["1"]["inputs"]["width"], job.graph["1"]["inputs"]["color"]) == (128, 255)
    assert job.warnings == ()


def test_the_quick_start_submits_a_job_to_a_server_that_can_be_configured(tmp_path):
    console = "".join(fenced("console"))
    [settings] = re.findall(r"> comfyd.yaml <<'END'\n(.*?)^END$", console, re.M | re.S)
    [workflow] = re.findall(r"> blue.json <<'END'\n(.*?)^END$", console, re.M | re.S)
    defaults = config.defaults(tmp_path)
    assert config.parse(settings, file=None, base=tmp_path) == defaults
    assert set(jobfile.load(workflow.encode(), "blue.json", draw=lambda: 0).graph) == {"1", "2"}


def test_the_example_of_a_configuration_is_accepted(tmp_path):
    [settings] = [block for block in fenced("yaml") if block.startswith("spool:")]
    token = tmp_path / "token"
    token.write_text("Bearer hunter2")
    settings = settings.replace("/etc/comfyd/gpu2.token", str(token))
    servers = config.parse(settings, file=None, base=tmp_path).servers
    assert [server.name for server in servers] == ["gpu1", "gpu2"]


def test_the_settings_named_exist(tmp_path):
    defaults = config.defaults(tmp_path)
    known = {field.removesuffix("_s") for field in config.Config.__dataclass_fields__}
    for name in known.copy():
        section = getattr(defaults, name, None)
        if is_dataclass(section):
            known |= {f"{name}.{key.removesuffix('_s')}" for key in section.__dataclass_fields__}
    known |= {f"servers[].{key}" for key in config.Server.__dataclass_fields__}
    named = {name for row in table("setting") for name in quoted(row[0])}
    assert len(named) > 12
    assert named <= known


def test_the_folders_have_the_modes_that_are_told():
    told = {quoted(row[0])[0].split("/")[0]: int(row[1], 8) for row in table("folder")}
    assert told == MODES


def test_every_reason_is_explained():
    named = [name for row in table("reason") for name in quoted(row[0])]
    assert sorted(named) == sorted(reason.value for reason in Reason)


def test_every_way_to_learn_of_an_end_is_explained():
    [sentence] = re.findall(r"^- `completion` says(.*?)^- ", README, re.MULTILINE | re.DOTALL)
    assert set(quoted(sentence)) == {source.value for source in Source}


def test_every_exit_code_is_explained():
    assert [int(row[0]) for row in table("exit code")] == sorted(Exit)


def test_every_command_is_explained_and_none_that_is_not_there():
    said = {words.split()[1] for words in named_first("comfyd ")}
    listed = re.findall(r"^    ([a-z-]+)(?:  |$)", build_parser().format_help(), re.MULTILINE)
    assert said == set(listed)


def test_every_make_target_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert {*named_first("make ")} | {"make help"} == {f"make {name}" for name in targets}


def test_the_metrics_named_exist():
    registry = CollectorRegistry()
    Metrics(registry, version="0").prepare(["gpu"])
    known = {
        sample.name
        for metric in registry.collect()
        for sample in [*metric.samples, metric]
        if hasattr(sample, "name")
    }
    named = re.findall(r"`(comfyd_[a-z_]+)", README)
    assert len(set(named)) > 10
    assert set(named) <= known


def test_a_result_has_the_keys_that_are_shown():
    [shown] = [json.loads(block) for block in fenced("json")]
    row = Row(job=shown["job"], seq=1, outcome=Outcome(state=State.DONE))
    real = manifest(row, [], published_at=0.0)
    assert set(shown) == set(real)
    for key in ("times", "durations_s"):
        assert list(shown[key]) == list(real[key])


def test_the_whole_job_document_is_a_job_and_every_key_of_it_is_explained():
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    [document] = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    graph = {
        "10": {"class_type": "LoadImage", "inputs": {"image": ""}},
        "12": {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": ""}},
    }
    job = jobfile.load(
        document.encode(),
        "job.yaml",
        draw=lambda: 0,
        beside={"photo.png"},
        named=lambda name: json.dumps(graph).encode(),
    )
    assert (job.queue_s, job.run_s, job.stall_s) == (3600.0, 1800.0, 300.0)
    assert (job.key, job.files) == ("nightly-0042", {("10", "image"): "photo.png"})
    explained = re.findall(r"^\| `([a-z_]+)` \|", page.split("## Bundles")[0], re.M)
    assert explained == re.findall(r"^([a-z_]+):", document, re.M)
    with pytest.raises(JobFileError, match=re.escape(", ".join(explained))):
        jobfile.load(b'{"workflow": {}, "qqqqqq": 1}', "job.json", draw=lambda: 0)


def headings_of(page: Path) -> set[str]:
    """What may stand behind # in a link to *page*, as GitHub makes it."""
    found = re.findall(r"^##+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))])
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not heading or heading in headings_of(there), target


# --- the unit file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("ExecStart", "/opt/comfyd/bin/comfyd run -c /etc/comfyd/comfyd.yaml"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", f"{Exit.USAGE:d} {Exit.BUSY:d} {Exit.CONFIG:d}"),
        ("StateDirectory", "comfyd"),
        ("User", "comfyd"),
        ("WatchdogSec", "1min"),
        ("ExecReload", "/opt/comfyd/bin/comfyd reload -c /etc/comfyd/comfyd.yaml"),
    ],
)
def test_the_service_says_how_the_daemon_is_run(key: str, value: str | None):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # keys as they are written
    unit.read_string((ROOT / "systemd" / "comfyd.service").read_text())
    service: dict[str, Any] = dict(unit["Service"])
    assert service.get(key) == value
