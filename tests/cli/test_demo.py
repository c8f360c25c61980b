"""``comfyd demo``, and the samples it runs."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from comfyd.cli import demo
from comfyd.cli.samples import Sample, samples
from comfyd.cli.verify import PNG_SIGNATURE, problems_of
from comfyd.simulator.catalogue import NODE_CLASSES
from comfyd.spool import jobfile
from tests.cli.conftest import Site

NOT_IN_COMFYUI = {name for name in NODE_CLASSES if name.startswith("Sim")}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where demos make their folders."""
    folder = tmp_path / "demos"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(demo, "NODE_S", 0.01)
    return folder


# --- samples -------------------------------------------------------------------------------------


def test_samples_are_good_jobs_of_core_nodes():
    for sample in samples(20, random.Random(1)):
        data = json.dumps(sample.document).encode()
        document = jobfile.load(data, "x.json", draw=lambda: 7)
        classes = {node["class_type"] for node in document.graph.values()}
        assert "SaveImage" in classes
        assert classes <= NODE_CLASSES.keys() - NOT_IN_COMFYUI


def test_no_two_samples_are_the_same_graph():
    made = samples(40, random.Random(1)) + samples(40, random.Random(2))
    assert len({json.dumps(sample.document) for sample in made}) == 80


# --- verification --------------------------------------------------------------------------------

SAMPLE = Sample("x", {}, images=1, text="hello")
PNG = PNG_SIGNATURE + b"rest"
GOOD: dict[str, Any] = {
    "state": "done",
    "outputs": [
        {
            "file": "9-0.png",
            "bytes": len(PNG),
            "sha256": hashlib.sha256(PNG).hexdigest(),
        }
    ],
    "ui": {"12": {"text": ["hello"]}},
}


def result(folder: Path, data: bytes = PNG, **changes: Any) -> Path:
    (folder / "result.json").write_text(json.dumps(GOOD | changes))
    (folder / "9-0.png").write_bytes(data)
    return folder


def test_a_good_result_has_no_problems(tmp_path: Path):
    assert problems_of(SAMPLE, result(tmp_path)) == []


@pytest.mark.parametrize(
    ("data", "changes", "told"),
    [
        (PNG, {"state": "failed"}, "says failed"),
        (PNG, {"outputs": []}, "0 outputs instead of 1"),
        (PNG, {"ui": {}}, "its text"),
        (PNG[:-1], {}, "bytes, not"),
        (PNG[:-1] + b"!", {}, "SHA-256"),
        (b"<html>", {}, "no PNG"),
    ],
)
def test_whatever_is_wrong_is_told(data: bytes, changes: dict[str, Any], told: str, tmp_path: Path):
    assert told in " ".join(problems_of(SAMPLE, result(tmp_path, data, **changes)))


def test_missing_files_are_told(tmp_path: Path):
    folder = result(tmp_path)
    (folder / "9-0.png").unlink()
    assert "cannot be read" in problems_of(SAMPLE, folder)[0]
    (folder / "result.json").write_bytes(b"{")
    assert "result.json cannot be read" in problems_of(SAMPLE, folder)[0]


# --- the whole -----------------------------------------------------------------------------------


def test_the_demo_verifies_every_result_and_leaves_them(site: Site, folders: Path):
    code, out, err = site("demo")
    assert code == 0, err
    [folder] = folders.iterdir()
    lines = out.splitlines()
    assert lines[-4].startswith("8 of 8 results verified in ")
    assert lines[-4].endswith("PNG signature of 11 files")
    assert lines[-3] == f"results  {folder / 'spool' / 'done'}"
    assert "comfyd_jobs_finished_total" in (folder / "metrics.txt").read_text()
    assert len(list((folder / "spool" / "done").iterdir())) == 8
    assert sum(": done in " in line for line in lines) == 8
    code, out, err = site("-c", str(folder / "comfyd.yaml"), "jobs", "--json")
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["done"] * 8
    log = (folder / "comfyd.log").read_text()
    assert "stopped" in log
    assert "level=error" not in log


def test_json_is_all_there_is_on_stdout(site: Site):
    report = site.json("demo", "--jobs", "2")
    assert report["verified"] == 2
    assert [job["verified"] for job in report["jobs"]] == [True, True]
    assert Path(report["metrics"]).is_file()


def test_a_result_that_is_not_as_promised_fails_the_demo(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    def wrong(count: int, chance: random.Random) -> list[Sample]:
        [first, *_] = samples(1, chance)
        return [first, Sample("twice", first.document, images=2)]

    monkeypatch.setattr(demo, "samples", wrong)
    code, out, _ = site("demo")
    assert code == 1
    assert "1 outputs instead of 2" in out
    assert "1 of 2 results verified" in out


def test_a_server_that_is_not_there_fails_the_demo(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SERVER_S", 0.5)
    code, out, err = site("demo", "--server", "http://127.0.0.1:9", "--jobs", "1")
    assert code == 1
    assert "0 of 1 results verified" in out
    assert "http://127.0.0.1:9 is down" in err


def test_a_bad_address_leaves_nothing_behind(site: Site, folders: Path):
    code, _, err = site("demo", "--server", "ftp://x")
    assert code == 64
    assert err.startswith("comfyd: --server ftp://x: must be an address")
    assert list(folders.iterdir()) == []


def test_a_kept_daemon_goes_on_until_it_is_told(site: Site, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    told = demo._until_told

    async def soon() -> None:
        asked.append("yes")
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        await told()

    monkeypatch.setattr(demo, "_until_told", soon)
    code, _, err = site("demo", "--jobs", "1", "--keep")
    assert (code, asked) == (0, ["yes"])
    assert "goes on at http://127.0.0.1:" in err
