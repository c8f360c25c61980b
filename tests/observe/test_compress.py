"""Fast motion changes spans of time, and nothing else."""

from __future__ import annotations

import re

import pytest

from tests.grafana.test_rules import ALERTS, EVERY, GROUPS
from tests.observe.compress import compressed, milliseconds, shorter

FACTOR = 30


@pytest.mark.parametrize(
    ("span", "short"),
    [
        ("1h", "120000ms"),
        ("5m", "10000ms"),
        ("30s", "1000ms"),
        ("1h30m", "180000ms"),
        ("0s", "0ms"),
    ],
)
def test_a_span_is_cut_down(span, short):
    assert shorter(span, FACTOR) == short


@pytest.mark.parametrize("span", ["", "5", "5x", "m", "5m ", "1.5h", "20ms"])
def test_what_is_no_span_or_would_vanish_is_refused(span):
    with pytest.raises(ValueError, match=r"span|short"):
        shorter(span, FACTOR)


def test_ranges_and_offsets_change_and_numbers_stay():
    rule = {"alert": "A", "expr": 'x{a="[5m]"} offset 1h > 3600 and rate(y[5m]) > 5', "for": "2m"}
    [group] = compressed({"groups": [{"name": "g", "interval": "30s", "rules": [rule]}]}, 60)[
        "groups"
    ]
    assert group == {
        "name": "g",
        "interval": "500ms",
        "rules": [
            {
                "alert": "A",
                "expr": 'x{a="[5000ms]"} offset 60000ms > 3600 and rate(y[5000ms]) > 5',
                "for": "2000ms",
            }
        ],
    }


def masked(text):
    return re.sub(r"\d+(?:ms|[smhd])\b", "SPAN", text)


def test_the_shipped_rules_are_the_same_but_for_their_spans():
    fast = [
        rule
        for group in compressed({"groups": GROUPS}, FACTOR)["groups"]
        for rule in group["rules"]
    ]
    assert len(fast) == len(EVERY)
    for ours, shipped in zip(fast, EVERY, strict=True):
        assert masked(ours["expr"]) == masked(shipped["expr"])
        spans = re.findall(r"\[(\w+)\]", ours["expr"]), re.findall(r"\[(\w+)\]", shipped["expr"])
        for short, long in zip(*spans, strict=True):
            assert milliseconds(short) * FACTOR == milliseconds(long)
        rest = ("alert", "record", "labels", "annotations")
        assert [ours.get(key) for key in rest] == [shipped.get(key) for key in rest]
        assert ("for" in ours) == ("for" in shipped)
    assert any("for" in rule for rule in ALERTS.values())


def test_a_factor_of_one_changes_nothing_that_counts():
    [group] = compressed({"groups": GROUPS[:1]}, 1)["groups"]
    for ours, shipped in zip(group["rules"], GROUPS[0]["rules"], strict=True):
        assert masked(ours["expr"]) == masked(shipped["expr"])
