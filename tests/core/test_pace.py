"""When what waits will be ready."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core.pace import RUNS, SHORTEST_S, Forecast, Lane, Pace, forecast


def test_the_pace_is_the_median_of_the_last_runs():
    pace = Pace()
    assert pace.run_s("a") is None
    for run_s in [900.0] * 3 + [10.0] * RUNS + [500.0]:
        pace.ran("a", run_s)
    assert pace.run_s("a") == 10.0


def test_a_server_that_ran_nothing_yet_is_expected_to_be_like_the_others():
    pace = Pace()
    assert pace.expected_s("b") is None
    pace.ran("a", 30.0)
    assert pace.run_s("b") is None
    assert pace.expected_s("b") == 30.0
    pace.ran("b", 0.0)
    assert pace.expected_s("b") == SHORTEST_S


def test_one_server_works_through_its_prompts_and_then_the_queue():
    told = forecast([Lane(10.0, (4.0, 0.0))], waiting=3, first=2)
    assert (told.there, told.queued) == (((6.0, 16.0),), (26.0, 36.0))
    assert told.all_s == pytest.approx(46.0)


def test_a_run_that_takes_longer_than_usual_is_expected_to_go_on():
    assert forecast([Lane(10.0, (40.0,))], waiting=0, first=0).there == ((10.0,),)


def test_the_prompts_of_others_come_first():
    assert forecast([Lane(10.0, (0.0,), others=2)], waiting=1, first=1).queued == (40.0,)
    assert forecast([Lane(10.0, others=2)], waiting=1, first=1).queued == (30.0,)


def test_who_is_ready_first_gets_the_next():
    told = forecast([Lane(10.0), Lane(30.0)], waiting=4, first=4)
    assert told.queued == (10.0, 20.0, 30.0, 30.0)
    assert told.all_s == pytest.approx(30.0)


def test_without_a_server_nothing_is_known():
    assert forecast([], waiting=5, first=5) == Forecast()


LANES = st.builds(
    Lane,
    st.floats(SHORTEST_S, 1e5),
    st.lists(st.floats(0, 1e5), max_size=4).map(tuple),
    st.integers(0, 20),
)


@given(st.lists(LANES, min_size=1, max_size=5), st.integers(0, 100), st.integers(0, 100))
def test_a_forecast_is_in_order_and_ends_with_the_last(lanes, waiting, first):
    told = forecast(lanes, waiting=waiting, first=first)
    assert len(told.queued) == min(waiting, first)
    assert list(told.queued) == sorted(told.queued)
    assert all(list(ends) == sorted(ends) for ends in told.there)
    assert told.all_s is not None
    last = [*told.queued, *(end for ends in told.there for end in ends)]
    assert all(told.all_s >= each >= 0 for each in last)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=4), st.integers(1, 300))
def test_the_end_of_a_long_queue_is_near_to_what_working_through_it_gives(paces, waiting):
    lanes = [Lane(run_s) for run_s in paces]
    exact = forecast(lanes, waiting=waiting, first=waiting).queued[-1]
    about = forecast(lanes, waiting=waiting, first=0).all_s
    assert about is not None
    assert exact - max(paces) <= about <= exact + 1e-6
