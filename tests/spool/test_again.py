"""A retry's file: claimed anew from a result, exactly as it was submitted, or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from comfyd.core.model import Row, State
from comfyd.errors import DiskFull, JobFileError
from comfyd.spool import again
from comfyd.spool.again import claim_again
from comfyd.spool.delivery import reap
from comfyd.spool.layout import Spool, is_job_id
from tests.spool.conftest import GRAPH, MakeIntake

NOW_S = 1_900_000_000.0
RANDOM = b'{"workflow": %s, "set": {"3.seed": "random"}, "priority": 5}' % GRAPH
MAX_BYTES = 10_000


def ended(
    spool: Spool, data: bytes = RANDOM, state: State = State.FAILED, end: str = ".json"
) -> Row:
    """A job that has ended, and its folder."""
    row = Row(
        job="fox.01ARZ3NDEKTSV4RRFFQ69G5FAV",  # type: ignore[arg-type]
        seq=1,
        state=state,
        payload=f"fox.01ARZ3NDEKTSV4RRFFQ69G5FAV{end}",
        sha256=hashlib.sha256(data).hexdigest(),
        key="nightly",
        drawn={"3.seed": 99},
    )
    folder = spool.root / ("done" if state is State.DONE else "failed") / row.job
    folder.mkdir()
    (folder / f"job{end}").write_bytes(data)
    return row


def once_more(spool: Spool, make_intake: MakeIntake, row: Row) -> Row:
    claimed = claim_again(make_intake(spool), row, max_file_bytes=MAX_BYTES, now_s=lambda: NOW_S)
    return claimed.row


def folder_of(spool: Spool, row: Row) -> Path:
    return spool.failed / row.job


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.CANCELLED])
def test_a_new_job_of_the_same_bytes_seeds_and_key(
    spool: Spool, make_intake: MakeIntake, state: State
) -> None:
    old = ended(spool, state=state)
    new = once_more(spool, make_intake, old)
    assert new.job != old.job
    assert is_job_id(new.job)
    assert new.job.startswith("fox.")
    assert (new.state, new.retry_of, new.key) == (State.QUEUED, old.job, "nightly")
    assert (new.drawn, new.priority, new.sha256) == ({"3.seed": 99}, 5, old.sha256)
    assert (spool.claimed / new.payload).read_bytes() == RANDOM
    assert os.listdir(spool.stage) == []


def test_what_was_never_drawn_is_drawn_now(spool: Spool, make_intake: MakeIntake) -> None:
    old = msgspec.structs.replace(ended(spool), drawn={})
    assert once_more(spool, make_intake, old).drawn == {"3.seed": 4242}


def test_a_yaml_job_stays_one(spool: Spool, make_intake: MakeIntake) -> None:
    old = ended(spool, b'"3": {class_type: KSampler, inputs: {seed: 1}}\n', end=".yaml")
    new = once_more(spool, make_intake, old)
    assert new.payload == f"{new.job}.yaml"
    assert new.outcome is None


def ended_bundle(spool: Spool, make_intake: MakeIntake) -> Row:
    """A bundle that was claimed, and has ended."""
    job = "fox.01ARZ3NDEKTSV4RRFFQ69G5FAV"
    bundle = spool.claimed / job
    (bundle / "deep").mkdir(parents=True)
    (bundle / "job.json").write_bytes(GRAPH)
    (bundle / "payload").write_bytes(b"a name like ours")
    (bundle / "deep" / "photo.png").write_bytes(b"png")
    row = make_intake(spool).adopt([job]).claims[0].row
    (spool.failed / job).mkdir()
    bundle.rename(spool.failed / job / "job")
    return msgspec.structs.replace(row, state=State.FAILED)


def test_a_bundle_is_copied_whole(spool: Spool, make_intake: MakeIntake) -> None:
    old = ended_bundle(spool, make_intake)
    new = once_more(spool, make_intake, old)
    bundle = spool.claimed / new.payload
    assert (bundle / "job.json").read_bytes() == GRAPH
    assert (bundle / "deep" / "photo.png").read_bytes() == b"png"
    assert (new.retry_of, new.sha256) == (old.job, old.sha256)
    assert os.listdir(spool.stage) == []


def test_a_bundle_that_is_not_what_was_claimed_is_not_run(
    spool: Spool, make_intake: MakeIntake
) -> None:
    old = msgspec.structs.replace(ended_bundle(spool, make_intake), sha256="of another")
    with pytest.raises(JobFileError, match="bundle in its folder is not as it was submitted"):
        once_more(spool, make_intake, old)
    assert os.listdir(spool.claimed) == os.listdir(spool.stage) == []


def test_a_folder_that_was_taken_away_is_said(spool: Spool, make_intake: MakeIntake) -> None:
    old = ended(spool)
    (folder_of(spool, old) / "job.json").unlink()
    with pytest.raises(JobFileError, match=r"no job\.json"):
        once_more(spool, make_intake, old)
    folder_of(spool, old).rmdir()
    with pytest.raises(JobFileError, match="taken away from failed/"):
        once_more(spool, make_intake, old)
    assert os.listdir(spool.claimed) == []


def test_what_is_not_as_it_was_submitted_is_not_run(spool: Spool, make_intake: MakeIntake) -> None:
    old = ended(spool)
    file = folder_of(spool, old) / "job.json"
    file.write_bytes(GRAPH)
    with pytest.raises(JobFileError, match="not as it was submitted"):
        once_more(spool, make_intake, old)
    secret = spool.root / "secret"
    secret.write_bytes(RANDOM)
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(JobFileError, match="no job"):
        once_more(spool, make_intake, old)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(JobFileError, match="no job"):
        once_more(spool, make_intake, old)
    file.unlink()
    file.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(JobFileError, match="no job"):
        once_more(spool, make_intake, old)
    assert os.listdir(spool.claimed) == []


def test_what_was_no_file_at_all_is_not_tried_again(spool: Spool, make_intake: MakeIntake) -> None:
    old = ended(spool)
    (folder_of(spool, old) / "job.json").rename(folder_of(spool, old) / "payload")
    with pytest.raises(JobFileError, match="is no job file"):
        once_more(spool, make_intake, old)


def test_a_full_disk_leaves_nothing_behind(
    spool: Spool, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ended_bundle(spool, make_intake)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(again, "_sync_file", full)
    with pytest.raises(DiskFull):
        once_more(spool, make_intake, old)
    assert os.listdir(spool.claimed) == os.listdir(spool.stage) == []


def test_a_crash_before_the_row_leaves_a_plain_job_and_no_rubbish(
    spool: Spool, make_intake: MakeIntake
) -> None:
    old = ended(spool)
    new = once_more(spool, make_intake, old)  # and its row is never committed
    (spool.stage / f".{old.payload}.part").write_bytes(b"half of another")
    (spool.stage / ".hare.part" / "job").mkdir(parents=True)
    reap(spool, set())
    (claim,) = make_intake(spool).adopt(os.listdir(spool.claimed)).claims
    assert (claim.row.job, claim.row.retry_of) == (new.job, None)
    assert os.listdir(spool.stage) == []
