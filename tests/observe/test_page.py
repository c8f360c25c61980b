"""The page of what was seen tells of every alert that is shipped, and of no other."""

from __future__ import annotations

import re

from tests.grafana.test_rules import ALERTS, ROOT

PAGE = ROOT / "docs" / "observed-alerts.md"


def test_every_alert_was_seen():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| .* \| \d+ s \| \d+ s \|$", text, re.M
    )
    assert rows
    assert all(name == page for name, page in rows)
    assert {name for name, _ in rows} == set(ALERTS), "run: make observe WRITE=1"
