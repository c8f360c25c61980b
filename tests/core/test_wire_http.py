"""HTTP answers: records, queues, refusals and versions, honest and hostile."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core.model import End, FileRef, NodeFailure, Record
from comfyd.core.wire import (
    Device,
    QueueItem,
    SubmitReply,
    decode_history,
    decode_listing,
    decode_queue,
    decode_rejection,
    decode_remaining,
    decode_stats,
    decode_submit,
    decode_upload,
    parse_version,
    version_verdict,
)
from comfyd.errors import ServerProtocol

P = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"


def steps(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((TRANSCRIPTS / f"{name}.json").read_text())["steps"]
    return loaded


def record_of(
    *messages: Any, outputs: Any = None, status: Any = ..., extra: Any = None
) -> Record | None:
    if status is ...:
        status = {"status_str": "error", "completed": False, "messages": list(messages)}
    record = {"prompt": [0, P, {}, extra or {}, []], "outputs": outputs or {}, "status": status}
    return decode_history(json.dumps({P: record}).encode(), P)


SUCCESS = ["execution_success", {"prompt_id": P}]
START = ["execution_start", {"prompt_id": P}]
ERROR = [
    "execution_error",
    {
        "node_id": "3",
        "node_type": "KSampler",
        "exception_type": "torch.OutOfMemoryError",
        "exception_message": "Allocation failed\n on \x1b[31mdevice",
        "current_inputs": {"secret": ["hunter2"]},
        "traceback": ["File /home/me/ComfyUI/execution.py"],
    },
]
BLOCKED = ["execution_error", {"exception_type": "ExecutionBlocked"}]


class TestHistory:
    def test_no_record_is_none(self) -> None:
        assert decode_history(b"{}", P) is None

    @pytest.mark.parametrize(
        ("messages", "end"),
        [
            ([START, SUCCESS], End.SUCCESS),
            ([START, ERROR], End.ERROR),
            ([START, ["execution_interrupted", {}]], End.INTERRUPTED),
            ([START, ERROR, SUCCESS], End.SUCCESS),  # the last one, whatever came before
            ([START, SUCCESS, BLOCKED], End.SUCCESS),
            ([START, SUCCESS, ["something_new", {}]], End.SUCCESS),
            ([START, SUCCESS, "noise", 7, []], End.SUCCESS),
        ],
    )
    def test_the_last_end_message_decides(self, messages: list[Any], end: End) -> None:
        record = record_of(*messages)
        assert record is not None
        assert record.end is end
        assert not record.warnings

    def test_a_failure_is_told_without_inputs_and_traceback(self) -> None:
        record = record_of(START, ERROR)
        assert record is not None
        assert record.failure == NodeFailure(
            node="3",
            node_type="KSampler",
            exception_type="torch.OutOfMemoryError",
            message="Allocation failed on [31mdevice",
        )
        assert "hunter2" not in repr(record)
        assert "/home/me" not in repr(record)

    @pytest.mark.parametrize(
        ("status", "outputs", "end"),
        [
            ({"status_str": "success"}, {}, End.SUCCESS),
            ({"status_str": "error", "messages": []}, {}, End.ERROR),
            ({"status_str": "error", "messages": [START]}, {"9": {"text": ["x"]}}, End.ERROR),
            (None, {"9": {"images": [{"filename": "a.png"}]}}, End.SUCCESS),
        ],
    )
    def test_without_messages_the_rest_is_believed_with_a_warning(
        self, status: Any, outputs: Any, end: End
    ) -> None:
        record = record_of(status=status, outputs=outputs)
        assert record is not None
        assert record.end is end
        assert len(record.warnings) == 1

    def test_files_are_dicts_with_a_filename_and_the_rest_is_ui(self) -> None:
        record = record_of(
            SUCCESS,
            outputs={
                "9": {
                    "images": [{"filename": "a.png", "subfolder": "s", "type": "temp"}],
                    "animated": [True],
                },
                "12.0.0.3": {
                    "gifs": [{"filename": "b.mp4", "subfolder": None, "fullpath": "/x"}],
                    "text": ["hi", 1, None, {"filename": ""}, {"filename": 3}],
                },
                "4": {"result": "model.glb"},
                "5": ["odd"],
            },
        )
        assert record is not None
        assert record.files == (
            FileRef(node="9", key="images", filename="a.png", subfolder="s", type="temp"),
            FileRef(node="12.0.0.3", key="gifs", filename="b.mp4"),
        )
        assert record.ui == {
            "9": {"animated": [True]},
            "12.0.0.3": {"text": ["hi", 1, None, {"filename": ""}, {"filename": 3}]},
            "4": {"result": ["model.glb"]},
            "5": {"": ["odd"]},
        }

    def test_nan_becomes_null_with_a_warning(self) -> None:
        record = record_of(SUCCESS, outputs={"1": {"n": [float("nan"), float("inf"), 1e5]}})
        assert record is not None
        assert record.ui == {"1": {"n": [None, None, 1e5]}}
        assert record.warnings == (
            "2 numbers in the server's record became null (NaN or infinite)",
        )

    def test_what_no_encoder_takes_is_repaired(self) -> None:
        ended = json.dumps({"messages": [SUCCESS]})
        outputs = '{"1":{"t":["\\ud800", ' + "9" * 400 + ", 1e999]}}"
        body = f'{{"{P}":{{"outputs":{outputs},"status":{ended}}}}}'
        record = decode_history(body.encode(), P)
        assert record is not None
        assert record.ui == {"1": {"t": ["?", None, None]}}

    def test_text_is_cut_at_its_bound(self) -> None:
        outputs = {"1": {"text": ["é" * 1_000_000, "later"]}, "2": {"text": ["lost"]}}
        record = record_of(SUCCESS, outputs=outputs)
        assert record is not None
        size = len(json.dumps(record.ui, ensure_ascii=False).encode())
        assert 2**20 - 1000 < size <= 2**20 + 100
        assert any("cut" in warning for warning in record.warnings)

    def test_files_and_depth_are_bounded(self) -> None:
        nested: Any = "x"
        for _ in range(200):
            nested = [nested]
        files = [{"filename": f"{n}.png"} for n in range(10_000)]
        record = record_of(SUCCESS, outputs={"1": {"images": files, "deep": [nested]}})
        assert record is not None
        assert len(record.files) == 10_000
        (warning,) = record.warnings
        assert "nested" in warning
        with pytest.raises(ServerProtocol, match="more than 10000 files"):
            record_of(SUCCESS, outputs={"1": {"images": [*files, {"filename": "z.png"}]}})

    def test_what_is_no_product_is_shown_and_not_fetched(self) -> None:
        given = {"filename": "a.png", "type": "input"}
        odd = [{"filename": f"{n}.safetensors", "type": "models"} for n in range(2)]
        record = record_of(SUCCESS, outputs={"1": {"images": [given]}, "2": {"saved": odd}})
        assert record is not None
        assert record.files == ()
        assert record.ui == {"1": {"images": [given]}, "2": {"saved": odd}}
        assert record.warnings == (
            "no server hands out '0.safetensors' of node 2 (type models) and 1 more:"
            " named under ui only, not fetched",
        )

    def test_a_name_that_no_file_can_have_is_still_a_file(self) -> None:
        item = {"filename": "x" * 10_000, "subfolder": "y" * 10_000}
        record = record_of(SUCCESS, outputs={"1": {"images": [item]}})
        assert record is not None
        (ref,) = record.files
        assert (len(ref.filename), len(ref.subfolder)) == (4096, 4096)

    @pytest.mark.parametrize(
        ("graph", "good", "unrun"),
        [
            ({"1": {"inputs": {}}, "9": {"inputs": {"images": ["1", 0]}}}, ["9"], ()),
            ({"1": {"inputs": {}}, "9": {"inputs": {"images": ["1", 0]}}}, [], ("9",)),
            ({"9": {"inputs": {}}, "8": {}, "7": {"inputs": 3}, "6": None}, ["9"],
             ("6", "7", "8")),
            ({"9": {"inputs": {"a": ["8", 0], "b": [8], "c": "7"}}, "8": {}, "7": {}}, [9],
             ("7",)),
            ({"a\nb": {}}, [], ("a b",)),
            ({str(n): {} for n in range(99)}, [], tuple(sorted(map(str, range(99))))[:50]),
            ("no graph", [], ()),
            ({"9": {}}, "9", ()),
        ],
    )  # fmt: skip
    def test_nodes_that_were_not_to_run(self, graph: Any, good: Any, unrun: Any) -> None:
        messages = {"status_str": "success", "completed": True, "messages": [SUCCESS]}
        record = {"prompt": [0, P, graph, {}, good], "outputs": {}, "status": messages}
        decoded = decode_history(json.dumps({P: record}).encode(), P)
        assert decoded is not None
        assert decoded.unrun == unrun

    @pytest.mark.parametrize(
        ("extra", "ours"),
        [
            ({"comfyd": {"job": "a.01", "attempt": 2}}, ("a.01", 2)),
            ({"comfyd": {"job": "a.01", "attempt": "2"}}, None),
            ({"comfyd": {"job": "a.01", "attempt": True}}, None),
            ({"comfyd": None}, None),
            ({}, None),
        ],
    )
    def test_our_tag_is_read(self, extra: Any, ours: Any) -> None:
        record = record_of(SUCCESS, extra=extra)
        assert record is not None
        assert record.ours == ours

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"null",
            b'{"other": {}}',
            b'{"%s": null}' % P.encode(),
            b'{"%s": {}}' % P.encode(),
            b'{"%s": {"status": null, "outputs": {}}}' % P.encode(),
            b"[" * 100_000,
            b"\xff\xfe",
            b"<html>",
        ],
    )
    def test_what_says_nothing_proves_nothing(self, body: bytes) -> None:
        with pytest.raises(ServerProtocol, match=r"\w+"):
            decode_history(body, P)

    @pytest.mark.parametrize(
        ("name", "end", "files"),
        [
            ("success", End.SUCCESS, 1),
            ("cached", End.SUCCESS, 1),
            ("mixed", End.SUCCESS, 3),
            ("failing", End.ERROR, 1),
            ("interrupt", End.INTERRUPTED, 0),
        ],
    )
    def test_records_of_a_real_server(self, name: str, end: End, files: int) -> None:
        answers = [s["json"] for s in steps(name) if "<prompt-1>" in (s.get("json") or {})]
        record = decode_history(json.dumps(answers[0]).encode(), "<prompt-1>")
        assert record is not None
        assert record.end is end
        assert len(record.files) == files
        assert (record.failure is not None) == (end is End.ERROR)


class TestQueue:
    def test_items_in_running_order(self) -> None:
        tag = {"comfyd": {"job": "j", "attempt": 1}, "client_id": "c"}
        body = {
            "queue_running": [[1, "r", {}, {}, [], {"api_key": "x"}, "more"]],
            "queue_pending": [
                [3, "c", {"big": [1]}, tag, ["9"]],
                ["odd", "z", {}, None, []],
                [2.5, "b"],
                [2.5, "a"],
                [-7, "front"],
            ],
        }
        queue = decode_queue(json.dumps(body).encode())
        assert queue.running == (QueueItem("r", 1.0),)  # type: ignore[arg-type]
        assert [item.prompt_id for item in queue.pending] == ["front", "a", "b", "c", "z"]
        assert queue.pending[3] == QueueItem("c", 3.0, ("j", 1), "c")  # type: ignore[arg-type]
        assert queue.pending[4].number is None

    def test_nan_in_a_graph_is_tolerated(self) -> None:
        body = b'{"queue_running":[[0,"r",{"1":{"inputs":{"cfg":NaN}}},{}]],"queue_pending":[]}'
        assert decode_queue(body).running == (QueueItem("r", 0.0),)  # type: ignore[arg-type]

    def test_a_real_servers_queue(self) -> None:
        body = next(
            s["json"] for s in steps("delete_pending") if "queue_running" in s.get("json", {})
        )
        queue = decode_queue(json.dumps(body).encode())
        assert [item.prompt_id for item in queue.running + queue.pending] == [
            "<prompt-1>",
            "<prompt-2>",
        ]
        assert queue.running[0].client_id == "<client-1>"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b'{"queue_running":[]}',
            b'{"queue_running":{},"queue_pending":[]}',
            b'{"queue_running":[[1]],"queue_pending":[]}',
            b'{"queue_running":[[1, 2]],"queue_pending":[]}',
            b'{"queue_running":[' + b"[" * 100_000,
        ],
    )
    def test_half_a_queue_is_no_queue(self, body: bytes) -> None:
        with pytest.raises(ServerProtocol):
            decode_queue(body)


class TestListing:
    def test_records_are_named_by_what_was_submitted(self) -> None:
        tag = {"comfyd": {"job": "j", "attempt": 2}, "client_id": "c"}
        body = {
            "b": {"prompt": [3, "b", {"big": [1]}, tag, ["9"]], "outputs": {}, "status": None},
            "a": {"prompt": None},
            "c": [],
        }
        assert decode_listing(json.dumps(body).encode()) == (
            QueueItem("b", 3.0, ("j", 2), "c"),  # type: ignore[arg-type]
            QueueItem("a"),  # type: ignore[arg-type]
            QueueItem("c"),  # type: ignore[arg-type]
        )

    def test_nan_in_one_record_hides_no_other(self) -> None:
        body = b'{"a":{"outputs":{"9":[NaN]},"prompt":[1,"a"]},"b":{"prompt":[2,"b"]}}'
        assert [item.number for item in decode_listing(body)] == [1.0, 2.0]

    @pytest.mark.parametrize("body", [b"", b"[]", b'{"a":' + b"[" * 100_000])
    def test_what_is_no_list_of_records_says_nothing(self, body: bytes) -> None:
        with pytest.raises(ServerProtocol):
            decode_listing(body)


class TestSmallAnswers:
    @pytest.mark.parametrize(
        ("body", "reply"),
        [
            ({"prompt_id": P, "number": 3, "node_errors": {}}, SubmitReply(P, 3.0)),  # type: ignore[arg-type]
            ({"prompt_id": P, "node_errors": []}, SubmitReply(P)),  # type: ignore[arg-type]
            ({"prompt_id": P, "number": "x", "new": 1}, SubmitReply(P)),  # type: ignore[arg-type]
        ],
    )
    def test_submitted(self, body: Any, reply: SubmitReply) -> None:
        assert decode_submit(json.dumps(body).encode()) == reply

    def test_dropped_outputs_are_told(self) -> None:
        answer = next(s["json"] for s in steps("partial") if "node_errors" in s.get("json", {}))
        assert decode_submit(json.dumps(answer).encode()).node_errors == {
            "2": {
                "class_type": "EmptyImage",
                "errors": [
                    {
                        "type": "value_smaller_than_min",
                        "message": "Value -1 smaller than min of 0",
                        "details": "color",
                        "input": "color",
                    }
                ],
            }
        }

    @pytest.mark.parametrize("body", [b"", b"{}", b'{"prompt_id":null}', b'{"prompt_id":""}', b"7"])
    def test_a_submission_without_an_id_is_none(self, body: bytes) -> None:
        with pytest.raises(ServerProtocol):
            decode_submit(body)

    def test_remaining(self) -> None:
        assert decode_remaining(b'{"exec_info":{"queue_remaining":4}}') == 4
        for body in (b"{}", b'{"exec_info":{"queue_remaining":-1}}', b'{"exec_info":[]}', b""):
            with pytest.raises(ServerProtocol):
                decode_remaining(body)

    def test_upload(self) -> None:
        assert decode_upload(b'{"name":"a (1).png","subfolder":"","type":"input"}') == "a (1).png"
        assert decode_upload(b'{"name":"a.png","subfolder":"s"}') == "s/a.png"
        for body in (b"{}", b'{"name":""}', b'{"name":1}'):
            with pytest.raises(ServerProtocol):
                decode_upload(body)


STATS = {
    "system": {"comfyui_version": "0.3.64"},
    "devices": [
        {"name": "cuda:0 RTX", "type": "cuda", "index": 0, "vram_total": 24, "vram_free": 20},
        {"name": None, "vram_total": -1},
        "odd",
    ],
}


def test_stats() -> None:
    stats = decode_stats(json.dumps(STATS).encode())
    assert (stats.version, stats.version_tuple) == ("0.3.64", (0, 3, 64))
    assert stats.devices == (Device("cuda:0 RTX", "cuda", 0, 24, 20), Device("", "", None, 0, 0))
    assert decode_stats(b'{"system":{}}').version_tuple is None
    with pytest.raises(ServerProtocol):
        decode_stats(b"{}")


@pytest.mark.parametrize(
    ("version", "parsed", "verdict"),
    [
        ("0.3.57", (0, 3, 57), "ok"),
        ("0.3.56", (0, 3, 56), "refused"),
        ("0.2.99", (0, 2, 99), "refused"),
        ("0.4", (0, 4, 0), "ok"),
        ("0.38.1", (0, 38, 1), "ok"),
        ("1.0.0", (1, 0, 0), "ok"),
        ("v0.3.64-12-gdeadbeef", (0, 3, 64), "ok"),
        ("0.3.57rc1", (0, 3, 57), "ok"),
        ("desktop-2025", None, "warned"),
        ("", None, "warned"),
    ],
)
def test_versions(version: str, parsed: Any, verdict: str) -> None:
    assert parse_version(version) == parsed
    said = version_verdict(version)
    assert bool(said.refusal) == (verdict == "refused")
    assert bool(said.warning) == (verdict == "warned")


REFUSALS = [
    (0, "node 1 (EmptyImage), input color: Value -1 smaller than min of 0"),
    (
        1,
        "node class 'NoSuchNodeAnywhere' (node 1) is not installed on the server: "
        "install the custom node that has it",
    ),
    (
        2,
        "node 9 (SaveImage), input filename_prefix: Required input is missing (and 1 more problem)",
    ),
    (3, "the graph has no output node (such as SaveImage), so there is nothing to run"),
    (
        4,
        "the server rejected the graph: Cannot execute because a node is missing the class_type "
        "property: Node ID '#1'",
    ),
    (6, "the server rejected the graph: No prompt provided"),
]


@pytest.mark.parametrize(("index", "sentence"), REFUSALS)
def test_a_real_servers_refusals_become_sentences(index: int, sentence: str) -> None:
    answers = [s for s in steps("refused") if s.get("recv") == "http"]
    message, detail = decode_rejection(400, json.dumps(answers[index]["json"]).encode())
    assert message == sentence
    assert detail["status"] == 400


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            400,
            {
                "error": {
                    "type": "missing_node_type",
                    "message": "Node 'Upscale' not found.",
                    "extra_info": {"node_id": "7", "class_type": "UltimateSDUpscale"},
                },
                "node_errors": {},
            },
            "node class 'UltimateSDUpscale' (node 7) is not installed on the server: "
            "install the custom node that has it",
        ),
        (
            400,
            {
                "error": {"type": "prompt_outputs_failed_validation", "message": "", "details": ""},
                "node_errors": {
                    "4": {
                        "class_type": "CheckpointLoaderSimple",
                        "errors": [
                            {
                                "type": "value_not_in_list",
                                "message": "Value not in list",
                                "details": "ckpt_name: 'x.safetensors' not in []",
                                "extra_info": {"input_name": "ckpt_name"},
                            }
                        ],
                    }
                },
            },
            "node 4 (CheckpointLoaderSimple), input ckpt_name: Value not in list: "
            "ckpt_name: 'x.safetensors' not in []",
        ),
        (
            400,
            {
                "error": {"type": "prompt_outputs_failed_validation", "details": ""},
                "node_errors": {},
            },
            "the server rejected the graph and names no node; "
            "a link that leads back to its own node (a cycle) is the usual reason",
        ),
        (
            400,
            {"error": "no prompt", "node_errors": []},
            "the server rejected the graph: no prompt",
        ),
        (400, {}, "the server refused the prompt with HTTP status 400: {}"),
        (
            400,
            {"error": {}},
            "the server rejected the graph with HTTP status 400 and gave no reason",
        ),
        (
            413,
            None,
            "the request is larger than the server accepts (see its --max-upload-size)",
        ),
    ],
)
def test_other_refusals(status: int, body: Any, sentence: str) -> None:
    message, _ = decode_rejection(status, b"" if body is None else json.dumps(body).encode())
    assert message == sentence


def test_a_refusals_detail_is_bounded() -> None:
    error = {"message": "m" * 1000, "details": "d" * 1000, "extra_info": {"input_name": "i"}}
    body = {
        "error": {"type": "t" * 100_000, "message": "m" * 100_000},
        "node_errors": {
            f"{n}" * 1000: {"class_type": "c" * 9999, "errors": [error] * 20} for n in range(99)
        },
    }
    message, detail = decode_rejection(400, json.dumps(body).encode())
    assert len(message) < 2500
    assert len(json.dumps(detail)) < 2**20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
KEYS = st.sampled_from(
    (
        f"{P} outputs status messages prompt 1 images filename error details node_errors errors "
        "extra_info message type queue_running queue_pending system devices exec_info "
        "queue_remaining prompt_id number comfyd"
    ).split()
)
LISTED = st.lists(JSON | st.just(["execution_success", {}]) | st.just([1, P, {}, {}]), max_size=4)
NEARLY = st.recursive(
    JSON | LISTED,
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=15,
)
BODIES = st.binary() | st.builds(lambda v: json.dumps(v).encode(), NEARLY)


@given(BODIES | st.builds(lambda v: json.dumps({P: v}).encode(), NEARLY))
def test_no_record_raises_anything_else(body: bytes) -> None:
    with suppress(ServerProtocol):
        record = decode_history(body, P)
        if record is not None:
            assert msgspec.json.encode(record)


@given(BODIES)
def test_no_answer_raises_anything_else(body: bytes) -> None:
    for decode in (
        decode_queue,
        decode_listing,
        decode_submit,
        decode_remaining,
        decode_stats,
        decode_upload,
    ):
        with suppress(ServerProtocol):
            decode(body)
    message, _ = decode_rejection(400, body)
    assert message
    assert message.isprintable()
