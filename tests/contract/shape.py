"""What two runs of one scenario have in common: the kinds of steps and the keys of the JSON."""

from __future__ import annotations

import re
from typing import Any

from tests.contract.wire import Step

# How many of these come depends on how fast nodes run.
BUSY = frozenset({"executing", "progress_state", "progress", "binary 1"})


def kind(step: Step) -> str:
    """One word or two for what a step is."""
    if "send" in step:
        if step["send"] == "http":
            return f"{step['method']} {step['path']}"
        return "open" if "open" in step else "close" if "close" in step else "send"
    if step["recv"] == "http":
        return f"{step['status']} {step['content_type']}"
    if "binary" in step:
        return f"binary {step['binary']}"
    message = step["message"]
    if message["type"] == "executing" and message["data"]["node"] is None:
        return "end"
    return str(message["type"])


def channels(steps: list[Step]) -> dict[str, list[Step]]:
    """The steps of HTTP and of each socket; only within one is the order the server's."""
    found: dict[str, list[Step]] = {}
    for step in steps:
        found.setdefault(step.get("send") or step["recv"], []).append(step)
    return found


def sequences(steps: list[Step]) -> dict[str, list[str]]:
    """The kinds of steps in each channel, in order."""
    return {name: [kind(step) for step in found] for name, found in channels(steps).items()}


def loose_sequences(steps: list[Step]) -> dict[str, list[str]]:
    """As `sequences`, without what depends on the pace: BUSY kinds, and where `status` falls."""
    return {
        name: [word for word in words if word not in BUSY and word != "status"]
        for name, words in sequences(steps).items()
    }


def remaining(steps: list[Step]) -> dict[str, list[int]]:
    """The numbers in each socket's `status` messages."""
    return {
        name: [
            step["message"]["data"]["status"]["exec_info"]["queue_remaining"]
            for step in found
            if kind(step) == "status"
        ]
        for name, found in channels(steps).items()
    }


def structures(steps: list[Step]) -> dict[str, set[str]]:
    """For each kind of received step, the forms its JSON took."""
    found: dict[str, set[str]] = {}
    for step in steps:
        if "recv" in step:
            body = step.get("message", step.get("json"))
            found.setdefault(kind(step), set()).add(_form(body))
    return found


def _form(value: Any) -> str:
    if isinstance(value, dict):
        pairs = {f"{_key(key)}: {_form(inner)}" for key, inner in value.items()}
        return "{" + ", ".join(sorted(pairs)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(sorted({_form(inner) for inner in value})) + "]"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__
    return "number"


def _key(key: str) -> str:
    return "*" if re.fullmatch(r"\d+|<prompt-\d+>", key) else key
