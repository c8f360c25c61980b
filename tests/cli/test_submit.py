"""``comfyd submit`` without waiting: what lies in new/ afterwards."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from typing import Any

import pytest

from comfyd.spool.layout import is_job_id
from tests.cli.conftest import GRAPH, Site

EXTRA: dict[str, Any] = {"extra_pnginfo": {"workflow": {}}}


def test_ids_are_printed_and_files_dropped_as_they_are(site: Site):
    yaml = b"workflow:\n  '1': {class_type: A, inputs: {}}\n"
    code, out, err = site("submit", site.file("a fox.json", GRAPH), site.file("b.yml", yaml))
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert is_job_id(first)
    assert first.startswith("a_fox.")
    assert json.loads((site.spool.new / f"{first}.json").read_bytes()) == GRAPH
    assert (site.spool.new / f"{second}.yaml").read_bytes() == yaml
    assert list(site.spool.tmp.iterdir()) == []


def test_submitting_again_is_another_job(site: Site):
    path = site.file("fox.json", GRAPH)
    jobs = [site("submit", path)[1].strip() for _ in range(2)]
    again = str((site.spool.new / f"{jobs[0]}.json").rename(site.home / f"{jobs[0]}.json"))
    jobs.append(site("submit", again)[1].strip())
    assert len(set(jobs)) == 3
    assert all(job.startswith("fox.") and is_job_id(job) for job in jobs)


def test_json_tells_which_file_became_which_job(site: Site):
    path = site.file("fox.json", GRAPH)
    [only] = site.json("submit", path)["jobs"]
    assert only["file"] == path
    assert list(site.dropped()) == [f"{only['job']}.json"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1.5", 1.5),
        ("true", True),
        ('"7"', "7"),
        ("a red fox", "a red fox"),
        ("a=b", "a=b"),
        ("", ""),
        ("random", "random"),
        ('["1", 0]', ["1", 0]),
        ("NaN", "NaN"),
    ],
)
def test_values_are_json_or_else_text(text: str, value: Any, site: Site):
    site("submit", site.file("fox.json", GRAPH), "--set", f"1.width={text}")
    [document] = site.dropped().values()
    assert document == {"workflow": GRAPH, "set": {"1.width": value}}


def test_options_go_into_the_job_document(site: Site):
    own = {"workflow": GRAPH, "set": {"1.width": 8, "1.height": 8}, "priority": 1, "metadata": {}}
    args = ("--set", "1.width=32", "--set", "Save it.filename_prefix=y", "--priority", "-3")
    code, out, _ = site("submit", site.file("fox.yaml", own), *args, "--name", "../Über.json")
    assert code == 0
    assert out.startswith("_ber.")
    [(name, document)] = site.dropped().items()
    assert name == out.strip() + ".json"
    assert document["set"] == {"1.width": 32, "1.height": 8, "Save it.filename_prefix": "y"}
    assert document["priority"] == -3
    assert document["metadata"] == {}


def test_a_request_body_becomes_a_document_unless_that_would_lose_something(site: Site):
    body = {"prompt": GRAPH, "client_id": "me"}
    code, _, err = site("submit", site.file("ok.json", body), "--priority", "2")
    assert code == 0
    [document] = site.dropped().values()
    assert document == {"workflow": GRAPH, "priority": 2}
    code, _, err = site(
        "submit", site.file("no.json", {**body, "extra_data": EXTRA}), "--set=1.a=1"
    )
    assert code == 65
    assert "extra_data" in err
    code, _, err = site("submit", site.file("as-is.json", {**body, "extra_data": EXTRA}))
    assert code == 0
    assert "client_id was dropped" in err


def test_names_keep_their_dots_and_yaml_stays_yaml(site: Site):
    path = site.file("b.yaml", b"workflow: {'1': {class_type: A, inputs: {}}}")
    code, out, _ = site("submit", path, "--name", "portrait.v2")
    assert code == 0
    assert out.startswith("portrait_v2.")
    assert [p.suffix for p in site.spool.new.iterdir()] == [".yaml"]


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (json.dumps(GRAPH).encode(), ".json"),
        (b"\xef\xbb\xbf\n " + json.dumps(GRAPH).encode(), ".json"),
        (b"workflow: {'1': {class_type: A, inputs: {}}}", ".yaml"),
    ],
)
def test_stdin_is_read(data: bytes, suffix: str, site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, out, _ = site("submit", "-", "--name", "fox")
    assert code == 0
    assert [p.name for p in site.spool.new.iterdir()] == [out.strip() + suffix]


BAD: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b"", "empty"),
    (b"\xff\xfe\0", "UTF-16"),
    (b'{"nodes": [], "links": []}', "Export"),
    (b'{"1": {"class_type": "A"}}', "inputs"),
    (json.dumps({"workflow": GRAPH, "key": "k"}).encode(), "does not support"),
    (json.dumps({"workflow": GRAPH, "set": 5}).encode(), "set"),
    (b'{"a":' * 5000, "deeper"),
]


@pytest.mark.parametrize("options", [(), ("--priority", "1"), ("--set", "1.width=1")])
@pytest.mark.parametrize(("data", "told"), BAD)
def test_one_bad_file_and_nothing_is_dropped(
    data: bytes, told: str, options: tuple[str, ...], site: Site
):
    good, bad = site.file("good.json", GRAPH), site.file("bad.json", data)
    code, out, err = site("submit", good, bad, *options)
    assert (code, out) == (65, "")
    first, last = err.splitlines()
    assert first.startswith(f"comfyd: {bad}: ")
    assert told in first
    assert last == "comfyd: nothing was submitted"
    assert site.dropped() == {}


def test_every_bad_file_is_named(site: Site):
    folder = site.home / "folder.json"
    folder.mkdir()
    fifo = site.home / "big.json"
    fifo.write_bytes(b" " * (16 * 2**20 + 1))
    paths = [str(site.home / "missing.json"), str(folder), str(fifo), "nul\0.json"]
    code, _, err = site("submit", *paths)
    assert code == 65
    assert len(err.splitlines()) == 4
    for told in ("No such file", "folder", "jobs.max_file_bytes", "null byte"):
        assert told in err


def test_a_setting_that_names_nothing_is_told(site: Site):
    code, _, err = site("submit", site.file("fox.json", GRAPH), "--set", "1.widht=5")
    assert code == 65
    assert "width" in err


def test_options_may_not_make_a_file_too_large(site: Site):
    text = site.config.read_text() + f"jobs: {{max_file_bytes: {len(json.dumps(GRAPH)) + 20}}}\n"
    site.config.write_text(text)
    path = site.file("fox.json", GRAPH)
    assert site("submit", path)[0] == 0
    code, _, err = site("submit", path, "--set", f"1.width={'9' * 50}")
    assert code == 65
    assert "max_file_bytes" in err


@pytest.mark.parametrize(
    "name", ["-x.json", "a b\n\x1b[31m.json", "ü\u202e.json", ".json", "…" * 80, "x.yaml.json"]
)
def test_hostile_names_become_safe_ids(name: str, site: Site):
    site.file(name, GRAPH)
    code, out, err = site("submit", str(site.home / name))
    assert (code, err) == (0, "")
    assert is_job_id(out.removesuffix("\n"))
    assert list(site.dropped()) == [f"{out.strip()}.json"]


def test_a_name_that_starts_with_a_dash_needs_the_usual_dashes(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    site.file("-x.json", GRAPH)
    monkeypatch.chdir(site.home)
    assert site("submit", "-x.json")[0] == 64
    assert site("submit", "--", "-x.json")[0] == 0


def test_without_a_spool_it_is_a_matter_of_configuration(site: Site):
    path = site.file("fox.json", GRAPH)
    site.config.write_text("spool: elsewhere\n")
    code, out, err = site("submit", path)
    assert (code, out) == (78, "")
    assert "no spool" in err
    assert "elsewhere" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_without_the_right_to_write_it_says_what_to_do(site: Site):
    path = site.file("fox.json", GRAPH)
    site.spool.tmp.chmod(0o500)
    code, _, err = site("submit", path)
    site.spool.tmp.chmod(0o700)
    assert code == 78
    assert "join the group" in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_on_a_full_disk_it_says_what_was_submitted_and_leaves_nothing_half_done(
    number: int, site: Site, monkeypatch: pytest.MonkeyPatch
):
    real, syncs = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs > 2:  # the first file and its folder
            raise OSError(number, "refused")
        real(fd)

    files = [site.file(f"{name}.json", GRAPH) for name in "abc"]
    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = site("submit", *files)
    assert code == 70
    assert list(site.dropped()) == [f"{out.strip()}.json"]
    assert list(site.spool.tmp.iterdir()) == []
    count, why = err.splitlines()
    assert "1 of 3 jobs were submitted" in count
    assert why.startswith("comfyd: nothing more was submitted: ")
    assert os.strerror(number) in why
