"""What a bundle brings is uploaded before the POST, or nothing is posted: against the simulator."""

from __future__ import annotations

import hashlib
import itertools
import os
from typing import Any

import msgspec
import pytest
import trio

from comfyd.core import facts
from comfyd.core.facts import Token
from comfyd.core.model import Row, ServerName, State, prompt_id_of
from comfyd.errors import ProtocolViolation
from comfyd.services import submitter
from comfyd.spool.intake import Intake
from tests.services.test_shells import J, Rig, rigged

PNG = b"\x89PNG\r\n\x1a\n picture"
MASK = b"a mask"


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


GRAPH = {
    "10": node("LoadImage", image="x"),
    "11": node("LoadImage", image="x"),
    "12": node("LoadImage", image="x"),
    "9": node("SaveImage", images=["10", 0], filename_prefix="x"),
    "8": node("SaveImage", images=["11", 0], filename_prefix="y"),
}
FILES = {"10.image": "Photo.PNG", "11.image": "in/mask", "12.image": "Photo.PNG"}


def bundled(rig: Rig, files: dict[str, str] = FILES) -> Row:
    """A claimed bundle that is about to be submitted, with the identity of the rig's job."""
    folder = rig.spool.new / J
    (folder / "in").mkdir(parents=True)
    (folder / "job.json").write_bytes(msgspec.json.encode({"workflow": GRAPH, "files": files}))
    (folder / "Photo.PNG").write_bytes(PNG)
    (folder / "in" / "mask").write_bytes(MASK)
    intake = Intake(
        rig.spool, settle_s=0, max_file_bytes=10_000, max_attempts=3,
        next_seq=itertools.count(1).__next__, draw=lambda job: lambda: 1, now_s=lambda: 1.0,
    )  # fmt: skip
    (claim,) = intake.claim(intake.named([J])).claims
    assert claim.row.state is State.QUEUED, claim.row.outcome
    return msgspec.structs.replace(
        claim.row, state=State.SUBMITTING, attempt=1, server=ServerName("s"), origin="http://s",
        prompt_id=prompt_id_of(J, 1), client_id="c", submitted_at=2.0,
    )  # fmt: skip


def content_name(content: bytes, ending: str) -> str:
    return f"comfyd-{hashlib.sha256(content).hexdigest()[:32]}.{ending}"


async def test_files_are_uploaded_once_each_and_the_graph_has_the_servers_names(tmp_path):
    async with rigged(tmp_path) as rig:
        assert isinstance(await rig.submit(bundled(rig)), facts.Accepted)
        photo, mask = content_name(PNG, "png"), content_name(MASK, "bin")
        assert rig.simulator.uploads == {photo: 1, mask: 1}
        assert rig.simulator.files.read("input", "", photo) == PNG
        assert rig.simulator.files.read("input", "", mask) == MASK
        assert rig.posted == 1


async def test_the_name_that_the_server_returns_is_the_one_used(tmp_path):
    async with rigged(tmp_path) as rig:
        photo = content_name(PNG, "png")
        rig.simulator.files.write("input", "", photo, b"somebody else's")
        row = bundled(rig, {"10.image": "Photo.PNG"})
        job = submitter.read_job(rig.spool, row)
        await submitter._upload(job, rig.client, rig.spool)
        renamed = photo.replace(".png", " (1).png")
        assert job.names == {("10", "image"): renamed}
        assert f'"image":"{renamed}"' in job.body(unique_prefix=False).decode()


@pytest.mark.parametrize(
    ("fault", "reason", "status", "said"),
    [
        ("upload-fail=403", "status", 403, "upload: HTTP status 403"),
        ("upload-fail=500", "status", 500, "upload: HTTP status 500"),
        ("upload-fail=503", "status", 503, "upload: HTTP status 503"),
        ("half-open=http", "unreachable", None, "gave no answer in"),
    ],
)
async def test_after_a_failed_upload_nothing_is_posted(tmp_path, fault, reason, status, said):
    async with rigged(tmp_path) as rig:
        row = bundled(rig)
        rig.simulator.faults.set(fault)
        answer = await rig.submit(row)
        assert isinstance(answer, facts.NotSent)
        assert (answer.operation, answer.reason, answer.status) == ("upload", reason, status)
        assert answer.reached
        assert said in answer.said
        assert not rig.simulator.posts
        rig.simulator.faults.clear()
        assert isinstance(await rig.submit(row), facts.Accepted)


async def test_a_server_that_is_gone_got_nothing(tmp_path):
    async with rigged(tmp_path) as rig:
        row = bundled(rig)
        rig.simulator.kill()
        answer = await rig.submit(row)
        assert answer == facts.NotSent(
            token=Token(J, 1, 1), operation="upload", reason="refused", reached=False
        )


async def test_a_file_that_is_too_large_for_the_server_is_explained(tmp_path):
    async with rigged(tmp_path) as rig:
        rig.simulator.faults.set("upload-fail=413")
        answer = await rig.submit(bundled(rig))
        assert isinstance(answer, facts.Rejected)
        assert f'"Photo.PNG" has {len(PNG)} bytes' in answer.message
        assert "--max-upload-size" in answer.message
        assert answer.detail == {"status": 413}
        assert not rig.simulator.posts


@pytest.mark.parametrize("status", [400, 422])
async def test_a_file_that_the_server_does_not_want_is_refused_for_good(tmp_path, status):
    async with rigged(tmp_path) as rig:
        rig.simulator.faults.set(f"upload-fail={status}")
        answer = await rig.submit(bundled(rig))
        assert isinstance(answer, facts.Rejected)
        assert answer.message == (
            f'The server does not take "Photo.PNG" (HTTP status {status}: on purpose);'
            " look for the reason in its log, or in that of a proxy before it."
        )
        assert answer.detail == {"status": status}
        assert not rig.simulator.posts


async def test_a_bundle_that_changed_or_vanished_cannot_be_sent(tmp_path):
    async with rigged(tmp_path) as rig:
        row = bundled(rig)
        folder = rig.spool.claimed / row.payload
        (folder / "in" / "mask").write_bytes(b"other")
        changed = await rig.submit(row)
        os.rename(folder, tmp_path / "elsewhere")
        gone = await rig.submit(row)
        assert isinstance(changed, facts.Unsendable)
        assert "changed by someone else" in changed.message
        assert isinstance(gone, facts.Unsendable)
        assert not rig.simulator.uploads


async def test_an_upload_without_a_committed_intent_is_a_bug(tmp_path):
    async with rigged(tmp_path) as rig:
        row = bundled(rig)
        with pytest.raises(ProtocolViolation):
            await rig.submit(msgspec.structs.replace(row, state=State.QUEUED))
        assert not rig.simulator.uploads


async def test_a_large_upload_arrives_whole(tmp_path):
    content = os.urandom(32 * 2**20)
    async with rigged(tmp_path) as rig:
        with trio.fail_after(15):
            name = await rig.client.upload("comfyd-large.bin", content)
        assert rig.simulator.files.read("input", "", name) == content


async def test_a_single_file_is_submitted_as_ever(tmp_path):
    async with rigged(tmp_path) as rig:
        assert isinstance(await rig.submit(rig.row()), facts.Accepted)
        assert not rig.simulator.uploads
