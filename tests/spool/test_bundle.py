"""Bundles: taken whole, trusted in nothing, and gone without a trace in the end."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from comfyd.core.model import Reason, Row, State, Timeouts
from comfyd.errors import DiskFull, JobFileError
from comfyd.services.submitter import read_job
from comfyd.spool import bundle, delivery, library
from comfyd.spool.bundle import MAX_DEPTH, MAX_ENTRIES, drop_bundle
from comfyd.spool.claimedfile import read_claim
from comfyd.spool.delivery import PublishResult, Stage
from comfyd.spool.intake import Intake, Taken
from comfyd.spool.layout import Spool, job_of, open_dir
from tests.spool.conftest import ULID, MakeIntake, nest, not_ours

GRAPH = b'{"10": {"class_type": "LoadImage", "inputs": {"image": "x"}}}'
JOB = b'{"workflow": %s, "files": {"10.image": "photo.png"}}' % GRAPH
NAMING = b'{"workflow": "people/portrait.json", "set": {"10.image": "y"}}'


class Clock:
    def __init__(self) -> None:
        self.s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.s


def make(path: Path, **files: bytes) -> Path:
    """A good bundle at *path*."""
    path.mkdir()
    (path / "job.json").write_bytes(JOB)
    (path / "photo.png").write_bytes(b"picture")
    return path


def take(intake: Intake) -> Taken:
    return intake.claim(intake.named(sorted(os.listdir(intake.spool.new))))


def taken_row(intake: Intake) -> Row:
    (claim,) = take(intake).claims
    return claim.row


def submitting(row: Row) -> Row:
    return replace(row, prompt_id="p", client_id="c", attempt=1)


def tree(path: Path) -> list[str]:
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))


def result_of(spool: Spool, row: Row, manifest: str = "result.json") -> Path:
    """Stage and publish *row*, and clear away what was claimed."""
    stage = Stage.begin(spool, row.job)
    assert stage.add_payload(row) == ""
    row = replace(row, staged=stage.finish(manifest, {}))
    place = spool.done if manifest == "result.json" else spool.failed
    assert (
        delivery.publish(spool, row, place="done" if place == spool.done else "failed")
        is PublishResult.PUBLISHED
    )
    assert delivery.retire(spool, row) == ""
    return place / row.job


# --- a bundle's life -----------------------------------------------------------------------------


def test_a_bundle_is_one_job_from_its_claim_to_its_result(
    spool: Spool, make_intake: MakeIntake
) -> None:
    folder = make(spool.new / "my.portrait")
    (folder / "in").mkdir()
    (folder / "in" / "mask.png").write_bytes(b"mask")
    row = taken_row(make_intake(spool))
    assert row.job.startswith("my_portrait.")
    assert row.payload == row.job
    assert row.state is State.QUEUED
    assert tree(spool.claimed / row.payload) == ["in", "in/mask.png", "job.json", "photo.png"]
    job = read_job(spool, submitting(row))
    assert job.document.files == {("10", "image"): "photo.png"}
    done = result_of(spool, row)
    assert tree(done) == [
        "job", "job/in", "job/in/mask.png", "job/job.json", "job/photo.png", "result.json",
    ]  # fmt: skip
    assert (done / "job" / "photo.png").read_bytes() == b"picture"
    assert stat.S_IMODE((done / "job" / "in").stat().st_mode) == 0o2750
    assert stat.S_IMODE((done / "job" / "in" / "mask.png").stat().st_mode) == 0o640
    assert os.listdir(spool.claimed) == os.listdir(spool.stage) == os.listdir(spool.new) == []


def test_a_dropped_bundle_keeps_its_id(spool: Spool, make_intake: MakeIntake) -> None:
    def fill(folder: Path) -> None:
        (folder / "job.json").write_bytes(GRAPH)

    job = drop_bundle(spool, "portrait.v2", fill)
    assert stat.S_IMODE((spool.new / job).stat().st_mode) & 0o777 == 0o770
    assert os.listdir(spool.tmp) == []
    row = taken_row(make_intake(spool))
    assert row.job == job
    assert job.startswith("portrait_v2.")
    make(spool.new / job)  # the same again, while the first is there
    assert taken_row(make_intake(spool)).job != job


def test_a_bundle_that_cannot_be_filled_is_not_dropped(spool: Spool) -> None:
    def fill(folder: Path) -> None:
        (folder / "job.json").write_bytes(GRAPH)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(DiskFull):
        drop_bundle(spool, "x", fill)
    assert os.listdir(spool.tmp) == os.listdir(spool.new) == []


def test_what_a_job_document_asks_for_is_in_its_row(spool: Spool, make_intake: MakeIntake) -> None:
    yaml = (
        b"workflow: {'10': {class_type: A, inputs: {image: x}}}\n"
        b"timeouts: {queue: 1h, run: 30m, stall: 1.5m}\non_partial: accept\nkey: nightly-1\n"
    )
    folder = make(spool.new / "x")
    (folder / "job.json").unlink()
    (folder / "job.yaml").write_bytes(yaml)
    row = taken_row(make_intake(spool, now_s=lambda: 100.0))
    assert (row.key, row.accept_partial) == ("nightly-1", True)
    assert row.timeouts == Timeouts(run_s=1800.0, stall_s=90.0)
    assert (row.queue_s, row.queue_by) == (3600.0, 3700.0)


@pytest.mark.parametrize(("configured_s", "by"), [(None, None), (60.0, 160.0)])
def test_how_long_a_job_may_wait_is_configured_unless_it_says(
    spool: Spool, make_intake: MakeIntake, configured_s: float | None, by: float | None
) -> None:
    make(spool.new / "x")
    row = taken_row(make_intake(spool, now_s=lambda: 100.0, queue_timeout_s=configured_s))
    assert (row.queue_s, row.queue_by) == (configured_s, by)


def test_the_hash_covers_every_name_and_content() -> None:
    first = {"a": "00" * 32, "b": "11" * 32}
    others = [{"a": "11" * 32, "b": "00" * 32}, {"a": "00" * 32}, {**first, "c": "22" * 32}]
    assert bundle.digest(dict(reversed(first.items()))) == bundle.digest(first)
    assert len({bundle.digest(each) for each in (first, *others)}) == 4


# --- what is no bundle ---------------------------------------------------------------------------


def add_symlink(folder: Path) -> None:
    (folder / "photo2.png").symlink_to("/etc/shadow")


def add_symlinked_folder(folder: Path) -> None:
    (folder / "in").symlink_to("/etc")


def add_symlinked_document(folder: Path) -> None:
    (folder / "job.json").unlink()
    (folder / "job.json").symlink_to("/etc/hostname")


def add_fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def add_fifo_document(folder: Path) -> None:
    (folder / "job.json").unlink()
    os.mkfifo(folder / "job.json")


def add_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(folder, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/s")
        os.close(here)


def add_hard_link(folder: Path) -> None:
    (folder.parent.parent / "other").write_bytes(b"x")
    (folder / "other").hardlink_to(folder.parent.parent / "other")


def add_depth(folder: Path) -> None:
    for _ in range(MAX_DEPTH + 1):
        folder = folder / "d"
        folder.mkdir()


def add_very_deep(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def add_many(folder: Path) -> None:
    for number in range(10_000):
        os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))


def add_many_folders(folder: Path) -> None:
    for number in range(MAX_ENTRIES):
        (folder / str(number)).mkdir()


def add_large(folder: Path) -> None:
    (folder / "hole").touch()
    os.truncate(folder / "hole", 10 * 1024**3)


def add_odd_name(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff")).touch()


def add_control_name(folder: Path) -> None:
    (folder / "a\x1b[31m\nb").touch()


def add_second_document(folder: Path) -> None:
    (folder / "job.yaml").write_bytes(b"workflow: x")


def add_large_document(folder: Path) -> None:
    (folder / "job.json").write_bytes(JOB + b" " * 10_000)


def folder_for_document(folder: Path) -> None:
    (folder / "job.json").unlink()
    (folder / "job.json").mkdir()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "symlink": (add_symlink, '"photo2.png" in the bundle is a symbolic link'),
    "symlinked folder": (add_symlinked_folder, '"in" in the bundle is a symbolic link'),
    "symlinked document": (add_symlinked_document, '"job.json" in the bundle is a symbolic'),
    "fifo": (add_fifo, '"pipe" in the bundle is no regular file'),
    "fifo document": (add_fifo_document, '"job.json" in the bundle is no regular file'),
    "socket": (add_socket, '"s" in the bundle is no regular file'),
    "hard link": (add_hard_link, "hard links"),
    "depth": (add_depth, f"deeper than {MAX_DEPTH} folders"),
    "very deep": (add_very_deep, f"deeper than {MAX_DEPTH} folders"),
    "many": (add_many, f"more than {MAX_ENTRIES} files"),
    "many folders": (add_many_folders, f"more than {MAX_ENTRIES} files"),
    "large": (add_large, "more than 268435456 bytes"),
    "odd name": (add_odd_name, "not printable text"),
    "control name": (add_control_name, "not printable text"),
    "two documents": (add_second_document, "leave one of them out"),
    "large document": (add_large_document, "jobs.max_file_bytes allows 10000"),
    "document is a folder": (folder_for_document, "no job.yaml or job.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_hostile_bundle_is_moved_as_it_is_and_fails(
    spool: Spool, make_intake: MakeIntake, kind: str
) -> None:
    add, says = BAD[kind]
    folder = make(spool.new / "x")
    add(folder)
    inode = folder.stat().st_ino
    before = len(os.listdir("/proc/self/fd"))
    row = taken_row(make_intake(spool))
    assert len(os.listdir("/proc/self/fd")) == before
    assert (row.state, row.sha256) == (State.COLLECTING, "")
    assert row.outcome is not None
    assert row.outcome.reason is Reason.INVALID_JOB
    assert says in row.outcome.message
    assert "\n" not in row.outcome.message
    failed = result_of(spool, row, "error.json")
    assert (failed / "payload").stat().st_ino == inode
    assert os.listdir(spool.claimed) == []


def test_a_bad_job_document_fails_with_the_bundle_copied(
    spool: Spool, make_intake: MakeIntake
) -> None:
    (make(spool.new / "x") / "job.json").write_bytes(b"{")
    row = taken_row(make_intake(spool))
    assert row.outcome is not None
    assert "not valid JSON" in row.outcome.message
    failed = result_of(spool, row, "error.json")
    assert tree(failed) == ["error.json", "job", "job/job.json", "job/photo.png"]


def test_a_folder_that_we_could_not_clear_away_fails(
    humble_spool: Spool, make_intake: MakeIntake
) -> None:
    folder = make(humble_spool.new / "x")
    (folder / "in").mkdir()
    (folder / "in").chmod(0o500)
    row = taken_row(make_intake(humble_spool))
    assert row.outcome is not None
    assert "chmod -R g+rwX" in row.outcome.message
    (humble_spool.claimed / row.payload / "in").chmod(0o700)


def test_an_unreadable_file_in_a_bundle_fails(humble_spool: Spool, make_intake: MakeIntake) -> None:
    (make(humble_spool.new / "x") / "photo.png").chmod(0)
    row = taken_row(make_intake(humble_spool))
    assert row.outcome is not None
    assert '"photo.png" in the bundle cannot be read (Permission denied)' in row.outcome.message


def swap_for_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def swap_for_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_content(path: Path) -> None:
    path.write_bytes(b"PICTURE")


def remove(path: Path) -> None:
    path.unlink()


SWAPS = [swap_for_link, swap_for_fifo, swap_content, remove]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("swap", [swap_for_link, swap_for_fifo, remove])
def test_a_file_swapped_between_look_and_read_is_not_followed(
    spool: Spool, make_intake: MakeIntake, swap: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(spool.new / "x")
    real = os.open

    def slow_open(path: str, flags: int, *args: int, **fds: int) -> int:
        if path == "photo.png":
            swap(next(spool.claimed.iterdir()) / path)
        return real(path, flags, *args, **fds)

    monkeypatch.setattr(os, "open", slow_open)
    row = taken_row(make_intake(spool))
    assert (row.state, row.sha256) == (State.COLLECTING, "")


@pytest.mark.parametrize("swap", SWAPS)
def test_a_change_after_the_claim_is_found_at_the_submission(
    spool: Spool, make_intake: MakeIntake, swap: Callable[[Path], None]
) -> None:
    make(spool.new / "x")
    row = submitting(taken_row(make_intake(spool)))
    swap(spool.claimed / row.payload / "photo.png")
    with pytest.raises(JobFileError):
        read_job(spool, row)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_swapped_after_the_bundle_was_read_is_not_sent(
    spool: Spool, make_intake: MakeIntake, swap: Callable[[Path], None]
) -> None:
    make(spool.new / "x")
    row = taken_row(make_intake(spool))
    fd = open_dir(spool.claimed)
    claim = read_claim(fd, row.payload, max_bytes=10_000)
    os.close(fd)
    assert claim.pieces is not None
    swap(spool.claimed / row.payload / "photo.png")
    folder_fd = open_dir(spool.claimed / row.payload)
    with pytest.raises(JobFileError, match="changed by someone else"):
        bundle.read_piece(folder_fd, "photo.png", claim.pieces["photo.png"])
    os.close(folder_fd)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_change_after_the_claim_is_a_warning_in_the_result_and_nothing_is_lost(
    spool: Spool, make_intake: MakeIntake, swap: Callable[[Path], None]
) -> None:
    make(spool.new / "x")
    row = taken_row(make_intake(spool))
    swap(spool.claimed / row.payload / "photo.png")
    before = (spool.claimed / row.payload).stat().st_ino
    for _ in range(2):  # again after a crash
        stage = Stage.begin(spool, row.job)
        assert "changed in claimed/ by someone else" in stage.add_payload(row)
    moved = stage.path / "payload"
    if moved.exists():
        assert moved.stat().st_ino == before
    else:
        assert (stage.path / "job" / "job.json").read_bytes() == JOB
    assert delivery.retire(spool, row) == ""


# --- settling ------------------------------------------------------------------------------------


def test_a_folder_filled_slowly_is_not_taken_half_done(
    spool: Spool, make_intake: MakeIntake
) -> None:
    """As ``cp -r`` fills it: no event tells that it is complete."""
    clock = Clock()
    intake = make_intake(spool, settle_s=2.0, now_s=clock)
    folder = spool.new / "x"
    steps: list[Callable[[], object]] = [
        folder.mkdir,
        lambda: (folder / "job.json").write_bytes(JOB),
        (folder / "in").mkdir,
        lambda: (folder / "in" / "a").write_bytes(b"1"),
        lambda: (folder / "in" / "a").write_bytes(b"12"),
        lambda: (folder / "photo.png").write_bytes(b"picture"),
    ]
    for step in steps:
        step()
        assert intake.scan().ready == []
        clock.s += 1.9
        assert intake.scan().ready == []
    clock.s += 0.2
    look = intake.scan()
    assert [entry.name for entry in look.ready] == ["x"]
    (claim,) = intake.claim(look.ready).claims
    assert claim.row.state is State.QUEUED


@pytest.mark.parametrize("kind", ["very deep", "many", "fifo", "symlinked folder"])
def test_looking_at_a_hostile_folder_is_bounded_and_it_settles(
    spool: Spool, make_intake: MakeIntake, kind: str
) -> None:
    clock = Clock()
    intake = make_intake(spool, settle_s=2.0, now_s=clock)
    BAD[kind][0](make(spool.new / "x"))
    assert intake.scan().ready == []
    clock.s += 2.0
    assert [entry.name for entry in intake.scan().ready] == ["x"]


# --- named workflows -----------------------------------------------------------------------------


@pytest.fixture
def workflows(tmp_path: Path) -> Path:
    folder = tmp_path / "workflows"
    (folder / "people").mkdir(parents=True)
    (folder / "people" / "portrait.json").write_bytes(GRAPH)
    return folder


@pytest.mark.parametrize("as_bundle", [False, True])
def test_a_named_workflow_is_kept_as_it_was_at_the_claim(
    spool: Spool, make_intake: MakeIntake, workflows: Path, as_bundle: bool
) -> None:
    if as_bundle:
        (make(spool.new / "x") / "job.json").write_bytes(NAMING)
    else:
        (spool.new / "x.json").write_bytes(NAMING)
    row = taken_row(make_intake(spool, workflows=workflows))
    assert (row.state, row.payload) == (State.QUEUED, row.job)
    (workflows / "people" / "portrait.json").write_bytes(b"{}")
    job = read_job(spool, submitting(row))
    assert job.document.graph["10"]["inputs"] == {"image": "y"}
    done = result_of(spool, row)
    assert (done / "job" / "people" / "portrait.json").read_bytes() == GRAPH
    assert (done / "job" / "job.json").read_bytes() == NAMING
    assert os.listdir(spool.claimed) == []


def test_a_job_that_names_a_workflow_has_the_hash_of_the_bundle_it_becomes(
    spool: Spool, make_intake: MakeIntake, workflows: Path
) -> None:
    intake = make_intake(spool, workflows=workflows)
    (spool.new / "x.json").write_bytes(NAMING)
    first = taken_row(intake)
    folder = spool.new / "y"
    folder.mkdir()
    (folder / "job.json").write_bytes(NAMING)
    second = taken_row(intake)
    shutil.copytree(spool.claimed / first.payload, spool.new / "z")
    third = taken_row(make_intake(spool))
    assert first.sha256 == second.sha256 == third.sha256


def test_a_workflow_in_the_bundle_comes_first(
    spool: Spool, make_intake: MakeIntake, workflows: Path
) -> None:
    folder = make(spool.new / "x")
    (folder / "job.json").write_bytes(NAMING)
    (folder / "people").mkdir()
    own = GRAPH.replace(b'"x"', b'"own", "other": 1')
    (folder / "people" / "portrait.json").write_bytes(own)
    row = taken_row(make_intake(spool, workflows=workflows))
    assert read_job(spool, submitting(row)).document.graph["10"]["inputs"]["other"] == 1
    assert tree(spool.claimed / row.payload) == [
        "job.json", "people", "people/portrait.json", "photo.png",
    ]  # fmt: skip


YAML = b"prompt: {'10': {class_type: A, inputs: {image: x}}}\nextra_data: {a: 1}\nclient_id: me\n"
EDITOR = b'{"nodes": [], "links": []}'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.json", None, "neither beside the job document nor in the folder"),
        ("people", None, "cannot be read (Is a directory)"),
        ("people/portrait.json/x", None, "neither beside"),
        ("link.json", "link", "cannot be read"),
        ("linked/portrait.json", "link", "neither beside"),
        ("fifo.json", "fifo", "no regular file"),
        ("../people/portrait.json", None, "plain relative name"),
        ("/etc/passwd", None, "plain relative name"),
        ("people//portrait.json", None, "plain relative name"),
        ("", None, "plain relative name"),
        ("job.json", b"{}", "where job documents are"),
        ("job.yaml/x", None, "where job documents are"),
        ("editor.json", EDITOR, 'workflow "editor.json": This is a workflow saved for'),
        ("nested.json", NAMING, "a job document itself"),
        ("broken.json", b"{", 'workflow "broken.json": The file is not valid JSON'),
        ("large.json", GRAPH + b" " * 10_000, "more than 10000 bytes"),
    ],
)
def test_a_workflow_that_cannot_be_had_is_told(
    spool: Spool,
    make_intake: MakeIntake,
    workflows: Path,
    name: str,
    content: bytes | str | None,
    says: str,
) -> None:
    if content == "link":
        (workflows / name.split("/")[0]).symlink_to(
            workflows / "people" / ("portrait.json" if "/" not in name else "")
        )
    elif content == "fifo":
        os.mkfifo(workflows / name)
    elif isinstance(content, bytes):
        (workflows / name).write_bytes(content)
    job = NAMING.replace(b"people/portrait.json", name.encode())
    (spool.new / "x.json").write_bytes(job)
    row = taken_row(make_intake(spool, workflows=workflows))
    assert row.state is State.COLLECTING
    assert row.outcome is not None
    assert says in row.outcome.message
    failed = result_of(spool, row, "error.json")
    assert (failed / "job.json").read_bytes() == job


def test_a_named_workflow_may_be_yaml_and_a_request_body(
    spool: Spool, make_intake: MakeIntake, workflows: Path
) -> None:
    (workflows / "body.yaml").write_bytes(YAML)
    (spool.new / "x.yaml").write_bytes(b"workflow: body.yaml\npriority: 3\n")
    row = taken_row(make_intake(spool, workflows=workflows))
    assert (row.priority, row.warnings) == (3, ("client_id was dropped: comfyd chooses it",))
    assert read_job(spool, submitting(row)).document.extra_data == {"a": 1}
    assert tree(spool.claimed / row.payload) == ["body.yaml", "job.yaml"]


def test_without_a_folder_of_workflows_the_sentence_says_so(
    spool: Spool, make_intake: MakeIntake
) -> None:
    (spool.new / "x.json").write_bytes(NAMING)
    row = taken_row(make_intake(spool))
    assert row.outcome is not None
    assert "no folder of workflows is configured" in row.outcome.message


def test_something_else_in_the_place_of_the_workflow_fails(
    spool: Spool, make_intake: MakeIntake, workflows: Path
) -> None:
    folder = make(spool.new / "x")
    (folder / "job.json").write_bytes(NAMING)
    (folder / "people").write_bytes(b"a file")
    row = taken_row(make_intake(spool, workflows=workflows))
    assert row.outcome is not None
    assert "something is in its place" in row.outcome.message
    failed = result_of(spool, row, "error.json")
    assert tree(failed / "job") == ["job.json", "people", "photo.png"]


# --- crashes -------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


CALLS = ("open", "mkdir", "rename", "unlink", "rmdir", "fsync")


def crash_at(
    monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, work: Callable[[], object]
) -> bool:
    """Do *work*, whose call *number* to the file system raises *error*; whether it ended it."""
    left = number
    dead = False

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left, dead
            if dead:  # nothing happens after a crash: no clean-up either
                raise error
            left -= 1
            if left == -1:
                dead = isinstance(error, Crash)
                raise error
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counting(getattr(os, name)))
        try:
            work()
        except (Crash, DiskFull):
            return True
    return False


def started_again(spool: Spool, make_intake: MakeIntake, workflows: Path | None = None) -> Taken:
    """What a new daemon adopts, and what it takes from ``new/``."""
    delivery.reap(spool, set())
    intake = make_intake(spool, workflows=workflows)
    adopted = intake.adopt(sorted(os.listdir(spool.claimed)))
    assert adopted.unmovable == []
    later = intake.claim(intake.named(sorted(os.listdir(spool.new))))
    return Taken([*adopted.claims, *later.claims], [], [])


@pytest.mark.parametrize("as_bundle", [False, True])
def test_a_crash_at_any_step_of_a_claim_leaves_one_job(
    tmp_path: Path,
    make_intake: MakeIntake,
    workflows: Path,
    as_bundle: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crashed, number, hashes = True, -1, set()
    while crashed:
        number += 1
        spool = Spool(tmp_path / f"spool-{number}")
        spool.prepare()
        if as_bundle:
            (make(spool.new / "x") / "job.json").write_bytes(NAMING)
        else:
            (spool.new / "x.json").write_bytes(NAMING)
        intake = make_intake(spool, workflows=workflows)
        entries = intake.named(os.listdir(spool.new))
        crashed = crash_at(monkeypatch, number, Crash(), lambda: intake.claim(entries))  # noqa: B023
        (claim,) = started_again(spool, make_intake, workflows).claims
        assert claim.row.state is State.QUEUED, number
        assert os.listdir(spool.claimed) == [claim.row.payload], number
        read_job(spool, submitting(claim.row))
        hashes.add(claim.row.sha256)
    assert number > 8
    assert len(hashes) == 1


@pytest.mark.parametrize("as_bundle", [False, True])
def test_a_full_disk_at_any_step_of_a_claim_is_a_pause(
    tmp_path: Path,
    make_intake: MakeIntake,
    workflows: Path,
    as_bundle: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call may find it full once; only folder syncs that tell so end the daemon."""
    number, refused = 0, 0
    while number < 30:
        spool = Spool(tmp_path / f"spool-{number}")
        spool.prepare()
        if as_bundle:
            (make(spool.new / "x") / "job.json").write_bytes(NAMING)
        else:
            (spool.new / "x.json").write_bytes(NAMING)
        intake = make_intake(spool, workflows=workflows)
        entries = intake.named(os.listdir(spool.new))
        full = OSError(errno.ENOSPC, "full")
        try:
            refused += crash_at(monkeypatch, number, full, lambda: intake.claim(entries))  # noqa: B023
        except OSError:
            claims = started_again(spool, make_intake, workflows).claims
        else:
            claims = [] if os.listdir(spool.new) else started_again(
                spool, make_intake, workflows
            ).claims  # fmt: skip
            claims = claims or intake.claim(intake.named(os.listdir(spool.new))).claims
        (claim,) = claims
        assert claim.row.state is State.QUEUED, number
        assert os.listdir(spool.claimed) == [claim.row.payload], number
        number += 1
    assert refused > 3


def test_a_crash_at_any_step_of_clearing_away_leaves_no_job(
    tmp_path: Path, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a drop that was absorbed there is no row: only the names tell that it is no job."""
    crashed, number, jobs = True, -1, 0
    while crashed:
        number += 1
        spool = Spool(tmp_path / f"spool-{number}")
        spool.prepare()
        (make(spool.new / "x") / "in").mkdir()
        row = taken_row(make_intake(spool))
        crashed = crash_at(monkeypatch, number, Crash(), lambda: delivery.retire(spool, row))  # noqa: B023
        whole = (spool.claimed / row.payload).exists()
        claims = started_again(spool, make_intake).claims
        if whole:  # nothing was done yet: it is judged again
            jobs += 1
            assert [claim.row.sha256 for claim in claims] == [row.sha256]
        else:
            assert claims == []
            assert os.listdir(spool.claimed) == []
        assert delivery.retire(spool, row) == ""
        assert os.listdir(spool.claimed) == []
    assert number > jobs > 0


def test_what_cannot_be_removed_is_told(humble_spool: Spool, make_intake: MakeIntake) -> None:
    (make(humble_spool.new / "x") / "in").mkdir()
    row = taken_row(make_intake(humble_spool))
    (humble_spool.claimed / row.payload / "in" / "a").touch()
    not_ours(humble_spool.claimed / row.payload / "in")
    assert "could not be removed: Permission denied" in delivery.retire(humble_spool, row)
    (problem,) = delivery.reap(humble_spool, set())
    assert "is left: Permission denied" in problem
    assert make_intake(humble_spool).adopt(os.listdir(humble_spool.claimed)).claims == []


def test_a_claimed_bundle_without_a_row_is_adopted(spool: Spool, make_intake: MakeIntake) -> None:
    make(spool.claimed / f"x.{ULID}")
    (claim,) = started_again(spool, make_intake).claims
    assert claim.row.job == job_of(claim.row.payload) == f"x.{ULID}"
    assert claim.row.state is State.QUEUED


def test_a_crash_while_a_bundle_is_copied_to_its_result_is_made_good(
    tmp_path: Path, make_intake: MakeIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed, number = True, -1
    while crashed:
        number += 1
        spool = Spool(tmp_path / f"spool-{number}")
        spool.prepare()
        make(spool.new / "x")
        row = taken_row(make_intake(spool))
        stage = Stage.begin(spool, row.job)
        crashed = crash_at(monkeypatch, number, Crash(), lambda: stage.add_payload(row))  # noqa: B023
        done = result_of(spool, row)
        assert tree(done) == ["job", "job/job.json", "job/photo.png", "result.json"]
        sha256 = hashlib.sha256((done / "job" / "photo.png").read_bytes()).hexdigest()
        assert sha256 == hashlib.sha256(b"picture").hexdigest()
    assert number > 3


def test_leftovers_of_nobody_are_left_alone(spool: Spool) -> None:
    (spool.claimed / ".probe-1").mkdir()
    library.tidy(spool)
    assert os.listdir(spool.claimed) == [".probe-1"]


def test_a_bundle_made_endlessly_deep_after_its_claim_kills_nobody(
    spool: Spool, make_intake: MakeIntake
) -> None:
    make(spool.new / "x")
    row = taken_row(make_intake(spool))
    nest(spool.claimed / row.payload)
    assert delivery.retire(spool, row) == ""
    assert os.listdir(spool.claimed) == []
    assert started_again(spool, make_intake).claims == []


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_without_space_for_a_workflow_only_the_job_that_names_it_waits(
    spool: Spool,
    make_intake: MakeIntake,
    workflows: Path,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    intake = make_intake(spool, workflows=workflows)
    (spool.new / "a.json").write_bytes(NAMING)
    (spool.new / "b.json").write_bytes(GRAPH)

    real = getattr(os, call)

    def full(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).startswith(".a."):  # what the job is made a bundle by
            raise OSError(errno.ENOSPC, "full")
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert [claim.row.job[0] for claim in take(intake).claims] == ["b"]
        with pytest.raises(DiskFull):
            take(intake)
        (name,) = os.listdir(spool.new)
        assert name.startswith("a.")
        if (spool.new / name).is_dir():  # as it was dropped, for a daemon that died since
            os.rename(spool.new / name / "job.json", spool.claimed / f"{name}.json")
            name = f"{name}.json"
        else:
            os.rename(spool.new / name, spool.claimed / name)
        with pytest.raises(DiskFull):
            intake.adopt([name])
    (claim,) = intake.adopt([name]).claims
    assert claim.row.state is State.QUEUED
    assert claim.row.job == job_of(name)
