"""The rules are clean, say what they mean, and fire when they must and only then: promtool says so.

The expressions themselves are proven by rules/*.yaml, which promtool runs; what it does not look at
is held here: that every alert has its runbook, its tests, and metrics that exist.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from comfyd.metrics import Metrics
from tests.grafana.prometheus import needs_promtool, promtool

ROOT = Path(__file__).parents[2]
RULES = ROOT / "grafana" / "rules" / "comfyd.rules.yaml"
TESTS = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
RUNBOOKS = ROOT / "docs" / "runbooks"
URL = "https://github.com/comfyd/comfyd/blob/main/docs/runbooks"

GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
EVERY = [rule for group in GROUPS for rule in group["rules"]]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in EVERY if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in EVERY if "record" in rule}

# Prometheus' own, and the client library's: not declared by us.
OTHERS = {"up", "process_start_time_seconds"}
FAMILIES = Metrics(CollectorRegistry()).families
NAMES = {family.name for family in FAMILIES}
SUFFIXES = ("_bucket", "_count", "_sum")


def cases() -> dict[str, list[tuple[dict[str, Any], list[Any]]]]:
    """Of each alert, its tests: where it stands, and what is expected to fire."""
    found: dict[str, list[tuple[dict[str, Any], list[Any]]]] = {}
    for path in TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for case in test.get("alert_rule_test", ()):
                found.setdefault(case["alertname"], []).append((test, case["exp_alerts"]))
    return found


def named(text: str) -> set[str]:
    """Every metric of ours, or of the process, that *text* names."""
    words = set(re.findall(r"(?<![:\w])(?:comfyd|process)_[a-z0-9_]+(?![:\w])", text))
    return {
        word.removesuffix(next((s for s in SUFFIXES if word.endswith(s)), ""))
        if word not in NAMES
        else word
        for word in words
    }


@needs_promtool
def test_promtool_finds_nothing_in_the_rules():
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))


@needs_promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_must_and_only_then(path):
    promtool("test", "rules", str(path))


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_seen_to_fire_and_to_keep_silent(alert):
    expected = [fires for _, fires in cases()[alert]]
    assert any(expected), "no test in which it fires"
    assert not all(expected), "no test in which it is silent"


@pytest.mark.parametrize(
    ("alert", "silencer"),
    [
        (name, silencer)
        for name, rule in ALERTS.items()
        for silencer in ("comfyd_server_draining", "comfyd_intake_paused")
        if silencer in rule["expr"] and name not in {"ComfydServerDraining", "ComfydIntakePaused"}
    ],
)
def test_what_a_person_asked_for_is_in_its_tests(alert, silencer):
    """There is a target or a server with that, which is never among those that fire."""
    word = silencer.rpartition("_")[2].replace("draining", "drained")
    fired = [
        each["exp_labels"].get(label)
        for _, fires in cases()[alert]
        for each in fires
        for label in ("instance", "server")
    ]
    told = {series["series"] for test, _ in cases()[alert] for series in test["input_series"]}
    assert any(silencer in series and f'"{word}"' in series for series in told)
    assert any(silencer not in series and f'"{word}"' in series for series in told)
    assert word not in fired


def test_every_test_is_of_an_alert():
    assert set(cases()) == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_a_person_needs(alert):
    rule = ALERTS[alert]
    assert re.fullmatch(r"Comfyd[A-Z][A-Za-z]+", alert)
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "{{" not in notes["summary"]  # one sentence to group by
    assert "{{ $labels.instance }}" in notes["description"] or alert == "ComfydDown"
    assert notes["summary"].endswith(".")
    assert notes["description"].strip().endswith(".")
    assert notes["runbook_url"] == f"{URL}/{alert}.md"


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_its_runbook(alert):
    page = (RUNBOOKS / f"{alert}.md").read_text(encoding="utf-8")
    rule = ALERTS[alert]
    severity, summary = rule["labels"]["severity"], rule["annotations"]["summary"]
    assert page.startswith(f"# {alert}\n\n`{severity}`: {summary}\n")
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)
    assert parts[1::2] == ["What it means", "How to see it", "What to do"]
    assert all(part.strip() for part in parts[2::2])
    row = f"| [{alert}]({alert}.md) | {severity} | {summary} |"
    assert row in (RUNBOOKS / "README.md").read_text(encoding="utf-8").splitlines()


def test_no_runbook_is_left_over():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*ALERTS, "README"}


@pytest.mark.parametrize(
    "path", [RULES, *sorted(RUNBOOKS.glob("*.md"))], ids=lambda path: path.name
)
def test_every_metric_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    assert named(text) - NAMES - OTHERS <= {"process_resident_memory_bytes"}
    assert set(re.findall(r"\w+:comfyd_\w+:\w+", text)) <= set(RECORDED)


def test_every_rule_names_a_metric():
    for rule in EVERY:
        expr = rule["expr"]
        assert named(expr) or re.search(r"\w+:comfyd_\w+:", expr) or "up{" in expr, expr


def test_the_words_that_labels_are_asked_for_are_their_words():
    """``{state="weged"}`` would be a good expression that never fires."""
    values = {family.name.removesuffix("_total"): family.labels for family in FAMILIES}
    seen = 0
    text = RULES.read_text(encoding="utf-8")
    for name, matchers in re.findall(r"(comfyd_\w+)\{([^}]*)\}", text):
        labels = values[name.removesuffix("_total")]
        for label, operator, asked in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            known = labels[label]
            assert not isinstance(known, str)
            words = asked.split("|") if operator in {"=~", "!~"} else [asked]
            assert set(words) <= known, (name, label, asked)
            seen += 1
    assert seen > 10


def test_a_recording_rule_is_named_by_level_metric_and_operations():
    for name in RECORDED:
        level, metric, operations = name.split(":")
        assert level.split("_")[0] == "instance"  # every rule keeps job and instance
        assert metric.startswith("comfyd_")
        assert "_total" not in metric
        assert re.fullmatch(r"(rate|increase|ratio_increase|p\d\d_?)\d+[mh]|p\d\d_\d+m", operations)


def test_rules_keep_the_labels_that_targets_have():
    """``by`` drops what an operator adds to targets, such as an environment."""
    for rule in EVERY:
        assert not re.search(r"\bby \(", rule["expr"]), rule
