"""Job files: three forms, two notations, one sentence for what is neither."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyd.errors import JobFileError
from comfyd.spool import jobfile, yamlfile

GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "KSampler"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
}


def load(document: Any, name: str = "job.json", **options: Any) -> jobfile.JobDocument:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return jobfile.load(data, name, **{"draw": lambda: 4242, **options})


def refusal(document: Any, name: str = "job.json") -> str:
    with pytest.raises(JobFileError) as caught:
        load(document, name)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_workflow_is_a_job() -> None:
    assert load(GRAPH) == jobfile.JobDocument(graph=GRAPH)


def test_of_a_request_body_the_prompt_and_extra_data_count() -> None:
    job = load(
        {
            "prompt": GRAPH,
            "prompt_id": "x",
            "client_id": "y",
            "number": -1,
            "front": True,
            "extra_data": {"extra_pnginfo": {"workflow": {}}},
            "partial_execution_targets": None,
            "later": 1,
        }
    )
    assert job.graph == GRAPH
    assert job.extra_data == {"extra_pnginfo": {"workflow": {}}}
    assert [warning.split()[0] for warning in job.warnings[:4]] == [
        "prompt_id",
        "client_id",
        "number",
        "front",
    ]
    assert '"later"' in job.warnings[4]
    assert load({"prompt": GRAPH, "extra_data": None}).warnings == ()


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        ({"prompt": GRAPH, "extra_data": []}, "extra_data must be an object"),
        ({"prompt": []}, "object of nodes"),
        ({"prompt": {}}, "empty"),
        ({"prompt": {"nodes": [], "links": []}}, "Export Workflow (API)"),
        ({"prompt": GRAPH, "partial_execution_targets": ["9"]}, "partial_execution_targets"),
    ],
)
def test_wrong_request_bodies(request_body: Any, says: str) -> None:
    assert says in refusal(request_body)


def test_a_job_document_says_it_all() -> None:
    job = load(
        {
            "workflow": GRAPH,
            "set": {"KSampler.seed": "random", "6.text": "a red fox"},
            "priority": -5,
            "max_attempts": 7,
            "on_partial": "fail",
            "metadata": {"ticket": 42, "big": 10**40},
        }
    )
    assert job.graph["3"]["inputs"] == {"seed": 4242}
    assert job.graph["6"]["inputs"] == {"text": "a red fox"}
    assert job.drawn == {"3.seed": 4242}
    assert (job.priority, job.max_attempts) == (-5, 7)
    assert job.metadata == {"ticket": 42, "big": 10**40}
    # What goes into a row must come out of the journal as it was.
    assert msgspec.json.decode(msgspec.json.encode(job.metadata)) == job.metadata


def test_the_same_bytes_and_draws_give_the_same_graph() -> None:
    document = {"workflow": GRAPH, "set": {"3.seed": "random"}}
    first = load(document)

    def no_draw() -> int:
        raise AssertionError("drawn twice")

    assert load(document, drawn=first.drawn, draw=no_draw) == first


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"workflow": None}, "workflow: Expected"),
        ({"workflow": {"nodes": [], "links": []}}, "Export Workflow (API)"),
        ({"priorty": 1}, 'unknown key "priorty"; did you mean priority?'),
        ({"zzz": 1}, "known keys are workflow, set, files, priority"),
        ({"priority": "5"}, "priority: Expected int, got str."),
        ({"priority": True}, "priority: Expected int, got bool."),
        ({"priority": 1.5}, "priority: Expected int, got float."),
        ({"priority": 1_000_001}, "priority: Expected int <= 1000000."),
        ({"priority": -(10**50)}, "priority: Expected int >= -1000000."),
        ({"max_attempts": 0}, "max_attempts: Expected int >= 1."),
        ({"max_attempts": 101}, "max_attempts: Expected int <= 100."),
        ({"set": []}, "set: Expected object, got array."),
        ({"set": {f"{n}.x": 1 for n in range(1001)}}, "set: Expected object of length <= 1000."),
        ({"set": {"3.sed": 1}}, 'Did you mean "seed"?'),
        ({"metadata": "x"}, "metadata: Expected object, got str."),
        ({"metadata": {"x": "y" * 70_000}}, "metadata: 70008 bytes are too many"),
    ],
)
def test_wrong_job_documents(keys: dict[str, Any], says: str) -> None:
    assert says in refusal({"workflow": GRAPH, **keys})


# --- what lies beside it -------------------------------------------------------------------------

BESIDE = {"photo.png", "in/mask.png"}


def named(name: str) -> bytes:
    return json.dumps({"a.json": GRAPH, "body.json": REQUEST}[name]).encode()


REQUEST = {"prompt": GRAPH, "client_id": "me", "extra_data": {"a": 1}, "later": 2}


def test_files_of_the_bundle_are_for_inputs_of_the_graph() -> None:
    files = {"6.text": "photo.png", "KSampler.seed": "in/mask.png"}
    job = load({"workflow": GRAPH, "files": files}, beside=BESIDE)
    assert job.files == {("6", "text"): "photo.png", ("3", "seed"): "in/mask.png"}
    assert job.graph == GRAPH


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"files": {"6.text": "photo.pgn"}}, 'Did you mean "photo.png"?'),
        ({"files": {"6.text": "../photo.png"}}, "must be a plain relative name"),
        ({"files": {"6.text": "/etc/shadow"}}, "must be a plain relative name"),
        ({"files": {"6.text": "./photo.png"}}, "must be a plain relative name"),
        ({"files": {"6.text": "a\\nb"}}, "is not in the bundle"),
        ({"files": {"6.text": ""}}, "must be a plain relative name"),
        ({"files": {"6.txt": "photo.png"}}, 'files: "6.txt": node "6" ("CLIPTextEncode") has no'),
        ({"files": {"7.image": "photo.png"}}, 'files: "7.image": no node has that id or title'),
        ({"files": {"image": "photo.png"}}, "must read NODE.INPUT"),
        (
            {"files": {"3.seed": "photo.png", "KSampler.seed": "in/mask.png"}},
            'files: "3.seed" and "KSampler.seed" name the same input',
        ),
        (
            {"files": {"3.seed": "photo.png"}, "set": {"KSampler.seed": 5}},
            'set and files both give "KSampler.seed" a value',
        ),
        ({"files": {"6.text": 5}}, "Expected str, got int"),
        ({"files": ["photo.png"]}, "files: Expected object, got array."),
        ({"files": {f"{n}.x": "photo.png" for n in range(101)}}, "length <= 100"),
        ({"timeouts": {"run": "0s"}}, "timeouts.run must be a time from 1s to 3650d"),
        ({"timeouts": {"run": "999ms"}}, "such as 90s, 30m or 2h"),
        ({"timeouts": {"stall": 30}}, "not 30."),
        ({"timeouts": {"queue": "4000d"}}, 'not "4000d"'),
        ({"timeouts": {"queue": None}}, "not None"),
        ({"timeouts": {"queu": "1h"}}, 'unknown key "queu"; known keys are queue, run, stall'),
        ({"timeouts": "1h"}, "timeouts: Expected object, got str."),
        ({"on_partial": "maybe"}, "on_partial: Invalid enum value 'maybe'."),
        ({"key": ""}, "key must be 1 to 200 printable characters"),
        ({"key": "x" * 201}, "this one has 201."),
        ({"key": "a\nb"}, "not all of them printable"),
        ({"key": 42}, "key: Expected"),
        ({"workflow": "portrait.json"}, "no folder of workflows is configured"),
        ({"workflow": 5}, "workflow: Expected"),
    ],
)
def test_what_a_job_document_may_not_ask_for(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(JobFileError) as caught:
        load({"workflow": GRAPH, **keys}, beside=BESIDE)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_single_file_has_no_files_beside_it() -> None:
    assert "drop the folder" in refusal({"workflow": GRAPH, "files": {"6.text": "photo.png"}})
    assert load({"workflow": GRAPH, "files": {}}) == load(GRAPH)


def test_timeouts_are_seconds() -> None:
    job = load({"workflow": GRAPH, "timeouts": {"queue": "1h", "run": "1.5m", "stall": "1s"}})
    assert (job.queue_s, job.run_s, job.stall_s) == (3600.0, 90.0, 1.0)
    assert load({"workflow": GRAPH, "timeouts": {}}) == load(GRAPH)


def test_partial_prompts_and_keys() -> None:
    job = load({"workflow": GRAPH, "on_partial": "accept", "key": "nightly-0042 ü"})
    assert (job.accept_partial, job.key) == (True, "nightly-0042 ü")
    assert not load({"workflow": GRAPH, "on_partial": "fail"}).accept_partial


def test_a_named_workflow_is_filled_in_like_any_other() -> None:
    job = load({"workflow": "a.json", "set": {"6.text": "fox"}}, named=named)
    assert job.graph["6"]["inputs"] == {"text": "fox"}
    body = load({"workflow": "body.json", "priority": 2}, named=named)
    assert (body.graph, body.extra_data, body.priority) == (GRAPH, {"a": 1}, 2)
    assert [warning.split()[0] for warning in body.warnings] == ["client_id", "dropped"]


# --- YAML ----------------------------------------------------------------------------------------

YAML = b"""
# a fox
workflow:
  "3": {class_type: KSampler, inputs: {seed: 1}, _meta: {title: KSampler}}
  "6":
    class_type: CLIPTextEncode
    inputs:
      text: >
        two
        lines
set: {"6.text": no, KSampler.seed: random}
metadata:
  [ignored]: &x 1
"""


def test_yaml_says_the_same_as_json() -> None:
    job = load(YAML.partition(b"metadata")[0], "job.yaml")
    assert job.graph["6"]["inputs"] == {"text": "no"}
    assert job.drawn == {"3.seed": 4242}
    assert load(json.dumps(GRAPH).encode(), "JOB.YML") == load(GRAPH)
    assert "not text" in refusal(YAML, "job.yml")
    assert "not valid JSON" in refusal(YAML, "job.txt")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("-12", -12),
        ("+12", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("017", 17),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("'12'", "12"),
        ('"\\U0001F98A"', "🦊"),
        ("|\n    a\n    b", "a\nb\n"),
        ("!", "!"),
        ("<<", "<<"),
        ("=", "="),
    ],
)
def test_plain_words_mean_what_they_say(word: str, value: object) -> None:
    source = f"workflow: {json.dumps(GRAPH)}\nmetadata:\n  x: {word}\n"
    if word == "!":
        assert "tag" in refusal(source.encode(), "job.yaml")
    else:
        assert load(source.encode(), "job.yaml").metadata == {"x": value}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"---\n", "one object"),
        ("a: 1".encode("utf-16"), "UTF-16"),
        (b"a: \xff", "not UTF-8"),
        (b"a: b\n c: d: e", "line 2"),
        (b"\tx: y", "not valid YAML"),
        (b"a: x\x07y", "not valid YAML"),
        (b"a: 'x", "not valid YAML"),
        (b"a: &x 1\nb: *x", "anchor (&x)"),
        (b"a: *x", "alias (*x)"),
        (b"a: !!python/object/apply:os.system [ls]", "tag"),
        (b"a: !!str 5", "tag"),
        (b"3: x", 'put it in quotes, as in "3"'),
        (b"true: x", "not text"),
        (b"? [a]\n: b", "not text"),
        (b"a: 1\na: 2", '"a" is given again on line 2'),
        (b"a: 1\n---\nb: 2", "second YAML document starts on line 2"),
        (b"a: .nan", "not a finite number"),
        (b"a: -.Inf", "not a finite number"),
        (b"a: 1e999", "too large"),
        (b"a: " + b"9" * 301, "300 digits"),
        (b'a: "\\ud800"', "not valid YAML"),
        (b"[" * 201 + b"]" * 201, "deeper than 200"),
        (b"[" * 1_000_000, "deeper than 200"),
        (b"- " * 1_000, "deeper than 200"),
        (b"{a: " * 1_000, "deeper than 200"),
        (b"#" * 3_000_000, "2 MiB at most"),
    ],
)
def test_what_is_no_yaml_of_ours_gets_one_sentence(data: bytes, says: str) -> None:
    assert says in refusal(data, "job.yaml")


def test_without_libyaml_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlfile, "_LOADER", yaml.SafeLoader)
    assert load(YAML.partition(b"metadata")[0], "job.yaml").drawn == {"3.seed": 4242}
    assert "surrogate" in refusal(b'a: "\\ud800"', "job.yaml")
    assert "deeper than 200" in refusal(b"[" * 5_000, "job.yaml")
    assert "not valid YAML" in refusal(b"a: x\x07y", "job.yaml")


# --- anything ------------------------------------------------------------------------------------

_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["prompt", "workflow", "set", "class_type", "inputs", "nodes", "links", "metadata",
                 "extra_data", "priority", "3", "3.seed", "_meta", "title"]
            ) | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)  # fmt: skip


@given(_documents, st.sampled_from(["a.json", "a.yaml"]))
@settings(max_examples=400)
def test_no_document_crashes(document: Any, name: str) -> None:
    with contextlib.suppress(JobFileError):
        load(document, name)


@given(
    st.binary(max_size=120) | st.text(alphabet="ab: -?,[]{}#&*!|>'\"%@`\n\t3.~<=\\u", max_size=60)
    .map(str.encode),
    st.sampled_from(["a.json", "a.yaml"]),
)  # fmt: skip
@settings(max_examples=800)
def test_no_bytes_crash(data: bytes, name: str) -> None:
    with contextlib.suppress(JobFileError):
        load(data, name)
