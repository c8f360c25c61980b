"""What a history record becomes in ``done/``: through the real client and fetcher, by table."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.core import completion, facts, orders
from comfyd.core.facts import Answer, Token, Uncollected
from comfyd.core.model import Outcome, Reason, Row, State
from comfyd.services import fetcher
from comfyd.simulator import media
from tests.services.test_shells import LIMITS, J, Rig, rigged

Ui = dict[str, dict[str, Any]]


def file(filename: object, subfolder: object = "", kind: object = "output", **more: object) -> Any:
    return {"filename": filename, "subfolder": subfolder, "type": kind, **more}


def saying(ui: Ui, contents: Mapping[str, bytes | None] | None = None) -> dict[str, Any]:
    """A graph whose nodes return *ui*, and make the files they name, but for None."""
    given = {
        name: None if data is None else base64.b64encode(data).decode()
        for name, data in (contents or {}).items()
    }
    return {
        node: {
            "class_type": "SimUi",
            "inputs": {"ui": json.dumps(said), "contents": json.dumps(given)},
        }
        for node, said in ui.items()
    }


async def collected(
    rig: Rig, graph: dict[str, Any], *, outcome: Outcome | None = None, **limits: Any
) -> tuple[Row, Answer]:
    """Run *graph*, judge it as the core does, and collect."""
    row = rig.row(graph)
    record = await rig.finished(row)
    row = msgspec.structs.replace(
        row,
        state=State.COLLECTING,
        record=record,
        outcome=outcome or completion.judge(row, record),
        warnings=record.warnings + completion.success_warnings(record),
        ended_at=3.0,
    )
    return row, await rig.collect(row, replace(LIMITS, **limits))


async def delivered(
    rig: Rig, graph: dict[str, Any], *, outcome: Outcome | None = None, **limits: Any
) -> tuple[Path, dict[str, Any]]:
    """The folder that *graph* became, and its manifest; every file in it is accounted for."""
    row, answer = await collected(rig, graph, outcome=outcome, **limits)
    assert isinstance(answer, facts.Collected), answer
    row = msgspec.structs.replace(row, state=State.PUBLISHING, staged=answer.staged)
    publish = orders.Publish(token=Token(J, 1, 5), row=row)
    assert fetcher.show(publish, rig.spool) == facts.Published(token=publish.token)
    assert row.outcome is not None
    is_done = row.outcome.state is State.DONE
    folder = (rig.spool.done if is_done else rig.spool.failed) / J
    name = "result.json" if is_done else "error.json"
    manifest: dict[str, Any] = json.loads((folder / name).read_bytes())
    files = [output["file"] for output in manifest["outputs"]]
    assert len(set(files)) == len(files)
    assert {*os.listdir(folder)} == {name, "job.json", *files}
    for output in manifest["outputs"]:
        content = (folder / output["file"]).read_bytes()
        assert output["sha256"] == hashlib.sha256(content).hexdigest()
        assert output["bytes"] == len(content)
    assert answer.staged.outputs == len(files)
    assert answer.staged.bytes == sum(output["bytes"] for output in manifest["outputs"])
    return folder, manifest


@dataclass(frozen=True)
class Case:
    """What nodes said, and what of it is in the folder.

    Attributes:
      contents: Of files, by name, where they are not right ones for their endings.
      files: Our names, in order.
      shown: The manifest's ``ui``.
      warns: Something each of the warnings says, in order.

    """

    said: Ui
    files: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    shown: Ui = field(default_factory=dict)
    warns: list[str] = field(default_factory=list)
    include_temp: bool = False


VHS = {
    "format": "video/h264-mp4",
    "frame_rate": 8.0,
    "workflow": "a_00001.png",
    "fullpath": "/home/someone/ComfyUI/output/a_00001.mp4",
}
PREVIEWS = {"3": {"images": [file("p.png", kind="temp"), file("q.png", kind="temp")]}}
CASES = {
    "pictures": Case(
        {"9": {"images": [file("a.png"), file("b.jpg"), file("c.webp")]}},
        ["9-0.png", "9-1.jpg", "9-2.webp"],
    ),
    "an animated picture": Case(
        {"10": {"images": [file("a.webp")], "animated": [True]}},
        ["10-0.webp"],
        shown={"10": {"animated": [True]}},
    ),
    "gifs as VHS gives them": Case(
        {"5": {"gifs": [file("a_00001.mp4", **VHS), file("b.gif", "deep/er", **VHS)]}},
        ["5-0.mp4", "5-1.gif"],
    ),
    "videos": Case(
        {"5": {"videos": [file("a.webm")], "video": [file("b.mp4")]}}, ["5-0.webm", "5-1.mp4"]
    ),
    "audio": Case(
        {"5": {"audio": [file("a.flac", "audio"), file("b.mp3", "audio"), file("c.opus")]}},
        ["5-0.flac", "5-1.mp3", "5-2.opus"],
    ),
    "3D": Case({"5": {"3d": [file("a_00001_.glb", "mesh")]}}, ["5-0.glb"]),
    "latents": Case({"5": {"latents": [file("a.latent", "latents")]}}, ["5-0.latent"]),
    "a model, which has no ending of ours": Case(
        {"5": {"models": [file("a.gguf")]}}, ["5-0.bin"], {"a.gguf": b"GGUF\x03"}
    ),
    "texts and any other value": Case(
        {"5": {"text": ["a", ""], "n": [1, None, True], "o": [{"a": [{}]}]}},
        [],
        shown={"5": {"text": ["a", ""], "n": [1, None, True], "o": [{"a": [{}]}]}},
    ),
    "files and values of one node": Case(
        {"5": {"mesh": [file("a.glb")], "result": ["a.glb", None]}},
        ["5-0.glb"],
        shown={"5": {"result": ["a.glb", None]}},
    ),
    "no subfolder and no type": Case({"9": {"images": [{"filename": "a.png"}]}}, ["9-0.png"]),
    "deep subfolders": Case(
        {"9": {"images": [file("a.png", "x/y z/ü"), file("a.png", "x")]}}, ["9-0.png", "9-1.png"]
    ),
    "names in every script": Case(
        {"9": {"images": [file("狐 & fox #1?.png"), file("100%.png"), file("-rf.png")]}},
        ["9-0.png", "9-1.png", "9-2.png"],
    ),
    "previews are left out": Case({**PREVIEWS, "9": {"images": [file("a.png")]}}, ["9-0.png"]),
    "previews by policy": Case(
        {**PREVIEWS, "9": {"images": [file("a.png")]}},
        ["3-0.png", "3-1.png", "9-0.png"],
        include_temp=True,
    ),
    "previews alone": Case(PREVIEWS, [], warns=["Only previews came out"]),
    "previews alone, by policy": Case(
        PREVIEWS, ["3-0.png", "3-1.png"], warns=["Only previews came out"], include_temp=True
    ),
    "nothing at all": Case({"5": {}}, [], warns=["without any output"]),
    "an input is no product": Case(
        {"5": {"images": [file("a.png", kind="input")]}, "9": {"images": [file("b.png")]}},
        ["9-0.png"],
        shown={"5": {"images": [file("a.png", kind="input")]}},
    ),
    "a type that no server hands out": Case(
        {"5": {"saved": [file("a.safetensors", kind="loras")]}},
        [],
        shown={"5": {"saved": [file("a.safetensors", kind="loras")]}},
        warns=["no server hands out 'a.safetensors' of node 5 (type loras)"],
    ),
    "the same file, named twice by one node": Case(
        {"9": {"images": [file("a.png"), file("a.png")]}}, ["9-0.png", "9-1.png"]
    ),
    "the same file, named by two nodes and two keys": Case(
        {"8": {"images": [file("a.png")], "gifs": [file("a.png")]}, "9": {"x": [file("a.png")]}},
        ["8-0.png", "8-1.png", "9-0.png"],
    ),
    "NaN": Case(
        {"5": {"scores": [float("nan"), 0.5, float("-inf")], "images": [file("a.png")]}},
        ["5-0.png"],
        shown={"5": {"scores": [None, 0.5, None]}},
        warns=["2 numbers in the server's record became null (NaN or infinite)"],
    ),
    "node ids of subgraphs": Case(
        {"3:1": {"images": [file("a.png")]}, "3_1": {"images": [file("b.png")]}},
        ["3_1_59a5a0c7-0.png", "3_1-0.png"],
    ),
    "an ending that the bytes deny": Case(
        {"9": {"images": [file("a.png"), file("b.png")]}},
        ["9-0.bin", "9-1.png"],
        {"a.png": media.GIF},
    ),
    "an ending that nobody should open": Case(
        {"9": {"x": [file("a.html"), file("b.exe"), file("c")]}},
        ["9-0.bin", "9-1.bin", "9-2.bin"],
        {"a.html": b"<html>", "b.exe": b"MZ", "c": b"c"},
    ),
    "an empty text": Case({"5": {"texts": [file("a.txt")]}}, ["5-0.txt"], {"a.txt": b""}),
    "items that only look like files": Case(
        {"5": {"x": [{"filename": ""}, {"filename": 3}, {"filename": None}, {"name": "a"}]}},
        [],
        shown={"5": {"x": [{"filename": ""}, {"filename": 3}, {"filename": None}, {"name": "a"}]}},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_what_nodes_say_is_what_is_delivered(tmp_path, case):
    async with rigged(tmp_path) as rig:
        _, manifest = await delivered(
            rig, saying(case.said, case.contents), include_temp=case.include_temp
        )
    assert [output["file"] for output in manifest["outputs"]] == case.files
    assert manifest["ui"] == case.shown
    assert len(manifest["warnings"]) == len(case.warns), manifest["warnings"]
    for warning, says in zip(manifest["warnings"], case.warns, strict=True):
        assert says in warning
    assert manifest["state"] == "done"


THREE = {"9": {"images": [file("a.png"), file("b.png"), file("c.png")]}}
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(fetcher, "_TRY_AGAIN_S", 0.01)


@pytest.mark.parametrize(
    ("said", "contents", "cause", "says"),
    [
        (THREE, {"b.png": None}, Uncollected.MISSING, "no longer has output 'b.png' of node 9"),
        (THREE, {"c.png": b""}, Uncollected.INVALID, "'c.png' of node 9 is wrong: the file"),
        (THREE, {"a.png": HTML}, Uncollected.INVALID, "a web page came instead of a .png file"),
        (THREE, {"a.png": b"gone"}, Uncollected.INVALID, "text came instead of a .png file"),
        *(
            (
                {"9": {"images": [file("a.png"), file(*names)]}},
                dict.fromkeys(names),
                Uncollected.MISSING,
                says,
            )
            for names, says in [
                (("../../etc/passwd",), "does not hand out output '../../etc/passwd'"),
                (("/etc/passwd",), "does not hand out output '/etc/passwd'"),
                (("z.png", "../.."), "does not hand out output 'z.png'"),
                (("z.png", "/etc"), "does not hand out output 'z.png'"),
                (("x/../../a.png",), "does not hand out output"),
                (("a\0.png",), "no longer has output"),
                (("x" * 5000 + ".png",), "xxx…' of node 9"),
                (("gone.png", "deep/er"), "no longer has output 'gone.png'"),
            ]
        ),
    ],
)  # fmt: skip
async def test_a_list_is_never_shorter(tmp_path, said, contents, cause, says):
    async with rigged(tmp_path) as rig:
        _, answer = await collected(rig, saying(said, contents))
        assert isinstance(answer, facts.CollectFailed)
        assert (answer.cause, answer.again) == (cause, True)
        assert says in answer.message
        assert answer.message.endswith(".")
        assert len(answer.message) < 400
        assert os.listdir(rig.spool.done) == os.listdir(rig.spool.failed) == []
        assert "result.json" not in os.listdir(rig.spool.stage / J)


async def test_a_name_of_nonsense_leaves_nothing_outside(tmp_path):
    names = ["..", ".", "a/b.png", "..\\a.png", "CON", "a\nb.png", "~", "$(id).png", "\u202egnp.a"]
    said = {"9": {"images": [file("a.png"), *(file(name) for name in names)]}}
    async with rigged(tmp_path) as rig:
        before = sorted(path for path in tmp_path.rglob("*") if "spool" not in path.parts)
        await collected(rig, saying(said))
        found = {path.name for path in (rig.spool.stage / J).iterdir()}
    assert all(name.startswith(("9-", "job.json", "result.json", "download")) for name in found)
    assert sorted(path for path in tmp_path.rglob("*") if "spool" not in path.parts) == before


async def test_one_cut_short_is_asked_for_again_and_not_believed(tmp_path):
    async with rigged(tmp_path) as rig:
        rig.simulator.faults.set("view-truncate=1")
        _, answer = await collected(rig, saying(THREE))
        assert isinstance(answer, facts.CollectFailed)
        assert answer.cause is Uncollected.SERVER
        rig.simulator.faults.set("view-wrong=1")
        await delivered(rig, saying(THREE))


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (404, Uncollected.MISSING),
        (410, Uncollected.MISSING),
        (400, Uncollected.MISSING),
        (401, Uncollected.SERVER),
        (403, Uncollected.SERVER),  # a proxy's: ComfyUI says it of a subfolder that leads out only
        (429, Uncollected.SERVER),
        (500, Uncollected.SERVER),
        (502, Uncollected.SERVER),
    ],
)
async def test_which_status_is_the_files_and_which_the_servers(tmp_path, status, cause):
    async with rigged(tmp_path) as rig:
        row, _ = await collected(rig, saying(THREE))
        rig.simulator.faults.set(f"view-fail={status}")
        answer = await rig.collect(row)
        assert isinstance(answer, facts.CollectFailed)
        assert (answer.cause, answer.again) == (cause, True)


SIX = {"8": {"images": [file("a.png")]}, "9": {"images": [file("b.png"), file("c.png")]}}
TEN = {f"{letter}.png": media.SAMPLES["png"][:8] + bytes(992) for letter in "abc"}


async def test_the_limit_is_for_all_outputs_of_a_job_together(tmp_path):
    async with rigged(tmp_path) as rig:
        _, answer = await collected(rig, saying(SIX, TEN), max_bytes=2999)
        assert isinstance(answer, facts.CollectFailed)
        assert (answer.cause, answer.again) == (Uncollected.INVALID, False)
        assert answer.message == (
            "With output 'c.png' of node 9 the job's outputs are larger than outputs.max_bytes;"
            " raise that, or let the workflow save less."
        )
        assert rig.simulator.views == {"a.png": 1, "b.png": 1, "c.png": 1}
        assert rig.retries == []
        _, manifest = await delivered(rig, saying(SIX, TEN), max_bytes=3000)
    assert [output["bytes"] for output in manifest["outputs"]] == [1000, 1000, 1000]


async def test_of_a_failed_job_what_fits_is_added(tmp_path):
    failed = Outcome(state=State.FAILED, reason=Reason.EXECUTION_ERROR, message="It broke.")
    async with rigged(tmp_path) as rig:
        contents = {**TEN, "b.png": media.SAMPLES["png"] + bytes(5000)}
        _, manifest = await delivered(rig, saying(SIX, contents), outcome=failed, max_bytes=2500)
    assert [output["file"] for output in manifest["outputs"]] == ["8-0.png", "9-1.png"]
    (warning,) = manifest["warnings"]
    assert "'b.png' of node 9" in warning
