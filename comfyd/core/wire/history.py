"""A history record, decoded and bounded: the truth about how a prompt ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from comfyd.core.model import End, FileRef, NodeFailure, Record
from comfyd.core.wire.answers import tag_of
from comfyd.core.wire.tolerant import Malformed, decode, line
from comfyd.errors import ServerProtocol

MAX_FILES = 10_000  # far more than a job makes; with more, none is fetched
MAX_UI_BYTES = 2**20  # rows and results carry it: text to read, not files in disguise
MAX_UI_DEPTH = 32
MAX_NAME_CHARS = 4096  # no file system takes a longer path
MAX_FAILURE_CHARS = 4000
MAX_NODE_CHARS = 200
MAX_UNRUN = 50  # a person reads the first few

_ENDS = {
    "execution_success": End.SUCCESS,
    "execution_error": End.ERROR,
    "execution_interrupted": End.INTERRUPTED,
}
# What /view hands out and a job makes. An `input` is there before; other words are nodes' own.
_PRODUCTS = {"output", "temp"}
_STATUS = {"success": End.SUCCESS, "error": End.ERROR}

_answer = msgspec.json.Decoder(dict[str, Any])


def decode_history(body: bytes, prompt_id: str) -> Record | None:
    """Decode GET /history/{prompt_id}.

    Returns:
      The record, or None when the server has none: unknown, not finished, or forgotten.

    Raises:
      ServerProtocol: Not a record of this prompt, or one that does not say how it ended.

    """
    try:
        answer, nulled = decode(body, _answer)
    except Malformed as error:
        raise ServerProtocol(f"the answer to GET /history does not decode: {error}") from None
    if not answer:
        return None
    record = answer.get(prompt_id)
    if not isinstance(record, dict):
        raise ServerProtocol("the answer to GET /history holds no record of the prompt asked for")
    warnings: list[str] = []
    if nulled:
        s = "s" * (nulled > 1)
        warnings.append(f"{nulled} number{s} in the server's record became null (NaN or infinite)")
    outputs = record.get("outputs")
    end, failure = _verdict(record.get("status"), has_outputs=bool(outputs), warnings=warnings)
    files, ui = _outputs(outputs, warnings)
    return Record(
        end=end,
        files=files,
        ui=ui,
        failure=failure,
        warnings=tuple(warnings),
        ours=_tag(record.get("prompt")),
        unrun=_unrun(record.get("prompt")),
    )


def _tag(prompt: object) -> tuple[str, int] | None:
    match prompt:
        case [_, _, _, {"comfyd": tag}, *_]:
            return tag_of(tag)
        case _:
            return None


def _unrun(prompt: object) -> tuple[str, ...]:
    """Nodes that no other one uses and that the server was not to run (execution.py keeps beside
    the graph which outputs passed its checks)."""
    match prompt:
        case [_, _, dict(graph), _, list(good), *_]:
            nodes = [node for node in graph.values() if isinstance(node, dict)]
            inputs = [node["inputs"] for node in nodes if isinstance(node.get("inputs"), dict)]
            used = {
                str(value[0])
                for each in inputs
                for value in each.values()
                if isinstance(value, list) and len(value) == 2
            }
            unrun = sorted(graph.keys() - used - {str(node) for node in good})
            return tuple(line(node, MAX_NODE_CHARS) for node in unrun[:MAX_UNRUN])
        case _:
            return ()


def _verdict(
    status: object, *, has_outputs: bool, warnings: list[str]
) -> tuple[End, NodeFailure | None]:
    """The last entry of ``status.messages`` decides.

    ``status_str`` only stands in where there are no messages: it says ``error`` for an interrupted
    prompt too, and after a cycle found at run time it repeats the previous prompt's (execution.py).
    """
    said = status if isinstance(status, dict) else {}
    messages = said.get("messages")
    for entry in reversed(messages if isinstance(messages, list) else []):
        match entry:
            case ["execution_error", {"exception_type": "ExecutionBlocked"}]:
                continue  # not an end: the prompt went on
            case [str(event), *rest] if event in _ENDS:
                data = rest[0] if rest and isinstance(rest[0], dict) else {}
                end = _ENDS[event]
                return end, _failure(data) if end is End.ERROR else None
            case _:
                continue  # how it began, what was cached, or news from the future
    status_str = said.get("status_str")
    if isinstance(status_str, str) and status_str in _STATUS:
        warnings.append("the record holds no end message; its status_str was believed")
        return _STATUS[status_str], None
    if has_outputs:
        warnings.append("the record does not say how the prompt ended; it has outputs, so: success")
        return End.SUCCESS, None
    raise ServerProtocol("the history record does not say how the prompt ended")


def _failure(data: dict[str, Any]) -> NodeFailure:
    def text(key: str, limit: int) -> str:
        value = data.get(key)
        return line(str(value), limit) if isinstance(value, str | int) else ""

    return NodeFailure(
        node=text("node_id", 200),
        node_type=text("node_type", 200),
        exception_type=text("exception_type", 200),
        message=text("exception_message", MAX_FAILURE_CHARS),
    )


def _outputs(
    outputs: object, warnings: list[str]
) -> tuple[tuple[FileRef, ...], dict[str, dict[str, list[Any]]]]:
    files: list[FileRef] = []
    ui: dict[str, dict[str, list[Any]]] = {}
    budget = _Budget(MAX_UI_BYTES)
    strange: list[FileRef] = []
    for node, key, item in _items(outputs):
        ref = _file(node, key, item)
        if ref is not None and ref.type not in _PRODUCTS:
            if ref.type != "input":
                strange.append(ref)
            ref = None
        if ref is None:
            # An emptied budget still notes which nodes and keys there were, within reason.
            if budget.take(len(node) + len(key) + 2):
                ui.setdefault(node, {}).setdefault(key, []).append(budget.copy(item))
        elif len(files) < MAX_FILES:
            files.append(ref)
        else:
            raise ServerProtocol(f"the history record names more than {MAX_FILES} files")
    if strange:
        warnings.append(_not_products(strange))
    if budget.cut:
        warnings.append(f"what nodes returned besides files was cut at {MAX_UI_BYTES} bytes")
    if budget.too_deep:
        warnings.append(f"what nodes returned was nested deeper than {MAX_UI_DEPTH} levels: cut")
    return tuple(files), ui


def _items(outputs: object) -> Iterator[tuple[str, str, Any]]:
    for node, entry in (outputs if isinstance(outputs, dict) else {}).items():
        # ComfyUI gives a dict a node and a list a key; custom nodes have returned anything.
        for key, value in (entry if isinstance(entry, dict) else {"": entry}).items():
            for item in value if isinstance(value, list) else [value]:
                yield node, key, item


def _file(node: str, key: str, item: object) -> FileRef | None:
    match item:
        case {"filename": str(filename), **rest} if filename:
            subfolder, kind = rest.get("subfolder"), rest.get("type")
            # What is longer than any name can be is cut: it is still missing, not left out.
            return FileRef(
                node=node[:MAX_NAME_CHARS],
                key=key[:MAX_NAME_CHARS],
                filename=filename[:MAX_NAME_CHARS],
                subfolder=subfolder[:MAX_NAME_CHARS] if isinstance(subfolder, str) else "",
                type=kind[:MAX_NAME_CHARS] if isinstance(kind, str) and kind else "output",
            )
    return None


def _not_products(refs: list[FileRef]) -> str:
    first = line(f"{refs[0].filename!r} of node {refs[0].node} (type {refs[0].type})", 200)
    more = f" and {len(refs) - 1} more" if len(refs) > 1 else ""
    return f"no server hands out {first}{more}: named under ui only, not fetched"


class _Budget:
    """Copies JSON values while there is room, and remembers what had to be cut."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self.cut = False
        self.too_deep = False

    def take(self, size_bytes: int) -> bool:
        """Whether *size_bytes* are still free; then they no longer are."""
        if size_bytes > self._left:
            self.cut = True
            self._left = 0
            return False
        self._left -= size_bytes
        return True

    def copy(self, value: Any, depth: int = 0) -> Any:
        """*value* within the budget: strings are cut, whatever comes later becomes null."""
        if depth > MAX_UI_DEPTH:
            self.too_deep = True
            return None
        match value:
            case str():
                return self._text(value)
            case list():
                return [self.copy(item, depth + 1) for item in value if self.take(2)]
            case dict():
                return {
                    key: self.copy(item, depth + 1)
                    for key, item in value.items()
                    if self.take(len(key.encode()) + 4)
                }
            case _:
                return value if self.take(8) else None

    def _text(self, text: str) -> str:
        left = self._left
        raw = text.encode()
        if self.take(len(raw) + 2):
            return text
        return raw[: max(left - 2, 0)].decode("utf-8", "ignore")
