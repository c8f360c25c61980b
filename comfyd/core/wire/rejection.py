"""Why a server refused a graph, or part of one, in a sentence a person can act on.

Three forms of the same answer exist: the structured one, the one before 2025 (``error`` a string,
``node_errors`` a list), and bodies that are no JSON at all (proxies, size limits).
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from comfyd.core.wire.tolerant import Malformed, decode, line

MAX_NODES = 50  # a person reads the first few; scripts get enough to see a pattern
MAX_ERRORS_PER_NODE = 10
MAX_DETAIL_CHARS = 500

_UNKNOWN_CLASS = re.compile(r"node (.{1,200}?) does not exist", re.IGNORECASE)
_NODE_ID = re.compile(r"Node ID '#(.{1,100}?)'")

_BY_STATUS: Final = {
    401: "the server asks for credentials: set the server's headers in the configuration",
    403: "the server, or a proxy before it, forbids the request: check the server's headers",
    413: "the request is larger than the server accepts (see its --max-upload-size)",
}

_any = msgspec.json.Decoder(Any)


def decode_rejection(status: int, body: bytes) -> tuple[str, dict[str, Any]]:
    """Decode the refusal of a POST /prompt. Never raises.

    Returns:
      One sentence naming node, class, input and problem as far as the server said them, and a
      bounded detail with ``status``, ``type`` and ``node_errors``.

    """
    try:
        said, _ = decode(body, _any)
    except Malformed:
        said = None
    answer: dict[str, Any] = said if isinstance(said, dict) else {}
    error = answer.get("error")
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        error = {}
    nodes = bounded_node_errors(answer.get("node_errors"))
    detail: dict[str, Any] = {"status": status}
    if kind := _text(error, "type"):
        detail["type"] = kind
    if nodes:
        detail["node_errors"] = nodes
    if not answer:
        return _unstructured(status, body), detail
    return _global(error, kind) or problems(nodes) or _vague(status, error, kind), detail


def _unstructured(status: int, body: bytes) -> str:
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    text = line(body[: MAX_DETAIL_CHARS * 4].decode("utf-8", "replace"), 200)
    return f"the server refused the prompt with HTTP status {status}" + (
        f": {text}" if text else ""
    )


def _global(error: dict[str, Any], kind: str) -> str:
    """The sentence for errors about the whole graph, or "" if the nodes' own say more."""
    message, details = _text(error, "message"), _text(error, "details")
    extra = error.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    unknown = _UNKNOWN_CLASS.search(message)
    if kind == "missing_node_type" or unknown:
        class_type = _text(extra, "class_type") or (unknown[1] if unknown else "")
        named = _NODE_ID.search(details)
        node = _text(extra, "node_id") or (named[1] if named else "")
        where = f" (node {node})" if node else ""
        what = f"node class {class_type!r}" if class_type else "one of the graph's node classes"
        return f"{what}{where} is not installed on the server: install the custom node that has it"
    if kind == "prompt_no_outputs":
        return "the graph has no output node (such as SaveImage), so there is nothing to run"
    return ""


def _vague(status: int, error: dict[str, Any], kind: str) -> str:
    message, details = _text(error, "message"), _text(error, "details")
    if kind == "prompt_outputs_failed_validation" and not details:
        return (
            "the server rejected the graph and names no node; "
            "a link that leads back to its own node (a cycle) is the usual reason"
        )
    parts = dict.fromkeys((message.rstrip("."), details.rstrip(".")))  # they often agree
    said = ": ".join(part for part in parts if part)
    return (
        f"the server rejected the graph: {said}"
        if said
        else (f"the server rejected the graph with HTTP status {status} and gave no reason")
    )


def problems(node_errors: dict[str, Any]) -> str:
    """The first problem in bounded node errors as a sentence, and how many more; "" if none."""
    found: list[str] = []
    for node, entry in node_errors.items():
        where = f"node {node}" + (f" ({entry['class_type']})" if entry["class_type"] else "")
        for error in entry["errors"]:
            said = error["message"] or error["type"] or "refused without a reason"
            if error["details"] and error["details"] != error["input"]:
                said = f"{said.rstrip('.')}: {error['details']}"
            found.append(f"{where}{', input ' + error['input'] if error['input'] else ''}: {said}")
    if not found:
        return ""
    more = len(found) - 1
    return found[0] + (f" (and {more} more problem{'s' * (more > 1)})" if more else "")


def bounded_node_errors(value: object) -> dict[str, Any]:
    """``node_errors`` with known keys and bounded text only; {} for the old empty list."""
    if not isinstance(value, dict):
        return {}
    bounded: dict[str, Any] = {}
    for node, entry in list(value.items())[:MAX_NODES]:
        entry = entry if isinstance(entry, dict) else {}
        errors = entry.get("errors")
        bounded[line(node, 100)] = {
            "class_type": _text(entry, "class_type", 200),
            "errors": [
                _node_error(error)
                for error in (errors if isinstance(errors, list) else [])[:MAX_ERRORS_PER_NODE]
                if isinstance(error, dict)
            ],
        }
    return bounded


def _node_error(error: dict[str, Any]) -> dict[str, str]:
    extra = error.get("extra_info")
    return {
        "type": _text(error, "type", 100),
        "message": _text(error, "message"),
        "details": _text(error, "details"),
        "input": _text(extra, "input_name", 200) if isinstance(extra, dict) else "",
    }


def _text(source: dict[str, Any], key: str, limit: int = MAX_DETAIL_CHARS) -> str:
    value = source.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return line(value, limit) if isinstance(value, str) else ""
