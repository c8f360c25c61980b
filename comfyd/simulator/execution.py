"""Running one prompt at a time: the order of nodes, the cache, the messages and the record.

After execution.py and comfy_execution/ of ComfyUI 0.3.64. What matters to a client is kept: which
messages are sent in which order and to whom, and what a record holds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

import trio

from comfyd.simulator.catalogue import NODE_CLASSES
from comfyd.simulator.faults import Faults
from comfyd.simulator.files import Files
from comfyd.simulator.hub import Hub
from comfyd.simulator.nodes import NodeError, Result
from comfyd.simulator.order import Order, is_link
from comfyd.simulator.promptqueue import Item, Record
from comfyd.simulator.promptrun import InterruptedRunError, PromptRun
from comfyd.simulator.validation import Graph

# Message and type by kind, as torch raises them on a card that is broken, or full.
_CARD_ERRORS: Final = {
    "cuda": (
        "CUDA error: an illegal memory access was encountered\n"
        "CUDA kernel errors might be asynchronously reported at some other API call, so the"
        " stacktrace below might be incorrect.\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n",
        "RuntimeError",
    ),
    "memory": (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"
        " of which 1.02 GiB is free.",
        "torch.OutOfMemoryError",
    ),
    "other": (
        "mat1 and mat2 shapes cannot be multiplied (154x2048 and 768x320)",
        "RuntimeError",
    ),
}


@dataclass(frozen=True, slots=True)
class _Cached:
    result: Result
    meta: dict[str, Any]


class Executor:
    """The worker's memory between prompts.

    Attributes:
      client_id: Whom the present or last prompt belongs to; None if to nobody.

    """

    def __init__(self, hub: Hub, files: Files, faults: Faults, run_s: float) -> None:
        self._hub = hub
        self._files = files
        self._faults = faults
        self._run_s = run_s
        self._cache: dict[str, _Cached] = {}
        self._current: PromptRun | None = None
        letters = faults.chance.choices("abcdefghijklmnopqrstuvwxyz", k=5)
        self._temp_tag = "".join(letters)
        self.client_id: str | None = None

    @property
    def node_id(self) -> str | None:
        """The node that is running, if its prompt has a client id."""
        return None if self._current is None else self._current.node_id

    def interrupt(self) -> None:
        """Ask the running prompt to stop; without one there is no effect."""
        if self._current is not None:
            self._current.interrupted.set()

    async def execute(self, item: Item) -> Record:
        """Run *item* to its end, whichever that is; the record without its `prompt`."""
        _, prompt_id, graph, extra_data, outputs = item
        self.client_id = extra_data.get("client_id")
        prompt = PromptRun(
            self._hub,
            prompt_id,
            graph,
            extra_data,
            files=self._files,
            temp_tag=self._temp_tag,
        )
        self._current = prompt
        keys = self._keys(graph)
        self._cache = {key: self._cache[key] for key in keys.values() if key in self._cache}
        try:
            await self._run(prompt, keys, outputs)
        finally:
            self._current = None
        if self._faults.teardown_s:
            await trio.sleep(self._faults.teardown_s)
        shown = {
            node_id: self._cache[key]
            for node_id, key in keys.items()
            if key in self._cache and self._cache[key].result.ui
        }
        success = prompt.messages[-1][0] == "execution_success"
        return {
            "outputs": {node_id: cached.result.ui for node_id, cached in shown.items()},
            "status": {
                "status_str": "success" if success else "error",
                "completed": success,
                "messages": [[event, data] for event, data in prompt.messages],
            },
            "meta": {node_id: cached.meta for node_id, cached in shown.items()},
        }

    async def _run(self, prompt: PromptRun, keys: dict[str, str], outputs: list[str]) -> None:
        prompt.note("execution_start", {})
        hits = [node_id for node_id, key in keys.items() if key in self._cache]
        prompt.note("execution_cached", {"nodes": hits})
        order = Order(prompt.graph, [*outputs], lambda node_id: keys[node_id] in self._cache)
        executed: list[str] = []
        while (node_id := order.pick()) is not None:
            cached = self._cache.get(keys[node_id])
            if cached is not None:
                prompt.executed(node_id, cached.result.ui or None)
                prompt.finish(node_id)
                order.done(node_id)
                continue
            about = {
                "node_id": node_id,
                "node_type": prompt.graph[node_id]["class_type"],
                "executed": list(executed),
            }
            prompt.start(node_id)
            values = self._values(prompt.graph, keys, node_id)
            try:
                result = await self._node(prompt, node_id, values)
            except InterruptedRunError:
                prompt.note("execution_interrupted", about, broadcast=True)
                return
            except NodeError as error:
                current = {name: [_format(value)] for name, value in values.items()}
                prompt.note(
                    "execution_error",
                    {
                        **about,
                        "exception_message": f"{error}\n",
                        "exception_type": error.kind,
                        "traceback": ['  File "nodes.py", line 1, in run\n'],
                        "current_inputs": current,
                        "current_outputs": list(prompt.graph),
                    },
                )
                return
            self._cache[keys[node_id]] = _Cached(result, prompt.meta(node_id))
            if result.ui:
                prompt.executed(node_id, result.ui)
            prompt.finish(node_id)
            executed.append(node_id)
            order.done(node_id)
        prompt.note("execution_success", {})

    async def _node(self, prompt: PromptRun, node_id: str, values: dict[str, Any]) -> Result:
        prompt.check_interrupt()
        node_class = NODE_CLASSES[prompt.graph[node_id]["class_type"]]
        card = self._faults.card_fails
        if card is not None and self._faults.strikes(card):
            raise NodeError(*_CARD_ERRORS[card.kind])
        if self._faults.strikes(self._faults.hangs):
            await trio.sleep_forever()
        if self._faults.strikes(self._faults.stalls):
            await prompt.interrupted.wait()
            prompt.check_interrupt()
        await trio.sleep(self._run_s)
        return await node_class.run(prompt, values)

    def _values(self, graph: Graph, keys: dict[str, str], node_id: str) -> dict[str, Any]:
        node_class = NODE_CLASSES[graph[node_id]["class_type"]]
        values = {}
        for name, value in graph[node_id]["inputs"].items():
            if name not in node_class.required and name not in node_class.optional:
                continue  # ComfyUI ignores inputs that a class does not have
            if is_link(value):
                values[name] = self._cache[keys[value[0]]].result.slots[value[1]]
            else:
                values[name] = value
        return values

    def _keys(self, graph: Graph) -> dict[str, str]:
        """What each node's result is cached under: its class, inputs and all that is upstream."""
        keys: dict[str, str] = {}

        def key_of(node_id: str) -> str:
            if node_id not in keys:
                node = graph[node_id]
                node_class = NODE_CLASSES[node["class_type"]]
                inputs = node["inputs"]
                parts: list[Any] = [node["class_type"]]
                if node_class.changed is not None and node_class.checked in inputs:
                    parts.append(node_class.changed(self._files, inputs))
                for name in sorted(inputs):
                    value = inputs[name]
                    if is_link(value) and value[0] in graph:
                        parts.append([name, "link", key_of(value[0]), value[1]])
                    else:
                        parts.append([name, "value", value])
                keys[node_id] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            return keys[node_id]

        for node_id in graph:
            try:
                key_of(node_id)
            except RecursionError:
                # Only nodes that are not executed can be part of a cycle here.
                keys[node_id] = f"cycle of {node_id}"
        return keys


def _format(value: object) -> object:
    return value if value is None or isinstance(value, int | float | bool | str) else str(value)
