"""docs/monitoring.md shows what works, and explains what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana import make
from tests.grafana import linter
from tests.grafana.prometheus import needs_promtool, promtool

ROOT = Path(__file__).parents[2]
BOARDS = [json.loads(path.read_text(encoding="utf-8")) for path in make.FOLDER.iterdir()]
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
    assert source["type"] == linter.variables(BOARDS[0])["datasource"]["query"]
    [settings, *_] = scrapes()
    assert source["jsonData"]["timeInterval"] == settings["global"]["scrape_interval"]


def test_the_boards_are_read_from_where_the_page_puts_them():
    provider = provisioned("dashboards")
    assert provider["type"] == "file"
    assert f"grafana/dashboards/*.json {provider['options']['path']}/\n" in PAGE


def test_every_board_and_every_row_of_it_is_explained():
    for board in BOARDS:
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
