"""The graph a job runs: recognised, checked, filled in, and turned into a POST /prompt body.

Everything here is total on hostile input: whatever bytes come in, the answer is a value or a
``JobFileError`` with one sentence for whoever dropped the file.
"""

from __future__ import annotations

import difflib
import enum
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from comfyd.core.model import JobId, PromptId
from comfyd.core.strictjson import parse_json as parse_json  # whoever has a graph has read one
from comfyd.core.strictjson import quoted as quoted
from comfyd.errors import JobFileError

Node = dict[str, Any]
Graph = dict[str, Node]
Input = tuple[str, str]  # a node id, and the name of one of its inputs

# Draws stay below this. ComfyUI's front end stops here too (widgets cap a random seed at 2**50):
# a node whose seed works there takes ours, and no JSON reader rounds the recorded number.
SEED_LIMIT: Final = 2**50

EXPORT_HINT: Final = (
    "This is a workflow saved for the ComfyUI editor; open it there, export it with the menu "
    "File → Export Workflow (API), and drop that file instead."
)


class Kind(enum.Enum):
    """What a parsed job file is."""

    WORKFLOW = "workflow"  # the graph itself, API format
    REQUEST = "request"  # what is POSTed to /prompt: {"prompt": {...}}
    DOCUMENT = "document"  # comfyd's own job document: {"workflow": ...}


def near(word: str, known: list[str]) -> str:
    """A sentence that offers what *word* may have meant, or names a few that exist."""
    close = difflib.get_close_matches(word[:200], known[:1000], n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(quoted(name) for name in close)}?"
    if not known:
        return "There is none."
    more = "" if len(known) <= 8 else f" and {len(known) - 8} more"
    return f"There is {', '.join(quoted(name) for name in known[:8])}{more}."


# --- recognising ---------------------------------------------------------------------------------


def recognise(document: Any) -> Kind:
    """Tell what a parsed job file is, by its keys alone.

    Raises:
      JobFileError: It is nothing that can become a job; an editor workflow gets EXPORT_HINT.

    """
    if not isinstance(document, dict):
        raise JobFileError(
            "A job file holds one object: a workflow in API format, a /prompt request body or a "
            "job document."
        )
    _refuse_editor_format(document)
    if "prompt" in document and not _looks_like_node(document["prompt"]):
        return Kind.REQUEST
    if "workflow" in document and not _looks_like_node(document["workflow"]):
        return Kind.DOCUMENT
    if not document or any(_looks_like_node(value) for value in document.values()):
        return Kind.WORKFLOW
    raise JobFileError(
        "This is no ComfyUI workflow: in API format every node has a class_type and inputs; a job "
        'document needs the key "workflow".'
    )


def check_graph(value: Any) -> Graph:
    """Return *value* as a graph if it has the shape of one; what nodes exist, only a server knows.

    Raises:
      JobFileError: Names the first node that is no node.

    """
    if not isinstance(value, dict):
        raise JobFileError("The workflow must be an object of nodes by node id.")
    _refuse_editor_format(value)
    if not value:
        raise JobFileError("The workflow is empty: there is no node to run.")
    for node_id, node in value.items():
        if not isinstance(node_id, str):
            raise JobFileError(f"The node id {node_id!r:.60} must be text.")
        if not isinstance(node, dict):
            raise JobFileError(f"Node {quoted(node_id)} must be an object, as in API format.")
        if not isinstance(node.get("class_type"), str) or not node["class_type"]:
            raise JobFileError(f"Node {quoted(node_id)} has no class_type.")
        if not isinstance(node.get("inputs"), dict):
            raise JobFileError(f"Node {quoted(node_id)} has no inputs object.")
    return value


def _looks_like_node(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_type"), str)


def _refuse_editor_format(document: dict[str, Any]) -> None:
    if isinstance(document.get("nodes"), list) and "links" in document:
        raise JobFileError(EXPORT_HINT)


# --- filling in ----------------------------------------------------------------------------------


def apply_set(
    graph: Graph,
    assignments: Mapping[str, Any],
    *,
    drawn: Mapping[str, int] | None = None,
    draw: Callable[[], int],
) -> tuple[Graph, dict[str, int]]:
    """Give inputs of *graph* the values of *assignments*; *graph* itself is left alone.

    Args:
      assignments: Values by ``NODE.INPUT``, split at the last dot; NODE is a node id or the
        ``_meta.title`` of exactly one node. The value ``random`` draws a seed.
      drawn: Seeds drawn before, by ``<node id>.<input>``: used instead of drawing again.
      draw: A random integer of 50 bits or more; taken modulo SEED_LIMIT.

    Returns:
      The new graph, and every seed it was given, by ``<node id>.<input>``.

    Raises:
      JobFileError: A key names no input, or one that another key names too.

    """
    filled = dict(graph)
    seeds: dict[str, int] = {}
    for (node_id, name), key in targets(graph, assignments, "set").items():
        value = assignments[key]
        if value == "random":
            if isinstance(graph[node_id]["inputs"][name], str):
                raise JobFileError(
                    f"set: {quoted(key)} holds text, and random draws a number; to have the word "
                    f'"random" there, write it into the workflow.'
                )
            place = f"{node_id}.{name}"
            seeds[place] = value = drawn[place] if drawn and place in drawn else draw() % SEED_LIMIT
        _put(filled, (node_id, name), value)
    return filled, seeds


def fill(graph: Graph, values: Mapping[Input, Any]) -> Graph:
    """A new graph whose inputs have *values*; every one of them is an input of *graph*."""
    filled = dict(graph)
    for target, value in values.items():
        _put(filled, target, value)
    return filled


def _put(filled: Graph, target: Input, value: Any) -> None:
    """Give one input a value; the node is replaced, for others may hold the old one."""
    node_id, name = target
    node = filled[node_id]
    filled[node_id] = {**node, "inputs": {**node["inputs"], name: value}}


def targets(graph: Graph, keys: Iterable[str], option: str) -> dict[Input, str]:
    """Which input each of *keys* names, as in `apply_set`.

    Args:
      option: What the keys stand under in the job document, for the sentence.

    Raises:
      JobFileError: A key names no input, or one that another key names too.

    """
    found: dict[Input, str] = {}
    for key in keys:
        target = _target(graph, key, option)
        if target in found:
            raise JobFileError(
                f"{option}: {quoted(found[target])} and {quoted(key)} name the same input."
            )
        found[target] = key
    return found


def _target(graph: Graph, key: str, option: str) -> Input:
    """The node id and input that *key* names; the input must be in the graph, so typos show."""
    where, dot, name = key.rpartition(".")
    if not dot or not where or not name:
        raise JobFileError(f"{option}: {quoted(key)} must read NODE.INPUT, such as 6.text.")
    if where in graph:
        node_id = where
    else:
        titles: dict[str, list[str]] = {}
        for candidate, node in graph.items():
            meta = node.get("_meta")
            if isinstance(meta, dict) and isinstance(meta.get("title"), str):
                titles.setdefault(meta["title"], []).append(candidate)
        matches = titles.get(where, [])
        if len(matches) > 1:
            ids = ", ".join(quoted(match) for match in matches[:8])
            raise JobFileError(
                f"{option}: {quoted(key)}: {len(matches)} nodes have that title; use a node id"
                f" ({ids})."
            )
        if not matches:
            offer = near(where, [*graph, *titles])
            raise JobFileError(f"{option}: {quoted(key)}: no node has that id or title. {offer}")
        node_id = matches[0]
    inputs = graph[node_id]["inputs"]
    if name not in inputs:
        raise JobFileError(
            f"{option}: {quoted(key)}: node {quoted(node_id)}"
            f" ({quoted(graph[node_id]['class_type'])}) has no such input."
            f" {near(name, list(inputs))}"
        )
    return node_id, name


def make_unique(graph: Graph, job: JobId, attempt: int) -> Graph:
    """Put every literal ``filename_prefix`` under ``comfyd/<job>-<attempt>/``; a new graph.

    ComfyUI numbers files by what lies in the folder, so a name freed by a clean-up is given again
    (folder_paths.get_save_image_path), and an identical graph answers from its cache with the old
    names and writes nothing. A prefix of its own for each attempt rules out both.
    """
    return {
        node_id: {**node, "inputs": {**node["inputs"], "filename_prefix": own}}
        if (own := _own_prefix(node["inputs"].get("filename_prefix"), job, attempt))
        else node
        for node_id, node in graph.items()
    }


def _own_prefix(prefix: Any, job: JobId, attempt: int) -> str | None:
    if not isinstance(prefix, str):
        return None
    # The server normalises the path: a ".." left in would lead out of our folder again.
    parts = [part for part in re.split(r"[/\\]", prefix) if part.strip() not in {"", ".", ".."}]
    return "/".join(["comfyd", f"{job}-{attempt}", *(parts or ["ComfyUI"])])


def body(
    graph: Graph,
    extra_data: Mapping[str, Any],
    prompt_id: PromptId,
    client_id: str,
    job: JobId,
    attempt: int,
) -> bytes:
    """The POST /prompt body of one attempt.

    Never ``number``: two queued prompts with the same (number, prompt_id) make ComfyUI's heap
    compare two dicts and kill its worker (execution.PromptQueue).
    """
    return json.dumps(
        {
            "prompt": graph,
            "prompt_id": prompt_id,
            "client_id": client_id,
            "extra_data": {**extra_data, "comfyd": {"job": job, "attempt": attempt}},
        },
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    ).encode()
