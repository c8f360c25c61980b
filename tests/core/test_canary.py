"""The deaf-socket rule: what is deaf, and above all what is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core.canary import Canary

DEAF_AFTER_S = 5.0
COMPARE_EVERY_S = 20.0


def greeted(now_s: float = 0.0, remaining: int = 0, verdicts: int = 0) -> Canary:
    return Canary.greeted(
        now_s,
        remaining,
        deaf_after_s=DEAF_AFTER_S,
        compare_every_s=COMPARE_EVERY_S,
        verdicts=verdicts,
    )


def play(*steps: tuple[str, float, int]) -> tuple[Canary, list[bool]]:
    """Apply (what, when, remaining) in order; the verdicts of the comparisons."""
    canary, verdicts = greeted(), []
    for what, now_s, remaining in steps:
        match what:
            case "posted":
                canary = canary.posted(now_s)
            case "status":
                canary = canary.status(now_s, remaining)
            case "unanswered":
                canary = canary.unanswered(now_s)
            case "compared":
                canary, deaf = canary.compared(now_s, remaining)
                verdicts.append(deaf)
            case _:
                raise AssertionError(what)
    return canary, verdicts


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        # Idle and equal: never deaf.
        ([("compared", 20, 0), ("compared", 40, 0), ("compared", 60, 0)], [False] * 3),
        # Nothing comes after a POST: deaf at the second look, which follows at once.
        ([("posted", 1, 0), ("compared", 6, 1), ("compared", 6, 1)], [False, True]),
        # Even if the count is right by then: the job came and went unheard.
        ([("posted", 1, 0), ("compared", 6, 0), ("compared", 6, 0)], [False, True]),
        # The status came between the looks: it had only been overtaken.
        (
            [("posted", 1, 0), ("compared", 6, 1), ("status", 6, 1), ("compared", 26, 1)],
            [False, False],
        ),
        # A status in time, before or after the 200.
        ([("posted", 1, 0), ("status", 5, 1), ("compared", 20, 1)], [False]),
        ([("status", 1, 1), ("posted", 2, 0), ("compared", 20, 1)], [False]),
        # One from long before the POST does not count.
        (
            [("status", 1, 1), ("posted", 7, 0), ("compared", 12, 1), ("compared", 12, 1)],
            [False, True],
        ),
        # Two wrong counts in a row.
        ([("compared", 20, 3), ("compared", 40, 3)], [False, True]),
        ([("compared", 20, 3), ("compared", 40, 0), ("compared", 60, 3)], [False, False, False]),
        ([("compared", 20, 3), ("status", 21, 3), ("compared", 40, 4)], [False, False]),
    ],
)
def test_verdicts(steps: list[tuple[str, float, int]], verdicts: list[bool]) -> None:
    assert play(*steps)[1] == verdicts


def test_a_look_is_due_after_a_submission_and_every_interval() -> None:
    assert greeted(100).look_at_s == 120
    canary = greeted(100).posted(101)
    assert canary.look_at_s == 106
    assert canary.posted(103).look_at_s == 106  # the older debt stands
    assert canary.status(102, 1).look_at_s == 120
    assert canary.compared(106, 1)[0].look_at_s == 106  # once more, at once
    assert greeted(100).compared(120, 0)[0].look_at_s == 140


def test_a_server_that_answers_slowly_is_not_judged() -> None:
    canary, verdicts = play(("posted", 1, 0), ("unanswered", 11, 0))
    assert (canary.look_at_s, canary.doubts, verdicts) == (16, 0, [])
    assert greeted().unanswered(25).look_at_s == 30
    assert math.isinf(greeted().unanswered(25).due_at_s)


def test_two_deaf_connections_in_a_row_are_a_stalled_publisher() -> None:
    canary, _ = play(("posted", 1, 0), ("compared", 6, 1), ("compared", 6, 1))
    assert not canary.stalled
    again = greeted(7, 1, canary.verdicts).posted(8)
    again, _ = again.compared(13, 2)
    again, deaf = again.compared(13, 2)
    assert deaf
    assert again.stalled
    assert greeted(20, 2, again.verdicts).stalled  # a greeting proves nothing
    assert not again.status(20, 2).stalled


def test_a_status_between_two_deaf_verdicts_starts_the_count_anew() -> None:
    canary, _ = play(("status", 1, 1), ("posted", 10, 0), ("compared", 15, 1), ("compared", 15, 1))
    assert canary.verdicts == 1
    assert not greeted(20, 0, canary.verdicts).status(21, 0).stalled


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["posted", "status", "unanswered", "compared"]),
        st.floats(0, 30),
        st.integers(0, 3),
    ),
    max_size=40,
)


def in_order(steps: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    now_s, ordered = 0.0, []
    for what, gap_s, remaining in steps:
        now_s += gap_s
        ordered.append((what, now_s, remaining))
    return ordered


@given(STEPS)
def test_deaf_needs_two_looks_without_a_status_between(steps: list[tuple[str, float, int]]) -> None:
    canary, looks = greeted(), 0
    for what, now_s, remaining in in_order(steps):
        if what == "compared":
            looks += 1
            canary, deaf = canary.compared(now_s, remaining)
            assert not deaf or looks >= 2
            looks = 0 if deaf else looks
        elif what == "status":
            looks = 0
            canary = canary.status(now_s, remaining)
            assert not canary.stalled
        elif what == "posted":
            canary = canary.posted(now_s)
            assert canary.due_at_s <= now_s + DEAF_AFTER_S or (
                now_s - canary.heard_at_s <= DEAF_AFTER_S
            )
        else:
            canary = canary.unanswered(now_s)
            assert canary.look_at_s >= now_s + DEAF_AFTER_S
        assert not math.isinf(canary.look_at_s)


@given(STEPS, st.integers(1, 5))
def test_a_connection_that_hears_is_never_deaf(
    steps: list[tuple[str, float, int]], changes: int
) -> None:
    """Every change of the queue is heard before the next look."""
    canary = greeted()
    for what, now_s, remaining in in_order(steps):
        if what == "posted":
            for _ in range(changes):
                canary = canary.status(now_s, remaining)
            canary = canary.posted(now_s)
        elif what == "unanswered":
            canary = canary.unanswered(now_s)
        else:
            canary, deaf = canary.compared(now_s, canary.remaining)
            assert not deaf
