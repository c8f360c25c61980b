"""The dashboards are what the generator makes, keep the linter's rules, and ask for what is there.

Whether their queries find anything is tried against a real Prometheus by `make observe`.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from comfyd import metrics
from grafana import make
from grafana.overview import EMPTY_IN
from grafana.panels import RUNBOOKS
from grafana.servers import STATES
from tests.grafana import linter

ROOT = Path(__file__).parents[2]
FILES = {path.name: path.read_text(encoding="utf-8") for path in make.FOLDER.iterdir()}
BOARDS = {name: json.loads(text) for name, text in FILES.items()}
PAGES = ROOT / "docs" / "runbooks"


def test_the_committed_boards_are_what_the_generator_makes():
    assert make.files() == FILES, "run: make boards"


@pytest.mark.parametrize("rule", linter.LINTER + linter.OURS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", BOARDS)
def test_a_board_keeps_the_rules(name, rule):
    assert list(rule(BOARDS[name])) == []


def test_every_state_of_a_server_has_its_colour():
    assert set(STATES) == metrics.SERVER_STATES
    assert len({value for value, _ in STATES.values()}) == len(STATES)


def test_uids_and_titles_are_unique_and_short_enough_for_grafana():
    uids = [board["uid"] for board in BOARDS.values()]
    assert len({*uids}) == len({board["title"] for board in BOARDS.values()}) == len(BOARDS)
    assert all(len(uid) <= 40 for uid in uids)


# --- the rules find what they should --------------------------------------------------------------


def broken(rule, **changes):
    """What *rule* says of a board whose first panel has been given *changes*."""
    board = copy.deepcopy(BOARDS["servers.json"])
    panel = linter.panels(board)[0]
    expr = changes.pop("expr", None)
    if expr is not None:
        panel["targets"] = [{**panel["targets"][0], "expr": expr}]
    panel.update(changes)
    return list(rule(board))


OF_SERVERS = '{job=~"$job", instance=~"$instance", server=~"$server"}'


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (linter.panel_datasource, {"datasource": {"type": "prometheus", "uid": "abc"}}),
        (linter.panel_title_and_description, {"title": ""}),
        (linter.panel_title_and_description, {"description": ""}),
        (linter.panel_units, {"fieldConfig": {"defaults": {"unit": "furlongs"}}}),
        (linter.panel_targets, {"targets": []}),
        (linter.target_promql, {"expr": "sum(comfyd_jobs"}),
        (linter.target_rate_interval, {"expr": "rate(comfyd_outputs_total[5m])"}),
        (linter.target_job_and_instance, {"expr": "comfyd_jobs"}),
        (linter.target_job_and_instance, {"expr": 'comfyd_jobs{job="$job"}'}),
        (linter.target_counter_agg, {"expr": "comfyd_outputs_total"}),
        (
            linter.target_counter_agg,
            {"expr": "rate(comfyd_outputs_total[5m]) + comfyd_outputs_total"},
        ),
        (linter.known_metrics, {"expr": "comfyd_server_upp"}),
        (linter.known_metrics, {"expr": "comfyd_job_duration_seconds"}),
        (linter.known_metrics, {"expr": "comfyd_outputs"}),
        (linter.known_metrics, {"expr": 'comfyd_jobs{server="a"}'}),
        (linter.known_metrics, {"expr": 'comfyd_jobs{state=~"queued|asleep"}'}),
        (linter.known_groups, {"expr": "sum by (phase) (comfyd_jobs)"}),
        (linter.known_legends, {"expr": "sum(comfyd_server_up)"}),
        (linter.known_legends, {"expr": "comfyd_jobs"}),
        (linter.follows_the_server, {"expr": "comfyd_server_up"}),
        (linter.follows_the_server, {"expr": f"comfyd_jobs{OF_SERVERS}"}),
        (linter.layout, {"gridPos": {"x": 0, "y": 1, "w": 13, "h": 8}}),
        (linter.layout, {"gridPos": {"x": 0, "y": 1, "w": 12, "h": 9}}),
        (linter.layout, {"id": 3, "gridPos": {"x": 0, "y": 1, "w": 12, "h": 8}}),
    ],
)
def test_a_rule_finds_what_it_should(rule, changes):
    assert broken(rule) == []
    assert broken(rule, **changes) != []


@pytest.mark.parametrize(
    ("rule", "name", "change"),
    [
        (linter.template_datasource, "datasource", {"label": "Where"}),
        (linter.template_job_and_instance, "job", {"name": "work"}),
        (linter.template_job_and_instance, "server", {"allValue": ""}),
        (linter.template_job_and_instance, "instance", {"datasource": {"uid": "abc"}}),
        (linter.template_label_promql, "server", {"query": "comfyd_server_up"}),
        (linter.template_reload, "server", {"refresh": 1}),
    ],
)
def test_a_rule_for_variables_finds_what_it_should(rule, name, change):
    board = copy.deepcopy(BOARDS["servers.json"])
    linter.variables(board)[name].update(change)
    assert list(rule(board)) != []


def test_a_board_that_can_be_edited_is_found():
    assert list(linter.uneditable({"editable": True})) != []


@pytest.mark.parametrize("name", sorted({f.name for f in linter.families().values()}))
def test_a_renamed_metric_is_found(name, monkeypatch):
    known = {made: family for made, family in linter.families().items() if family.name != name}
    monkeypatch.setattr(linter, "families", lambda: known)
    assert any(list(linter.known_metrics(board)) for board in BOARDS.values())


# --- Prometheus -----------------------------------------------------------------------------------


def promtool(*arguments: str) -> str:
    """What it says; it must have nothing against what it is given."""
    ran = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)
LABELS = 'job="comfyd", instance="here"'


@needs_promtool
def test_prometheus_can_read_every_query(tmp_path):
    rules = [
        {"record": f"board:query_{number}:any", "expr": asked(query)}
        for board in BOARDS.values()
        for number, (_, query) in enumerate(linter.queries(board))
    ]
    file = tmp_path / "boards.rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


def asked(query: str) -> str:
    """*query* as Prometheus gets it."""
    for variable in ("$job", "$instance", "$server"):
        query = query.replace(variable, ".+")
    return query.replace("$__rate_interval", "2m")


def answers(tmp_path: Path, query: str, series: dict[str, str], minute: int, values: list[float]):
    """Hold what Prometheus answers to *query* at *minute*, for *series* of a sample a minute."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": samples} for name, samples in series.items()],
        "promql_expr_test": [
            {
                "expr": asked(query),
                "eval_time": f"{minute}m",
                "exp_samples": [
                    {"labels": '{instance="here"}', "value": value} for value in values
                ],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    promtool("test", "rules", str(file))


@needs_promtool
@pytest.mark.parametrize(
    ("queued", "up", "deaf", "runs_a_minute", "empty_in_s"),
    [
        (10, 1, 1, 10, [150.0]),  # 30 s each, on two servers
        (10, 1, 0, 10, [300.0]),
        (10, 0, 0, 10, []),  # no server works
        (10, 1, 1, 0, []),  # nothing has run: nobody knows how long a run is
        (0, 0, 0, 0, [0.0]),  # nothing waits, whatever the servers do
    ],
)
def test_the_time_until_all_is_done(tmp_path, queued, up, deaf, runs_a_minute, empty_in_s):
    series = {
        f'comfyd_jobs{{{LABELS}, state="queued"}}': f"{queued}x60",
        f'comfyd_jobs{{{LABELS}, state="held"}}': "7x60",
        f'comfyd_server_state{{{LABELS}, server="a", state="up"}}': f"{up}x60",
        f'comfyd_server_state{{{LABELS}, server="b", state="deaf"}}': f"{deaf}x60",
        f'comfyd_server_state{{{LABELS}, server="c", state="down"}}': "1x60",
        f'comfyd_job_duration_seconds_count{{{LABELS}, phase="run"}}': f"0+{runs_a_minute}x60",
        f'comfyd_job_duration_seconds_sum{{{LABELS}, phase="run"}}': f"0+{30 * runs_a_minute}x60",
        f'comfyd_job_duration_seconds_sum{{{LABELS}, phase="total"}}': "0+9999x60",
    }
    answers(tmp_path, EMPTY_IN, series, 60, empty_in_s)


@needs_promtool
@pytest.mark.parametrize(
    ("life", "minute", "marked"),
    [
        ("100x9", 5, []),
        ("100x4 900x9", 6, [1.0]),  # a restart between two scrapes
        ("100x4 900x9", 9, []),
        ("100x2 stale _x7 900x9", 12, [900.0]),  # a stop of eight minutes
        ("100x2 stale _x7 900x9", 15, []),
        ("100x2 stale _x9", 9, []),  # it is still down
    ],
)
def test_a_start_of_comfyd_is_marked(tmp_path, life, minute, marked):
    for board in BOARDS.values():
        [query] = [
            mark["expr"]
            for mark in board["annotations"]["list"]
            if mark["name"] == "comfyd started"
        ]
        answers(tmp_path, query, {f"process_start_time_seconds{{{LABELS}}}": life}, minute, marked)


# --- what is around the boards --------------------------------------------------------------------


def runbooks() -> set[str]:
    """The alerts whose runbooks the panels link to."""
    urls = {
        link["url"]
        for board in BOARDS.values()
        for panel in linter.panels(board)
        for link in panel.get("links") or []
    }
    assert all(re.fullmatch(rf"{re.escape(RUNBOOKS)}/Comfyd[A-Za-z]+\.md", url) for url in urls)
    return {Path(url).stem for url in urls}


def test_panels_link_to_runbooks():
    assert len(runbooks()) > 5


@pytest.mark.skipif(not PAGES.is_dir(), reason="the runbooks are not there yet")
def test_every_runbook_that_is_linked_to_exists():
    assert runbooks() <= {path.stem for path in PAGES.glob("*.md")}


PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
PROVISIONED = ROOT / "grafana" / "provisioning"


def provisioned(kind: str) -> dict[str, Any]:
    """The one thing that ``grafana/provisioning/<kind>/`` gives to Grafana."""
    [file] = (PROVISIONED / kind).iterdir()
    assert f"grafana/provisioning/{kind}/{file.name}" in PAGE
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert document["apiVersion"] == 1
    [only] = document["datasources" if kind == "datasources" else "providers"]
    return dict(only)


def test_the_data_source_is_one_that_the_boards_can_choose():
    source = provisioned("datasources")
    assert source["type"] == linter.variables(BOARDS["overview.json"])["datasource"]["query"]
    [settings, *_] = scrapes()
    assert source["jsonData"]["timeInterval"] == settings["global"]["scrape_interval"]


def test_the_boards_are_read_from_where_the_page_puts_them():
    provider = provisioned("dashboards")
    assert provider["type"] == "file"
    assert f"grafana/dashboards/*.json {provider['options']['path']}/\n" in PAGE


def test_every_board_and_every_row_of_it_is_explained():
    for board in BOARDS.values():
        assert f"\n**{board['title']}**" in PAGE
        for panel in board["panels"]:
            assert panel["type"] != "row" or f"\n| {panel['title']} | " in PAGE


def scrapes() -> list[dict[str, Any]]:
    """The configurations of Prometheus that the page shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [block for block in map(yaml.safe_load, blocks) if "scrape_configs" in block]


@needs_promtool
@pytest.mark.parametrize("number", range(2))
def test_prometheus_can_read_the_configurations_that_are_shown(tmp_path, number):
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(scrapes()[number]))
    promtool("check", "config", "--syntax-only", str(file))
    [scrape] = scrapes()[number]["scrape_configs"]
    assert scrape["job_name"] == "comfyd"
