"""In which order the nodes of a graph run, after comfy_execution/graph.py of ComfyUI 0.3.64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from comfyd.simulator.catalogue import NODE_CLASSES
from comfyd.simulator.validation import Graph


def is_link(value: object) -> bool:
    """Whether an input leads to another node's output."""
    return isinstance(value, list) and len(value) == 2


def _upstream(graph: Graph, node_id: str) -> Iterator[str]:
    for value in graph[node_id]["inputs"].values():
        if is_link(value):
            yield value[0]


class Order:
    """Which node runs next: of those that are ready, outputs first, then what feeds an output."""

    def __init__(self, graph: Graph, outputs: list[str], is_cached: Callable[[str], bool]) -> None:
        self._graph = graph
        self._waits_for: dict[str, set[str]] = {}
        todo = list(reversed(outputs))
        while todo:
            node_id = todo.pop()
            if node_id in self._waits_for:
                continue
            sources = {s for s in _upstream(graph, node_id) if not is_cached(s)}
            self._waits_for[node_id] = sources
            todo += sorted(sources)

    def pick(self) -> str | None:
        """The next node, or None if all are done."""
        ready = [node_id for node_id, sources in self._waits_for.items() if not sources]
        for node_id in ready:
            if self._is_output(node_id):
                return node_id
        feeding = {
            s for n, sources in self._waits_for.items() if self._is_output(n) for s in sources
        }
        for node_id in ready:
            if node_id in feeding:
                return node_id
        return ready[0] if ready else None

    def done(self, node_id: str) -> None:
        del self._waits_for[node_id]
        for sources in self._waits_for.values():
            sources.discard(node_id)

    def _is_output(self, node_id: str) -> bool:
        return NODE_CLASSES[self._graph[node_id]["class_type"]].is_output
