"""What POST /prompt accepts, and how it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract import graphs
from tests.contract.graphs import Graph
from tests.contract.wire import Session

EMPTY = {"width": 16, "height": 16, "batch_size": 1, "color": 1}


def saved(source: object, **empty: object) -> Graph:
    """EmptyImage and a SaveImage that is linked to *source*."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**EMPTY, **empty}},
        "9": {"class_type": "SaveImage", "inputs": {"images": source, "filename_prefix": "x"}},
    }


def through(class_type: str, *, save: str = "2", **inputs: object) -> Graph:
    """A SaveImage fed by one node of *class_type*."""
    graph = saved([save, 0])
    graph["2"] = {"class_type": class_type, "inputs": inputs}
    return graph


SCALE: dict[str, Any] = {"upscale_method": "bilinear", "width": 8, "height": 8, "crop": "disabled"}
NODE_ERRORS: list[tuple[Graph, str, str]] = [
    (saved(["1", 0], color=-1), "1", "value_smaller_than_min"),
    (saved(["1", 0], width=99999), "1", "value_bigger_than_max"),
    (saved(["1", 0], width="wide"), "1", "invalid_input_type"),
    (saved(["1", 0, 0]), "9", "bad_linked_input"),
    (saved(["1", 7]), "9", "exception_during_validation"),
    (saved(["77", 0]), "9", "exception_during_validation"),
    (through("ImageInvert", image=["77", 0]), "2", "exception_during_inner_validation"),
    (through("ImageInvert"), "2", "required_input_missing"),
    (through("LoadImage", image="no-such-file.png"), "2", "custom_validation_failed"),
    (through("ImageScale", image=["1", 0], **{**SCALE, "crop": "x"}), "2", "value_not_in_list"),
    (
        {
            **through("LoadImage", save="3", image="no-such-file.png"),
            "3": {"class_type": "ImageInvert", "inputs": {"image": ["2", 1]}},
        },
        "3",
        "return_type_mismatch",
    ),
]


async def post(session: Session, graph: object, **more: object) -> tuple[int, dict[str, Any]]:
    body = {"prompt": graph, "prompt_id": session.new_prompt_id(), **more}
    response = await session.http("POST", "/prompt", json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize(("graph", "node_id", "kind"), NODE_ERRORS, ids=[e[2] for e in NODE_ERRORS])
async def test_an_invalid_node_is_named(
    session: Session, graph: Graph, node_id: str, kind: str
) -> None:
    status, body = await post(session, graph)

    assert status == 400
    assert set(body) == {"error", "node_errors"}
    assert set(body["error"]) == {"type", "message", "details", "extra_info"}
    assert body["error"]["type"] == "prompt_outputs_failed_validation"
    assert list(body["node_errors"]) == [node_id]
    found = body["node_errors"][node_id]
    assert set(found) == {"errors", "dependent_outputs", "class_type"}
    assert found["dependent_outputs"] == ["9"]
    assert found["class_type"] == graph[node_id]["class_type"]
    assert [error["type"] for error in found["errors"]] == [kind]
    assert set(found["errors"][0]) == {"type", "message", "details", "extra_info"}


async def test_a_cycle_is_refused_without_a_reason(session: Session) -> None:
    graph = through("ImageInvert", image=["3", 0])
    graph["3"] = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    status, body = await post(session, graph)

    assert status == 400
    assert body["error"]["type"] == "prompt_outputs_failed_validation"
    assert body["error"]["details"] == ""
    assert body["node_errors"] == {}


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        (graphs.unknown_class(), "invalid_prompt"),
        ({"1": {"inputs": {}}}, "invalid_prompt"),
        ({"nodes": [], "links": []}, "invalid_prompt"),
        (graphs.no_outputs(), "prompt_no_outputs"),
        ({}, "prompt_no_outputs"),
    ],
)
async def test_a_graph_that_makes_no_sense_is_a_400(
    session: Session, graph: Graph, kind: str
) -> None:
    status, body = await post(session, graph)
    assert status == 400
    assert body["error"]["type"] == kind
    assert body["node_errors"] == {}


async def test_a_body_without_a_prompt_is_a_400(session: Session) -> None:
    response = await session.http("POST", "/prompt", json={})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "no_prompt"


async def test_targets_that_are_no_outputs_are_a_400(session: Session) -> None:
    status, body = await post(session, saved(["1", 0]), partial_execution_targets=["1"])
    assert (status, body["error"]["type"]) == (400, "prompt_no_outputs")


async def test_a_refused_prompt_leaves_no_record(session: Session) -> None:
    prompt_id = session.new_prompt_id()
    body = {"prompt": graphs.out_of_range(session.prefix), "prompt_id": prompt_id}
    await session.http("POST", "/prompt", json=body)

    assert await session.record_of(prompt_id) is None
    queue = (await session.http("GET", "/queue")).json()
    assert queue == {"queue_running": [], "queue_pending": []}


async def test_the_chosen_prompt_id_is_kept(session: Session) -> None:
    prompt_id = session.new_prompt_id()
    body = {"prompt": graphs.success(session.prefix, session.colour), "prompt_id": prompt_id}
    answer = (await session.http("POST", "/prompt", json=body)).json()
    await session.wait_recorded(prompt_id)

    assert answer["prompt_id"] == prompt_id
    assert answer["node_errors"] == {}
    assert set(answer) == {"prompt_id", "number", "node_errors"}


async def test_a_prompt_without_an_id_is_given_one(session: Session) -> None:
    graph = graphs.success(session.prefix, session.colour)
    answer = (await session.http("POST", "/prompt", json={"prompt": graph})).json()
    await session.wait_recorded(answer["prompt_id"])
    assert len(answer["prompt_id"]) == 36


async def test_numbers_count_refused_prompts_too(session: Session) -> None:
    graph = graphs.success(session.prefix, session.colour)
    _, first = await post(session, graph)
    await post(session, graphs.out_of_range(session.prefix))
    _, third = await post(session, graph)
    await session.wait_recorded(third["prompt_id"])

    assert third["number"] == first["number"] + 2


async def test_a_partial_acceptance_runs_the_valid_outputs_only(session: Session) -> None:
    status, body = await post(session, graphs.partial(session.prefix))
    record = await session.wait_recorded(body["prompt_id"])

    assert status == 200
    assert list(body["node_errors"]) == ["2"]
    assert body["node_errors"]["2"]["dependent_outputs"] == ["8"]
    assert record["prompt"][4] == ["9"]
    assert list(record["outputs"]) == ["9"]
    assert record["status"]["completed"] is True


async def test_inputs_that_a_class_does_not_have_are_ignored(session: Session) -> None:
    graph = saved(["1", 0], nonsense="x")
    graph["9"]["inputs"]["filename_prefix"] = session.prefix
    status, body = await post(session, graph)
    assert status == 200
    assert (await session.wait_recorded(body["prompt_id"]))["status"]["completed"] is True


async def test_literals_are_converted_in_the_stored_graph(session: Session) -> None:
    graph = saved(["1", 0], width="16", color={"__value__": session.colour})
    graph["9"]["inputs"]["filename_prefix"] = session.prefix
    _, body = await post(session, graph)
    record = await session.wait_recorded(body["prompt_id"])

    stored = record["prompt"][2]["1"]["inputs"]
    assert (stored["width"], stored["color"]) == (16, session.colour)


async def test_a_foreign_origin_is_refused(session: Session) -> None:
    headers = {"Origin": "http://example.invalid"}
    assert (await session.http("GET", "/queue", headers=headers)).status_code == 403
