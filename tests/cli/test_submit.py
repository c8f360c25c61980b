"""``comfyd submit`` without waiting: what lies in new/ afterwards."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comfyd.cli.parcel import Parcel
from comfyd.spool.layout import Spool, is_job_id
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


def test_a_request_body_becomes_a_document(site: Site):
    body = {"prompt": GRAPH, "client_id": "me"}
    code, _, err = site("submit", site.file("ok.json", body), "--priority", "2")
    assert code == 0
    assert "client_id was dropped" in err
    [document] = site.dropped().values()
    assert document == {"workflow": GRAPH, "priority": 2}


def test_a_request_body_with_extra_data_goes_beside_a_document(site: Site):
    body = {"prompt": GRAPH, "client_id": "me", "extra_data": EXTRA}
    code, out, err = site("submit", site.file("fox.json", body), "--set=1.width=32")
    assert code == 0
    assert "client_id was dropped" in err
    [folder] = site.spool.new.iterdir()
    assert folder.name == out.strip()
    assert files_of(folder) == {
        "job.json": {"workflow": "request.json", "set": {"1.width": 32}},
        "request.json": body,
    }
    code, _, err = site("submit", site.file("as-is.json", body))
    assert code == 0
    assert "client_id was dropped" in err


def files_of(folder: Path) -> dict[str, Any]:
    """The JSON files of a bundle, by relative name; of the others their bytes."""
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_bytes())
        if path.suffix == ".json"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_files_make_a_bundle(site: Site):
    (site.home / "a").mkdir()
    first, second = site.file("ph oto.png", b"1"), site.file("a/ph oto.png", b"2")
    third = site.file("job.json", b"3")
    code, out, err = site(
        "submit", site.file("fox.v2.json", FOX), "--file", f"1.image={first}",
        "--file", f"2.image={second}", "--file", f"3.image={third}",
        "--file", f"Four.image={first}", "--priority", "4",
    )  # fmt: skip
    assert (code, err) == (0, "")
    [folder] = site.spool.new.iterdir()
    assert folder.name == out.strip()
    assert folder.name.startswith("fox_v2.")
    found = files_of(folder)
    assert found.pop("job.json") == {
        "workflow": FOX,
        "files": {
            "1.image": "ph_oto.png", "2.image": "ph_oto-2.png", "3.image": "job-2.json",
            "Four.image": "ph_oto.png",
        },
        "priority": 4,
    }  # fmt: skip
    assert found == {"ph_oto.png": b"1", "ph_oto-2.png": b"2", "job-2.json": 3}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
    assert stat.S_IMODE((folder / "ph_oto.png").stat().st_mode) == 0o640
    assert list(site.spool.tmp.iterdir()) == []


FOX = {
    str(n): {"class_type": "LoadImage", "inputs": {"image": "x"}, "_meta": {"title": title}}
    for n, title in enumerate(["One", "Two", "Three", "Four"], 1)
}


def bundle(site: Site, document: object, name: str = "job.json") -> Path:
    folder = site.home / "portrait.v1"
    (folder / "in").mkdir(parents=True)
    site.file(f"portrait.v1/{name}", document)
    (folder / "in" / "photo.png").write_bytes(b"1")
    return folder


def test_a_folder_is_copied(site: Site):
    document = {"workflow": FOX, "files": {"1.image": "in/photo.png"}}
    folder = bundle(site, document)
    (folder / "twin.png").hardlink_to(folder / "in" / "photo.png")
    code, out, err = site("submit", f"{folder}/")
    assert (code, err) == (0, "")
    [dropped] = site.spool.new.iterdir()
    assert dropped.name == out.strip()
    assert dropped.name.startswith("portrait_v1.")
    assert files_of(dropped) == files_of(folder)
    assert stat.S_IMODE((dropped / "in").stat().st_mode) == 0o2770
    assert (dropped / "twin.png").stat().st_nlink == 1
    code, out, _ = site("submit", str(folder), "--name", "fox")
    assert out.startswith("fox.")


def test_options_are_for_folders_too(site: Site):
    yaml = b"workflow: graph.json\nfiles: {1.image: in/photo.png}\n"
    folder = bundle(site, yaml, "job.yaml")
    (folder / "graph.json").write_text(json.dumps(FOX))
    other = site.file("photo.png", b"2")
    code, _, _ = site("submit", str(folder), "--set", "2.image=y", "--file", f"3.image={other}")
    assert code == 0
    [dropped] = site.spool.new.iterdir()
    assert files_of(dropped) == {
        "graph.json": FOX,
        "in/photo.png": b"1",
        "job.json": {
            "workflow": "graph.json",
            "files": {"1.image": "in/photo.png", "3.image": "photo.png"},
            "set": {"2.image": "y"},
        },
        "photo.png": b"2",
    }


def test_a_named_workflow_is_looked_up_as_the_daemon_will(site: Site):
    path = site.file("fox.json", {"workflow": "graph.json", "set": {"1.image": "y"}})
    site.file("graph.json", FOX)  # beside it, which is no bundle
    code, _, err = site("submit", path)
    assert code == 65
    assert "no folder of workflows is configured" in err
    site.config.write_text(site.config.read_text() + "workflows: flows\n")
    code, _, err = site("submit", path)
    assert "neither beside the job document nor in the folder of workflows" in err
    (site.home / "flows").mkdir()
    site.file("flows/graph.json", FOX)
    code, _, _ = site("submit", path, "--priority", "1")
    assert code == 0
    [document] = site.dropped().values()
    assert document == {"workflow": "graph.json", "set": {"1.image": "y"}, "priority": 1}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("1.image=missing.png", "missing.png is not there"),
        ("1.image=/", "is no regular file"),
        ("1.image=\udcff", "is not there"),
        ("7.image=photo.png", 'files: "7.image": no node has that id or title'),
        ("One.imag=photo.png", 'Did you mean "image"?'),
    ],
)
def test_a_file_that_cannot_be_given_is_told_and_nothing_is_dropped(
    option: str, says: str, site: Site, monkeypatch: pytest.MonkeyPatch
):
    site.file("photo.png", b"1")
    monkeypatch.chdir(site.home)
    code, out, err = site("submit", site.file("fox.json", FOX), "--file", option)
    assert (code, out) == (65, "")
    assert says in err
    assert site.dropped() == {}


@pytest.mark.parametrize("option", ["photo.png", "=photo.png", "1.image="])
def test_a_file_option_must_be_whole(option: str, site: Site):
    code, _, err = site("submit", site.file("fox.json", FOX), "--file", option)
    assert code == 64
    assert "NODE.INPUT=PATH" in err
    fox = site.file("fox.json", FOX)
    assert site("submit", fox, "--file", "1.image=a", "--file", "1.image=b")[0] == 64


def test_files_that_are_too_large_together_are_told(site: Site):
    large = site.home / "large"
    large.touch()
    os.truncate(large, 256 * 2**20 + 1)
    code, _, err = site("submit", site.file("fox.json", FOX), "--file", f"1.image={large}")
    assert code == 65
    assert "a bundle may have 268435456" in err


def add_link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")


def add_fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def remove_document(folder: Path) -> None:
    (folder / "job.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (add_link, "symbolic link"),
        (add_fifo, "no regular file"),
        (remove_document, "no job.yaml or job.json"),
    ],
)
def test_a_folder_that_is_no_bundle_is_told(spoil: Callable[[Path], None], says: str, site: Site):
    folder = bundle(site, {"workflow": FOX})
    spoil(folder)
    good = site.file("good.json", GRAPH)
    code, out, err = site("submit", good, str(folder))
    assert (code, out) == (65, "")
    assert says in err
    assert site.dropped() == {}


def test_a_folder_that_changes_while_it_is_copied_is_not_dropped(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    folder = bundle(site, {"workflow": FOX})
    real = Parcel.drop

    def slow(self: Parcel, spool: Spool) -> str:
        add_link(folder)
        return real(self, spool)

    monkeypatch.setattr(Parcel, "drop", slow)
    code, out, err = site("submit", str(folder))
    assert (code, out) == (65, "")
    assert "symbolic link" in err
    assert site.dropped() == {}
    assert list(site.spool.tmp.iterdir()) == []


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
    (json.dumps({"workflow": GRAPH, "key": ""}).encode(), "key must be"),
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
