"""What goes and what stays: tables, and that nothing newer ever goes before something older."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from comfyd.core.model import JobId, Row, Staged, State
from comfyd.core.retention import (
    FORGET_AFTER_S,
    Bounds,
    Count,
    Kept,
    Past,
    Place,
    Tally,
    forgotten_until,
    is_forgotten,
    kept_of,
    may_go,
    minted_s,
    why_removed,
)

DAY_S = 86400.0
NOW_S = 1_900_000_000.0


def ulid(at_s: float) -> str:
    digits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    number = int(at_s * 1000)
    return "".join(digits[number >> shift & 31] for shift in range(45, -1, -5)) + "0" * 16


def job(at_s: float, stem: str = "fox") -> JobId:
    return JobId(f"{stem}.{ulid(at_s)}")


def result(number: int, size: int = 1, at: float | None = None) -> Kept:
    name = JobId(f"fox.{number:03}")
    return Kept(job=name, place=Place.DONE, at=float(number if at is None else at), bytes=size)


def going(kept: list[Kept], bounds: Bounds, now_s: float) -> list[str]:
    """What a round removes of what is there, with its pages of two."""
    newest = sorted(kept, key=lambda each: each.order, reverse=True)
    count = Count(bounds=bounds)
    for at in range(0, len(newest), 2):
        count = count.counted(newest[at : at + 2])
    oldest_first = reversed(newest)
    return [k.job for k in oldest_first if why_removed(k, bounds, count.cut, now_s=now_s)]


@pytest.mark.parametrize(
    ("bounds", "gone"),
    [
        (Bounds(), 0),
        (Bounds(age_s=100.0), 0),
        (Bounds(age_s=10.0), 0),  # the oldest is just so old
        (Bounds(age_s=9.5), 1),
        (Bounds(age_s=7.5), 3),
        (Bounds(count=5), 0),
        (Bounds(count=3), 2),
        (Bounds(count=0), 5),
        (Bounds(bytes=50), 0),
        (Bounds(bytes=49), 1),
        (Bounds(bytes=30), 2),
        (Bounds(bytes=0), 5),
        (Bounds(age_s=9.5, count=3), 2),  # whichever is exceeded first
        (Bounds(age_s=7.5, count=3, bytes=45), 3),
        (Bounds(age_s=100.0, count=100, bytes=19), 4),
    ],
)
def test_the_oldest_go_until_every_bound_is_kept(bounds, gone):
    kept = [result(number, 10) for number in range(5)]
    assert going(kept, bounds, 10.0) == [each.job for each in kept[:gone]]


def test_a_large_result_makes_all_older_ones_go():
    """No smaller one that is older stays for there being room for it."""
    kept = [result(0, 1), result(1, 100), result(2, 1)]
    assert going(kept, Bounds(bytes=50), 5.0) == [kept[0].job, kept[1].job]


few = st.none() | st.integers(0, 8)
bounds_st = st.builds(Bounds, age_s=st.none() | st.floats(0.0, 12.0), count=few, bytes=few)
results_st = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=9).map(
    lambda drawn: [result(n, size, at) for n, (at, size) in enumerate(drawn)]
)


@given(kept=results_st, bounds=bounds_st)
def test_what_stays_is_newest_within_bounds_and_as_much_as_possible(kept, bounds):
    gone = set(going(kept, bounds, 10.0))
    order = sorted(kept, key=lambda each: each.order)
    assert {each.job for each in order[: len(gone)]} == gone
    stays = order[len(gone) :]

    def within(results: list[Kept]) -> bool:
        tally = Tally(count=len(results), bytes=sum(each.bytes for each in results))
        young = bounds.age_s is None or all(each.at >= 10.0 - bounds.age_s for each in results)
        return young and tally.exceeds(bounds) is None

    assert within(stays)
    assert not gone or not within(order[len(gone) - 1 :])


# --- rows ----------------------------------------------------------------------------------------

OLD_S = NOW_S - 2 * DAY_S
OVER = Row(job=job(OLD_S), seq=1, state=State.DONE, retired=True, published_at=OLD_S)


@pytest.mark.parametrize(
    ("changes", "told", "fenced", "goes"),
    [
        ({}, False, False, True),
        ({"state": State.FAILED}, False, False, True),
        ({"state": State.CANCELLED}, False, False, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({"retired": False}, False, False, False),
        ({"key": "nightly"}, False, False, False),
        ({"published_at": NOW_S - 10}, False, False, False),
        ({"job": job(NOW_S - 10)}, False, False, False),
        ({"job": job(NOW_S + 900 * DAY_S)}, False, False, False),  # a clock that was wrong
        ({"job": JobId("fox")}, False, False, False),
        *(({"state": state}, False, False, False) for state in State if not state.final),
    ],
)
def test_a_row_goes_when_nothing_needs_it(changes, told, fenced, goes):
    past = Past(row=replace(OVER, **changes), told=told)
    assert may_go(past, fenced=fenced, now_s=NOW_S) is goes


@given(st.lists(st.floats(1e9, NOW_S - FORGET_AFTER_S), min_size=1), st.floats(0, 86399))
def test_the_id_of_no_forgotten_job_is_used_again_and_every_new_one_is(made, ago):
    jobs = [job(at_s) for at_s in made]
    until_s = 0.0
    for each in jobs:
        until_s = forgotten_until(until_s, [each])
    assert all(is_forgotten(each, until_s) for each in jobs)
    assert not is_forgotten(job(NOW_S - ago), until_s)


def test_an_id_tells_when_it_was_made_if_it_is_one():
    assert minted_s(job(NOW_S)) == NOW_S
    assert minted_s(JobId("fox.01K0")) is None
    assert minted_s(JobId("fox.01ILOU00000000000000000000")) is None
    assert minted_s(JobId("fox")) is None
    assert not is_forgotten(JobId("fox"), NOW_S)


@pytest.mark.parametrize("state", State)
def test_only_a_job_that_is_over_has_a_result(state):
    row = Row(
        job=OVER.job, seq=1, state=state, claimed_at=5.0, published_at=9.0,
        staged=Staged(manifest_sha256="0", bytes=12),
    )  # fmt: skip
    place = Place.DONE if state is State.DONE else Place.FAILED
    expected = Kept(job=row.job, place=place, at=9.0, bytes=12) if state.final else None
    assert kept_of(row) == expected
    if expected is not None:
        assert kept_of(replace(row, published_at=None, staged=None)) == replace(
            expected, at=5.0, bytes=0
        )
