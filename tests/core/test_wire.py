"""The WebSocket's messages: what each means, and that nothing a server says can hurt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core.model import End, PromptId
from comfyd.core.wire import (
    MESSAGE_TYPES,
    Alive,
    Ended,
    Ending,
    Ignored,
    Invalid,
    Status,
    decode_message,
    label_of,
)

P = PromptId("7c9e6679-7425-40de-944b-e07fc1f90ae7")
TRANSCRIPTS = sorted((Path(__file__).parent.parent / "transcripts").glob("*.json"))


def said(type_: str, **data: Any) -> str:
    return json.dumps({"type": type_, "data": data})


def raw(text: str) -> str:
    return text.replace("%s", P).replace("HUGE", "9" * 400)


def status(remaining: object, **more: Any) -> str:
    return said("status", status={"exec_info": {"queue_remaining": remaining}}, **more)


MEANINGS = [
    (status(3), Status(3)),
    (status(0, sid="abc"), Status(0, "abc")),
    (said("execution_start", prompt_id=P, timestamp=1), Alive("execution_start", P)),
    (said("execution_cached", prompt_id=P, nodes=[]), Alive("execution_cached", P)),
    (said("executing", prompt_id=P, node="4", display_node="4"), Alive("executing", P)),
    (said("progress", prompt_id=P, node="4", value=1, max=20), Alive("progress", P)),
    (said("progress_state", prompt_id=P, nodes={}), Alive("progress_state", P)),
    (said("executed", prompt_id=P, node="9", output=None), Alive("executed", P)),
    (said("execution_success", prompt_id=P), Ending("execution_success", P, End.SUCCESS)),
    (
        said("execution_interrupted", prompt_id=P, executed=[]),
        Ending("execution_interrupted", P, End.INTERRUPTED),
    ),
    (
        said("execution_error", prompt_id=P, exception_type="ValueError"),
        Ending("execution_error", P, End.ERROR),
    ),
    # The prompt goes on after this one, and may succeed.
    (
        said("execution_error", prompt_id=P, exception_type="ExecutionBlocked"),
        Alive("execution_error", P),
    ),
    (said("executing", prompt_id=P, node=None), Ended(P)),
    (said("feature_flags", max_upload_size=1), Ignored("feature_flags")),
    (said("crystools.monitor", cpu=1), Ignored("crystools.monitor")),
    ('{"type": "logs"}', Ignored("logs")),
    # Python's json writes these, and strict parsers stop at them.
    (raw('{"type":"progress","data":{"value":NaN,"prompt_id":"%s"}}'), Alive("progress", P)),
    (raw('{"type":"executing","data":{"x":-Infinity,"node":null,"prompt_id":"%s"}}'), Ended(P)),
    (raw('{"type":"executed","data":{"x":"\\ud800","prompt_id":"%s"}}'), Alive("executed", P)),
    (raw('{"type":"executed","data":{"x":HUGE,"prompt_id":"%s"}}'), Alive("executed", P)),
]


@pytest.mark.parametrize(("text", "meaning"), MEANINGS)
def test_each_message_has_one_meaning(text: str, meaning: object) -> None:
    assert decode_message(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '"status"',
        "{}",
        '{"type":1,"data":{}}',
        '{"data":{}}',
        '{"type":"status","data":{}}',
        '{"type":"status"}',
        status("3"),
        status(-1),
        status(2**60),
        status(1, sid=7),
        said("executing", node="4"),  # what a reconnect sends: it names no prompt
        said("executing", prompt_id=P),
        said("executing", prompt_id=None, node=None),
        said("executing", prompt_id=7, node=None),
        said("executing", prompt_id="", node=None),
        said("executing", prompt_id="x" * 129, node=None),
        said("executing", prompt_id=P, node=["4"]),
        said("executing", prompt_id=P, node=False),
        said("execution_success"),
        said("progress", value=1, max=2),
        '{"type":"executing","data":[null]}',
        '{"type":"executing","data":NaN}',
        raw('{"type":"executing","data":{"node":null,"prompt_id":"%s"}'),
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"type":"status","data":' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        '{"type":"executing","data":' + "[" * 100_000 + "NaN" + "]" * 100_000 + "}",
    ],
)
def test_what_is_malformed_is_invalid_and_says_why(text: str) -> None:
    message = decode_message(text)
    assert isinstance(message, Invalid)
    assert message.problem
    assert len(message.problem) <= 200
    assert label_of(message) == "invalid"


def test_only_a_null_node_with_a_prompt_id_is_the_end() -> None:
    ends = [text for text, meaning in MEANINGS if isinstance(meaning, Ended)]
    assert {json.loads(text)["type"] for text in ends} == {"executing"}
    assert all(isinstance(decode_message(text), Ended) for text in ends)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (status(1), "status"),
        (said("executing", prompt_id=P, node=None), "executing"),
        (
            said("execution_error", prompt_id=P, exception_type="ExecutionBlocked"),
            "execution_error",
        ),
        (said("logs"), "logs"),
        (said("surprise"), "other"),
        (said("invalid"), "other"),
        (said("binary"), "other"),
        ("", "invalid"),
    ],
)
def test_labels_come_from_a_closed_set(text: str, label: str) -> None:
    assert label_of(decode_message(text)) == label
    assert label in MESSAGE_TYPES


def test_a_hostile_type_is_shown_short_and_on_one_line() -> None:
    ignored = decode_message(json.dumps({"type": "\x1b[31m\n" + "x" * 10_000, "data": {}}))
    assert isinstance(ignored, Ignored)
    assert len(ignored.type) <= 64
    assert ignored.type.isprintable()


def test_everything_a_real_server_said_is_understood() -> None:
    steps = [step for path in TRANSCRIPTS for step in json.loads(path.read_text())["steps"]]
    messages = [s["message"] for s in steps if "message" in s and "type" in s["message"]]
    assert len(messages) > 100
    for raw in messages:
        message = decode_message(json.dumps(raw))
        if isinstance(message, Invalid):  # only the greeting after a reconnect names no prompt
            assert raw["type"] == "executing"
            assert "prompt_id" not in raw["data"]
        assert label_of(message) != "other"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NAMES = st.sampled_from(sorted(MESSAGE_TYPES)) | st.text()
FIELDS = st.sampled_from(["node", "prompt_id", "status", "exec_info", "queue_remaining", "sid"])
NEARLY = st.recursive(
    JSON | st.just(P),
    lambda inner: st.dictionaries(FIELDS, inner),
    max_leaves=10,
)


@given(st.text() | st.builds(json.dumps, JSON))
def test_no_text_raises(text: str) -> None:
    assert label_of(decode_message(text)) in MESSAGE_TYPES


@given(st.builds(lambda t, d: json.dumps({"type": t, "data": d}), NAMES, NEARLY))
def test_no_nearly_right_message_raises(text: str) -> None:
    message = decode_message(text)
    assert label_of(message) in MESSAGE_TYPES
    if isinstance(message, Ended):
        data = json.loads(text)["data"]
        assert data["node"] is None
        assert data["prompt_id"] == message.prompt_id
