"""How far a prompt has come, for people: nothing is ever decided by it.

Messages name nodes and their steps. What they say is merged into one small value; of the nodes that
are behind it only those of our own graph are kept, so no server can make it grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from comfyd.core.wire.tolerant import line

NODES_MAX: Final = 2000
"""Nodes of one graph that are told apart; a larger one has no share of its way, only steps."""
MESSAGE_MAX: Final = 2**20  # bytes; ``progress_state`` names every node so far, each time
_NAME_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Attributes:

    names: The class of each node of the graph; empty while that is not known (after a restart).
    node: The one at work; "" while that is not known.
    step, steps: Its own count, such as a sampler's; 0 of 0 if it does not count.
    behind: Nodes of the graph that are done.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    node: str = ""
    step: float = 0.0
    steps: float = 0.0
    behind: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What the node at work is called: its class, or its id where that is not known."""
        return self.names.get(self.node) or (f"node {self.node}" if self.node else "")

    @property
    def share(self) -> float | None:
        """The share of the graph's nodes that is done, 0 to 1; None while that is not known."""
        if not self.names:
            return None
        begun = self.step / self.steps if self.steps and self.node not in self.behind else 0.0
        return min(1.0, (len(self.behind) + begun) / len(self.names))


def beginning(graph: Mapping[str, Any]) -> Progress:
    """Of a prompt that is about to be sent with *graph*."""
    if len(graph) > NODES_MAX:
        return Progress()
    return Progress(
        names={
            node_id: line(node["class_type"], _NAME_MAX)
            for node_id, node in graph.items()
            if isinstance(node, Mapping) and isinstance(node.get("class_type"), str)
        }
    )


class _Node(msgspec.Struct):
    state: str = ""
    value: float = 0.0
    max: float = 0.0


class _Said(msgspec.Struct):
    node: str | None = None
    value: float = 0.0
    max: float = 0.0
    nodes: dict[str, _Node] | list[str] = msgspec.field(default_factory=list)


_said: Final = msgspec.json.Decoder(_Said)


def told(before: Progress, kind: str, data: bytes) -> Progress:
    """*before*, and what one message says. What cannot be read changes nothing.

    Args:
      kind, data: The message's type, and its data as JSON.

    """
    if len(data) > MESSAGE_MAX:
        return before
    try:
        said = _said.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return before
    match kind, said.nodes:
        case "execution_start", _:
            return Progress(names=before.names)
        case "execution_cached", list(cached):
            return _passed(before, *cached)
        case "progress_state", dict(nodes):
            after = _passed(before, *(name for name, each in nodes.items() if _is_over(each)))
            for name, each in reversed(nodes.items()):
                if each.state == "running":
                    return _at(after, name, each.value, each.max)
            return after
        case "executing", _ if said.node is not None:
            return before if said.node == before.node else _at(before, said.node, 0, 0)
        case "progress", _ if said.node is not None:
            return _at(before, said.node, said.value, said.max)
        case "executed", _ if said.node is not None:
            return _passed(before, said.node)
        case _:
            return before


def _is_over(node: _Node) -> bool:
    return node.state in {"finished", "error"}


def _passed(progress: Progress, *nodes: str) -> Progress:
    ours = progress.names.keys() & nodes
    return progress if ours <= progress.behind else replace(progress, behind=progress.behind | ours)


def _at(progress: Progress, node: str, step: float, steps: float) -> Progress:
    # Of one step is what every node says that does not count; NaN compares as False.
    counts = 1 < steps < 1e9
    return replace(
        progress,
        node=line(node, _NAME_MAX),
        step=max(0.0, min(float(step), steps)) if counts else 0.0,
        steps=float(steps) if counts else 0.0,
    )
