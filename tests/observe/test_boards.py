"""Queries are found wherever a board has them, and become what Prometheus can read."""

from __future__ import annotations

from tests.observe.boards import RIGHTLY_EMPTY, Query, asked, boards, is_data, queries


def test_panels_rows_and_annotations_have_queries():
    board = {
        "title": "B",
        "panels": [
            {"title": "one", "targets": [{"expr": "a"}, {"expr": "b"}]},
            {
                "title": "row",
                "type": "row",
                "panels": [{"title": "two", "targets": [{"expr": "c"}]}],
            },
            {"title": "text", "type": "text"},
        ],
        "annotations": {"list": [{"name": "built in"}, {"name": "starts", "expr": "d"}]},
    }
    assert list(queries(board)) == [
        Query("B", "one", "a"),
        Query("B", "one", "b"),
        Query("B", "two", "c"),
        Query("B", "annotation: starts", "d"),
    ]


def test_variables_are_filled_in():
    expr = 'rate(x{job=~"$job", server=~"${server:regex}"}[$__rate_interval]) offset ${__interval}'
    assert asked(expr) == 'rate(x{job=~".+", server=~".+"}[20s]) offset 5s'
    assert asked("increase(x[$__range])") == "increase(x[10m])"


def test_an_answer_of_nothing_or_of_nan_is_no_data():
    assert not is_data([])
    assert not is_data([{"values": []}, {"values": [[1, "NaN"]]}])
    assert is_data([{"values": [[1, "NaN"], [2, "0"]]}])


def test_what_is_rightly_empty_is_on_a_board():
    there = {(query.board, query.title) for board in boards() for query in queries(board)}
    assert set(RIGHTLY_EMPTY) <= there
