"""Prometheus can read every query of the boards, and answers the intricate ones as it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from grafana import make
from grafana.overview import EMPTY_IN
from tests.grafana import linter
from tests.grafana.prometheus import needs_promtool, promtool

BOARDS = [json.loads(path.read_text(encoding="utf-8")) for path in make.FOLDER.iterdir()]
LABELS = 'job="comfyd", instance="here"'


@needs_promtool
def test_prometheus_can_read_every_query(tmp_path):
    queries = [query for board in BOARDS for _, query in linter.queries(board)]
    rules = [
        {"record": f"board:query_{number}:any", "expr": asked(query)}
        for number, query in enumerate(queries)
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
    for board in BOARDS:
        [query] = [
            mark["expr"]
            for mark in board["annotations"]["list"]
            if mark["name"] == "comfyd started"
        ]
        series = {
            f"process_start_time_seconds{{{LABELS}}}": life,
            'process_start_time_seconds{job="node", instance="here"}': "1x2 _x2 2x9",
            f"comfyd_build_info{{{LABELS}}}": re.sub(r"\d+x", "1x", life),
        }
        answers(tmp_path, query, series, minute, marked)
