"""The graph: read strictly, recognised, filled in, made unique, sent."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from comfyd.core import workflow
from comfyd.core.model import JobId, PromptId
from comfyd.core.workflow import Kind
from comfyd.errors import JobFileError

NODE = {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], "name": "euler"}}
GRAPH = {
    "3": {**NODE, "_meta": {"title": "KSampler"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}, "_meta": {"title": "Prompt"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "b"}, "_meta": {"title": "Text"}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "c"}, "_meta": {"title": "Text"}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "fox"}},
    "Prompt.2": {"class_type": "Note", "inputs": {"text": "d"}, "_meta": {"title": 5}},
}


def no_draw() -> int:
    raise AssertionError("nothing was to be drawn")


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "UTF-16 or UTF-32"),
        (b"{}\n\n\xff", "Line 3 is not UTF-8"),
        (b"{", "not valid JSON"),
        (b"{'a': 1}", "line 1, column 2"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "too large"),
        (b"[-1e999]", "too large"),
        (b"[" + b"9" * 301 + b"]", "300 digits"),
        (b"[" + b"9" * 5000 + b"]", "300 digits"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": 1, "b": 2, "a": 3}', '"a" is given twice'),
        (b"[" * 201 + b"]" * 201, "deeper than 200"),
        (b"[" * 100_000, "deeper than 200"),
        (b'{"a":' * 100_000, "deeper than 200"),
        (b'"\\"' + b"[" * 300, "not valid JSON"),
    ],
)
def test_what_is_no_json_gets_one_sentence(data: bytes, says: str) -> None:
    with pytest.raises(JobFileError) as caught:
        workflow.parse_json(data)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'["\\ud83e\\udd8a"]', ["🦊"]),
        (b"[" * 200 + b"]" * 200, None),
        (b'["' + b"[" * 300 + b'"]', ["[" * 300]),
        (b'["\\"[[", "\\\\"' + b", []" * 300 + b"]", None),
        (b"[" + b"9" * 300 + b"]", [int("9" * 300)]),
        (b"[1e308, 0.1, -0]", [1e308, 0.1, 0]),
    ],
)
def test_strict_json_is_read(data: bytes, value: object) -> None:
    read = workflow.parse_json(data)
    assert value is None or read == value


@pytest.mark.parametrize(
    "piece", [b'"\\"', b"[],", b'{"a":', b"\\", b'"', b"1,", b'"a":"\\u0000",']
)
def test_no_repetition_takes_long(piece: bytes) -> None:
    """Not quadratic: a megabyte of anything is refused (pytest's faulthandler ends a hang)."""
    with pytest.raises(JobFileError):
        workflow.parse_json(piece * (1_000_000 // len(piece)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(json_values)
def test_every_strict_document_survives(value: object) -> None:
    assert workflow.parse_json(json.dumps(value).encode()) == value
    assert workflow.parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(
    st.binary(max_size=200)
    | st.text(alphabet='{}[]",:\\u0d8eE+-.naN1 \n', max_size=80).map(str.encode)
)
@example(b'{"\\u0000": "\\uDBFF"}')
@settings(max_examples=500)
def test_reading_never_crashes(data: bytes) -> None:
    with contextlib.suppress(JobFileError):
        workflow.recognise(workflow.parse_json(data))


# --- recognising ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        (GRAPH, Kind.WORKFLOW),
        ({"prompt": GRAPH, "client_id": "x"}, Kind.REQUEST),
        ({"prompt": 1}, Kind.REQUEST),
        ({"workflow": GRAPH, "priority": 1}, Kind.DOCUMENT),
        ({"workflow": "name.json"}, Kind.DOCUMENT),
        ({"prompt": NODE, "workflow": NODE}, Kind.WORKFLOW),  # odd node ids, but ids
        ({}, Kind.WORKFLOW),  # refused as an empty one
    ],
)
def test_three_forms_are_told_apart(document: object, kind: Kind) -> None:
    assert workflow.recognise(document) is kind


@pytest.mark.parametrize("document", [[], None, 1, "x", {"a": 1}, {"set": {}}])
def test_anything_else_is_refused(document: object) -> None:
    with pytest.raises(JobFileError):
        workflow.recognise(document)


@pytest.mark.parametrize("links", [[], [[1, 4, 0, 3, 0, "MODEL"]], None])
def test_an_editor_workflow_is_told_how_to_become_one(links: object) -> None:
    editor = {"last_node_id": 9, "nodes": [{"id": 3, "type": "KSampler"}], "links": links}
    with pytest.raises(JobFileError) as caught:
        workflow.recognise(editor)
    assert "Export Workflow (API)" in caught.value.message
    with pytest.raises(JobFileError) as caught:
        workflow.check_graph(editor)  # inside a request body or a job document
    assert caught.value.message == workflow.EXPORT_HINT


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        ({}, "empty"),
        ([], "object of nodes"),
        ({"3": None}, 'Node "3"'),
        ({"3": {"inputs": {}}}, "no class_type"),
        ({"3": {"class_type": "", "inputs": {}}}, "no class_type"),
        ({"3": {"class_type": 5, "inputs": {}}}, "no class_type"),
        ({"3": {"class_type": "A"}}, "no inputs"),
        ({"3": {"class_type": "A", "inputs": []}}, "no inputs"),
        ({3: NODE}, "node id 3"),
        ({"3": NODE, "version": 0.4}, 'Node "version"'),
    ],
)
def test_a_graph_has_the_shape_of_one(graph: object, says: str) -> None:
    with pytest.raises(JobFileError, match=says):
        workflow.check_graph(graph)


# --- filling in ----------------------------------------------------------------------------------


def test_inputs_are_set_by_id_and_by_title() -> None:
    before = copy.deepcopy(GRAPH)
    graph, drawn = workflow.apply_set(
        GRAPH,
        {"KSampler.seed": 7, "6.text": "a red fox", "Prompt.2.text": "x", "3.model": ["5", 1]},
        draw=no_draw,
    )
    assert graph["3"]["inputs"] == {"seed": 7, "model": ["5", 1], "name": "euler"}
    assert graph["6"]["inputs"] == {"text": "a red fox"}
    assert graph["Prompt.2"]["inputs"] == {"text": "x"}
    assert drawn == {}
    assert before == GRAPH


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("seed", "NODE.INPUT"),
        (".seed", "NODE.INPUT"),
        ("3.", "NODE.INPUT"),
        ("KSampelr.seed", 'Did you mean "KSampler"'),
        ("33.seed", "no node has that id or title"),
        ("3.sed", 'Did you mean "seed"'),
        ("3.zzz", 'There is "seed", "model", "name"'),
        ("Text.text", 'use a node id ("7", "8")'),
        ("3.seed.x", "no node has that id or title"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_near(key: str, says: str) -> None:
    with pytest.raises(JobFileError) as caught:
        workflow.apply_set(GRAPH, {key: 1}, draw=no_draw)
    assert f'"{key}"' in caught.value.message
    assert says in caught.value.message


def test_one_input_is_not_set_twice() -> None:
    with pytest.raises(JobFileError, match="same input"):
        workflow.apply_set(GRAPH, {"3.seed": 1, "KSampler.seed": 2}, draw=no_draw)


def test_random_is_drawn_once_and_then_remembered() -> None:
    draws = iter([2**53 - 1])
    graph, drawn = workflow.apply_set(GRAPH, {"KSampler.seed": "random"}, draw=lambda: next(draws))
    assert drawn == {"3.seed": (2**53 - 1) % workflow.SEED_LIMIT}
    assert 0 <= drawn["3.seed"] < 2**50
    again, same = workflow.apply_set(GRAPH, {"KSampler.seed": "random"}, drawn=drawn, draw=no_draw)
    assert (again, same) == (graph, drawn)


def test_random_is_not_drawn_into_a_text() -> None:
    with pytest.raises(JobFileError, match="holds text"):
        workflow.apply_set(GRAPH, {"6.text": "random"}, draw=no_draw)


# --- sending -------------------------------------------------------------------------------------

JOB = JobId("fox.01ARZ3NDEKTSV4RRFFQ69G5FAV")


@pytest.mark.parametrize(
    ("prefix", "own"),
    [
        ("fox", "fox"),
        ("a/b", "a/b"),
        ("", "ComfyUI"),
        ("/etc/fox", "etc/fox"),
        ("../../fox", "fox"),
        ("a/../../../b", "a/b"),
        ("..\\..\\fox", "fox"),
        ("a/. ./ .. /b", "a/. ./b"),
        ("..", "ComfyUI"),
        ("%date:yyyy%/fox", "%date:yyyy%/fox"),
    ],
)
def test_every_attempt_has_a_prefix_of_its_own(prefix: str, own: str) -> None:
    graph = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix, "x": 1}}}
    before = copy.deepcopy(graph)
    made = workflow.make_unique(graph, JOB, 2)
    assert made["9"]["inputs"] == {"filename_prefix": f"comfyd/{JOB}-2/{own}", "x": 1}
    assert graph == before


@pytest.mark.parametrize("value", [["5", 0], None, 5])
def test_a_prefix_that_is_no_text_stays(value: object) -> None:
    graph = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": value}}, "3": NODE}
    assert workflow.make_unique(graph, JOB, 1) == graph


@given(st.text(max_size=40))
def test_no_prefix_leads_out_of_its_folder(prefix: str) -> None:
    graph = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix}}}
    own = workflow.make_unique(graph, JOB, 1)["9"]["inputs"]["filename_prefix"]
    parts = own.replace("\\", "/").split("/")
    assert parts[:2] == ["comfyd", f"{JOB}-1"]
    assert len(parts) > 2
    assert not {"", ".", ".."} & set(parts)


def test_the_body_names_the_attempt_and_never_a_number() -> None:
    graph = {"3": {**NODE, "inputs": {"text": "füchse 🦊", "n": 10**200}}}
    data = workflow.body(
        graph, {"extra_pnginfo": {}, "comfyd": "forged"}, PromptId("p"), "c", JOB, 2
    )
    assert json.loads(data) == {
        "prompt": graph,
        "prompt_id": "p",
        "client_id": "c",
        "extra_data": {"extra_pnginfo": {}, "comfyd": {"job": JOB, "attempt": 2}},
    }
