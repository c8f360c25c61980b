"""Idempotency keys: which drops are jobs of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core.facts import Claimed
from comfyd.core.keys import Absorbed, judge
from comfyd.core.model import JobId, Outcome, Reason, Row, State


def row(job: str, key: str | None = "k", sha256: str = "1", retry_of: str | None = None) -> Row:
    return Row(
        job=JobId(job),
        seq=int(job, 36),
        key=key,
        sha256=sha256,
        retry_of=None if retry_of is None else JobId(retry_of),
        queue_by=9.0,
    )


@pytest.mark.parametrize("state", State)
def test_the_same_again_is_absorbed_whatever_became_of_the_first(state: State) -> None:
    holder = Row(job=JobId("a"), seq=1, key="k", sha256="1", state=state)
    assert judge(row("b"), holder) == Absorbed(row("b"), JobId("a"))


@pytest.mark.parametrize(
    ("drop", "holder"),
    [
        (row("b", None), None),
        (row("b", None), row("a")),  # asked needlessly
        (row("b"), None),
        (row("b"), row("b")),  # claimed again after a crash
        (row("b", sha256="2"), row("b")),
        (row("b", retry_of="a"), row("a")),
        (row("b", sha256="2", retry_of="a"), row("a")),
    ],
)
def test_a_job_of_its_own_is_left_as_it_is(drop: Row, holder: Row | None) -> None:
    assert judge(drop, holder) is drop


def test_other_content_fails_names_the_other_job_and_leaves_it_the_key() -> None:
    judged = judge(row("b", sha256="2"), row("a"))
    assert isinstance(judged, Row)
    assert (judged.state, judged.key, judged.queue_by) == (State.COLLECTING, None, None)
    assert judged.outcome == Outcome(
        state=State.FAILED,
        reason=Reason.CONFLICT,
        message="Job a has the same key and other content; give this one a key of its own.",
        detail={"key": "k", "job": "a"},
    )


drops = st.lists(
    st.tuples(st.sampled_from(["k", "l", None]), st.sampled_from("12"), st.booleans()), max_size=12
)


@given(drops)
def test_each_key_is_one_content_and_each_drop_is_told_where_it_is(
    told: list[tuple[str | None, str, bool]],
) -> None:
    """Drops in any order, some of them judged again after a crash that lost the answer."""
    rows: dict[str, Row] = {}
    newest: dict[str, Row] = {}
    for number, (key, sha256, again) in enumerate(told, 1):
        drop = row(f"{number}", key, sha256)
        for _ in range(2 if again else 1):
            judged = judge(drop, newest.get(key) if key else None)
            if isinstance(judged, Absorbed):
                into = rows[judged.into]
                assert (into.key, into.sha256) == (key, sha256)
                continue
            assert Claimed(row=judged).row.job == drop.job
            rows[judged.job] = judged
            if judged.key is not None:
                newest[judged.key] = judged
    for key in ("k", "l"):
        holding = [each for each in rows.values() if each.key == key]
        assert len(holding) <= 1
