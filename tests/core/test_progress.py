"""How far a prompt has come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.core import progress
from comfyd.core.progress import NODES_MAX, Progress, beginning, told

GRAPH = {
    "1": {"class_type": "Load", "inputs": {}},
    "3": {"class_type": "KSampler", "inputs": {}},
    "4": {"class_type": "VAEDecode", "inputs": {}},
    "9": {"class_type": "SaveImage", "inputs": {}},
}


def after(*messages, graph=GRAPH):
    now = beginning(graph)
    for kind, data in messages:
        now = told(now, kind, json.dumps(data).encode())
    return now


def state(**nodes):
    return "progress_state", {"nodes": {key[1:]: value for key, value in nodes.items()}}


RUNNING = {"state": "running", "value": 12.0, "max": 20.0}
FINISHED = {"state": "finished", "value": 1.0, "max": 1.0}


def test_what_servers_say_since_progress_state():
    now = after(
        ("execution_start", {}),
        ("execution_cached", {"nodes": ["1"]}),
        state(_1=FINISHED, _3=RUNNING),
        ("progress", {"node": "3", "value": 12, "max": 20}),
    )
    assert (now.node, now.name, now.step, now.steps) == ("3", "KSampler", 12, 20)
    assert now.behind == {"1"}
    assert now.share == pytest.approx((1 + 12 / 20) / 4)


def test_a_node_that_does_not_count_has_no_steps():
    now = after(("executing", {"node": "4"}), state(_4={"state": "running", "value": 0, "max": 1}))
    assert (now.name, now.step, now.steps, now.share) == ("VAEDecode", 0, 0, 0.0)


def test_the_steps_of_a_node_are_not_lost_when_it_is_named_again():
    said = ("progress", {"node": "3", "value": 5, "max": 20})
    assert after(said, ("executing", {"node": "3"})).step == 5
    assert after(said, ("executing", {"node": "4"})).steps == 0


def test_it_ends_with_all_of_it():
    now = after(*(("executed", {"node": key}) for key in GRAPH))
    assert now.share == 1.0


def test_a_run_from_the_start_forgets_the_one_before():
    assert after(("executed", {"node": "1"}), ("execution_start", {})) == beginning(GRAPH)


def test_without_the_graph_there_are_steps_but_no_share():
    now = after(state(_1=FINISHED, _3=RUNNING), graph={})
    assert (now.name, now.step, now.share) == ("node 3", 12, None)
    assert now.behind == frozenset()


def test_only_nodes_of_our_graph_are_kept():
    now = after(("execution_cached", {"nodes": [str(n) for n in range(100_000)]}))
    assert now.behind == GRAPH.keys()
    many = {str(n): GRAPH["1"] for n in range(NODES_MAX + 1)}
    assert beginning(many).names == {}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("progress", b""),
        ("progress", b"[" * 100_000),
        ("progress", b'{"node": 3}'),
        ("progress", b'{"node": "3", "value": NaN, "max": 20}'),
        ("progress", b'{"node": "3", "value": "x"}'),
        ("progress", b'{"node": "\xff"}'),
        ("progress_state", b'{"nodes": {"3": {"state": "running", "value": null}}}'),
        ("progress_state", b'{"nodes": ["3"]}'),
        ("execution_cached", b'{"nodes": {"3": {}}}'),
        ("crystools", b'{"node": "3"}'),
        ("executing", b'{"node": null}'),
        ("progress", b'{"node": "3"}' + b" " * progress.MESSAGE_MAX),
    ],
)
def test_what_cannot_be_read_changes_nothing(kind, data):
    before = after(("progress", {"node": "1", "value": 5, "max": 20}))
    assert told(before, kind, data) == before


@given(
    st.sampled_from(["progress", "progress_state", "executing", "executed", "execution_cached"]),
    st.text(max_size=200),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
    st.sampled_from(["running", "finished", "x"]),
)
def test_whatever_comes_it_is_bounded_and_a_share(kind, node, value, most, state):
    said = {"node": node, "value": value, "max": most}
    nodes = {node: {"state": state, "value": value, "max": most}, "1": FINISHED}
    data = json.dumps({**said, "nodes": [node] if kind == "execution_cached" else nodes}).encode()
    now = told(beginning(GRAPH), kind, data)
    assert isinstance(now, Progress)
    assert 0 <= now.step <= now.steps < 1e9
    assert now.share is not None
    assert 0 <= now.share <= 1
    assert len(now.node) <= 64
    assert now.node.isprintable()


RECORDED = Path(__file__).parents[1] / "transcripts"


@pytest.mark.parametrize("scenario", ["success", "cached", "progress", "mixed"])
def test_what_a_server_was_recorded_to_say_leads_from_nothing_to_all(scenario):
    steps = json.loads((RECORDED / f"{scenario}.json").read_text())["steps"]
    shares: dict[str, list[float]] = {}
    known = {}
    for step in steps:
        if step.get("method") == "POST":
            body = step["json"]
            known[body["prompt_id"]] = beginning(body["prompt"])
        data = step.get("message", {}).get("data", {})
        if data.get("prompt_id") in known:
            prompt_id = data["prompt_id"]
            now = told(known[prompt_id], step["message"]["type"], json.dumps(data).encode())
            known[prompt_id] = now
            shares.setdefault(prompt_id, []).append(now.share or 0.0)
    assert shares
    for each in shares.values():
        assert each == sorted(each)
        assert (each[0], each[-1]) == (0.0, 1.0)
