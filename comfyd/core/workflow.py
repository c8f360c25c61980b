"""The graph a job runs: read strictly, checked, filled in, and turned into a POST /prompt body.

Everything here is total on hostile input: whatever bytes come in, the answer is a value or a
``JobFileError`` with one sentence for whoever dropped the file.
"""

from __future__ import annotations

import difflib
import enum
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from comfyd.core.model import JobId, PromptId
from comfyd.errors import JobFileError

Node = dict[str, Any]
Graph = dict[str, Node]

MAX_DEPTH: Final = 200  # ComfyUI's own json module gives up at about 1000
MAX_INT_DIGITS: Final = 300  # more than any node takes; Python itself refuses more than 4300

# Draws stay below this. ComfyUI's front end stops here too (widgets cap a random seed at 2**50):
# a node whose seed works there takes ours, and no JSON reader rounds the recorded number.
SEED_LIMIT: Final = 2**50

EXPORT_HINT: Final = (
    "This is a workflow saved for the ComfyUI editor; open it there, export it with the menu "
    "File → Export Workflow (API), and drop that file instead."
)

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Kind(enum.Enum):
    """What a parsed job file is."""

    WORKFLOW = "workflow"  # the graph itself, API format
    REQUEST = "request"  # what is POSTed to /prompt: {"prompt": {...}}
    DOCUMENT = "document"  # comfyd's own job document: {"workflow": ...}


def quoted(text: str, limit: int = 60) -> str:
    """*text* in quotes for a sentence: one line, printable, *limit* characters at most."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return '"' + "".join(c if c.isprintable() else "�" for c in short) + '"'


def near(word: str, known: list[str]) -> str:
    """A sentence that offers what *word* may have meant, or names a few that exist."""
    close = difflib.get_close_matches(word[:200], known[:1000], n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(quoted(name) for name in close)}?"
    if not known:
        return "There is none."
    more = "" if len(known) <= 8 else f" and {len(known) - 8} more"
    return f"There is {', '.join(quoted(name) for name in known[:8])}{more}."


# --- reading -------------------------------------------------------------------------------------


def text_of(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
      JobFileError: Empty, UTF-16 or UTF-32, or not UTF-8.

    """
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"} or b"\0" in data[:4]:
        raise JobFileError("The file is UTF-16 or UTF-32 text (or binary); save it as UTF-8.")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobFileError(f"Line {line} is not UTF-8 text; save the file as UTF-8.") from None
    if not text or text.isspace():
        raise JobFileError("The file is empty.")
    return text


def parse_json(data: bytes) -> Any:
    """Parse strict JSON: what any other reader would agree on.

    Raises:
      JobFileError: Not UTF-8, not JSON, NaN or Infinity, nested deeper than MAX_DEPTH, an integer
        of more than MAX_INT_DIGITS digits, half a surrogate pair, or a key given twice.

    """
    text = text_of(data)
    if _too_deep(data):
        raise JobFileError(f"The file is nested deeper than {MAX_DEPTH} levels.")
    try:
        value = json.loads(
            text,
            parse_int=parse_int,
            parse_float=parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise JobFileError(f"The file is not valid JSON: {error.msg} at {where}.") from None
    if _SURROGATE.search(text):
        check_encodable(value)
    return value


def parse_int(digits: str, *, base: int = 10) -> int:
    """An integer of MAX_INT_DIGITS at most; *base* as for ``int``."""
    if len(digits) > MAX_INT_DIGITS:
        raise JobFileError(f"The file holds an integer of more than {MAX_INT_DIGITS} digits.")
    return int(digits, base)


def parse_float(digits: str) -> float:
    """A JSON number that is finite once read."""
    value = float(digits)
    if not math.isfinite(value):
        raise JobFileError(f"The number {quoted(digits, 30)} is too large to be read exactly.")
    return value


def check_encodable(value: Any) -> None:
    """Refuse halves of surrogate pairs anywhere in *value*: nothing could send them on."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JobFileError(
            "The file holds half of a surrogate pair (such as \\ud800), which is no character."
        ) from None


def _too_deep(data: bytes) -> bool:
    """Whether the brackets outside strings nest too deeply for a recursive parser."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, _NOT_BRACKETS):
        if bracket == 0x5B or bracket == 0x7B:  # [ {
            depth += 1
            if depth > MAX_DEPTH:
                return True
        else:
            depth -= 1
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise JobFileError(f"The file holds {name}, which is not a JSON number.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JobFileError(f"The key {quoted(key)} is given twice in one object.")
            seen.add(key)
    return value


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
    done: dict[tuple[str, str], str] = {}
    for key, value in assignments.items():
        node_id, name = _target(graph, key)
        if (node_id, name) in done:
            raise JobFileError(
                f"set: {quoted(done[node_id, name])} and {quoted(key)} name the same input."
            )
        done[node_id, name] = key
        if value == "random":
            if isinstance(graph[node_id]["inputs"][name], str):
                raise JobFileError(
                    f"set: {quoted(key)} holds text, and random draws a number; to have the word "
                    f'"random" there, write it into the workflow.'
                )
            place = f"{node_id}.{name}"
            seeds[place] = value = drawn[place] if drawn and place in drawn else draw() % SEED_LIMIT
        node = filled[node_id]
        filled[node_id] = {**node, "inputs": {**node["inputs"], name: value}}
    return filled, seeds


def _target(graph: Graph, key: str) -> tuple[str, str]:
    """The node id and input that *key* names; the input must be in the graph, so typos show."""
    where, dot, name = key.rpartition(".")
    if not dot or not where or not name:
        raise JobFileError(f"set: {quoted(key)} must read NODE.INPUT, such as 6.text.")
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
                f"set: {quoted(key)}: {len(matches)} nodes have that title; use a node id ({ids})."
            )
        if not matches:
            offer = near(where, [*graph, *titles])
            raise JobFileError(f"set: {quoted(key)}: no node has that id or title. {offer}")
        node_id = matches[0]
    inputs = graph[node_id]["inputs"]
    if name not in inputs:
        raise JobFileError(
            f"set: {quoted(key)}: node {quoted(node_id)} ({quoted(graph[node_id]['class_type'])}) "
            f"has no such input. {near(name, list(inputs))}"
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
