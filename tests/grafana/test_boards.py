"""The boards are what the generator makes, keep the linter's rules, and ask for what is there."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from comfyd import metrics
from grafana import make
from grafana.panels import RUNBOOKS
from grafana.servers import STATES
from tests.grafana import linter

ROOT = Path(__file__).parents[2]
FILES = {path.name: path.read_text(encoding="utf-8") for path in make.FOLDER.iterdir()}
BOARDS = {name: json.loads(text) for name, text in FILES.items()}
PAGES = ROOT / "docs" / "runbooks"
RULES = ROOT / "grafana" / "rules" / "comfyd.rules.yaml"


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


def runbooks() -> set[str]:
    """What the panels link to."""
    return {
        link["url"]
        for board in BOARDS.values()
        for panel in linter.panels(board)
        for link in panel.get("links") or []
    }


def test_panels_link_to_runbooks():
    assert len(runbooks()) > 10
    for url in runbooks():
        assert re.fullmatch(rf"{re.escape(RUNBOOKS)}/Comfyd[A-Za-z]+\.md", url)


def test_the_runbooks_are_those_of_the_alerts():
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert runbooks() <= {alert["annotations"]["runbook_url"] for alert in alerts}
    assert {Path(url).name for url in runbooks()} <= {path.name for path in PAGES.iterdir()}


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
