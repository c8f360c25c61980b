"""A run is good only if everything came, went, and came nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.observe import boards
from tests.observe.boards import Query
from tests.observe.report import Report
from tests.observe.stage import Seen

SEEN = Seen("ComfydDown", "daemon", "`kill -9`", fired_s=5.4, resolved_s=2.0)
GOOD = Report(
    seen=[SEEN],
    stray=[],
    empty=[],
    answered=7,
    exemplars=1,
    took_s=321.0,
    versions=["Prometheus 2", "Alertmanager 0"],
    daemons=3,
    factor=20,
    scrape_s=2,
)
SHIPPED = {"ComfydDown"}
EMPTY = Query("Overview", "Jobs", "x")


def test_a_good_run_has_no_problems():
    assert GOOD.problems(SHIPPED) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seen": [replace(SEEN, fired_s=None)]}, "did not fire at daemon"),
        ({"seen": [replace(SEEN, resolved_s=None)]}, "did not resolve at daemon"),
        ({"stray": ["A fired at well"]}, "A fired at well"),
        ({"exemplars": 0}, "no exemplar"),
        ({"empty": [EMPTY]}, "the board Overview has no data for Jobs: x"),
    ],
)
def test_what_is_wrong_is_a_problem(changes, problem):
    [found] = replace(GOOD, **changes).problems(SHIPPED)
    assert problem in found


def test_an_alert_without_a_scene_is_a_problem():
    assert GOOD.problems({"ComfydDown", "ComfydNew"}) == ["ComfydNew has no scene"]


def test_a_part_of_the_scenes_need_not_fill_the_boards():
    assert replace(GOOD, empty=[EMPTY]).problems(set()) == []


def test_what_is_listed_as_empty_must_be(monkeypatch):
    monkeypatch.setitem(boards.RIGHTLY_EMPTY, ("Overview", "Jobs"), "nothing is retried")
    assert replace(GOOD, empty=[EMPTY]).problems(SHIPPED) == []
    [found] = GOOD.problems(SHIPPED)
    assert "has data for Jobs" in found


def test_the_page_shows_what_was_seen(monkeypatch):
    page = GOOD.page()
    assert "| [ComfydDown](runbooks/ComfydDown.md) | `kill -9` | 5 s | 2 s |\n" in page
    assert page.endswith("7 had data.\n")
    monkeypatch.setitem(boards.RIGHTLY_EMPTY, ("Overview", "Jobs"), "nothing is retried")
    assert replace(GOOD, empty=[EMPTY]).page().endswith("\n- Overview, Jobs: nothing is retried\n")
