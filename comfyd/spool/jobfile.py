"""A job file's bytes -> a job: JSON or YAML, one of three forms, nothing guessed.

``load`` is called when a file is claimed and again at each submission; the same bytes and the same
drawn seeds always give the same graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec

from comfyd.core import workflow
from comfyd.core.workflow import Graph, Kind, quoted
from comfyd.errors import JobFileError
from comfyd.spool import yamlfile

MAX_METADATA_BYTES: Final = 65_536  # it is kept with the job's row and copied into every answer
MAX_SET: Final = 1000

# Keys of a request body that are the daemon's to choose.
_OURS: Final = ("prompt_id", "client_id", "number", "front")
_LATER: Final = {
    "files": "uploading files with a job",
    "timeouts": "timeouts of a job's own",
    "key": "idempotency keys",
}


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    workflow: dict[str, Any]
    set: Annotated[dict[str, Any], msgspec.Meta(max_length=MAX_SET)] = {}
    priority: Annotated[int, msgspec.Meta(ge=-1_000_000, le=1_000_000)] = 0
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    metadata: dict[str, Any] = {}


class JobDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What a job file asks for.

    Attributes:
      graph: Checked, with ``set`` applied; no prefix of ours in it yet.
      extra_data: Goes with the prompt as it is.
      max_attempts: None if the file leaves it to the configuration.
      drawn: Every seed drawn, by ``<node id>.<input>``.
      warnings: Sentences for the result.

    """

    graph: Graph
    extra_data: dict[str, Any] = {}
    priority: int = 0
    max_attempts: int | None = None
    metadata: dict[str, Any] = {}
    drawn: dict[str, int] = {}
    warnings: tuple[str, ...] = ()


def load(
    data: bytes,
    name: str,
    *,
    draw: Callable[[], int],
    drawn: Mapping[str, int] | None = None,
) -> JobDocument:
    """Read a job file.

    Args:
      name: Its file name: ``.yaml`` and ``.yml`` are YAML, everything else is JSON.
      draw: A random integer of 50 bits or more, for each ``random``.
      drawn: Seeds drawn when the file was claimed; used instead of drawing again.

    Raises:
      JobFileError: It is no job this version can run; one sentence or two for its owner.

    """
    yaml = name.lower().endswith((".yaml", ".yml"))
    document = yamlfile.parse(data) if yaml else workflow.parse_json(data)
    match workflow.recognise(document):
        case Kind.WORKFLOW:
            return JobDocument(graph=workflow.check_graph(document))
        case Kind.REQUEST:
            return _from_request(document)
        case Kind.DOCUMENT:
            return _from_document(document, draw, drawn)


def _from_request(request: dict[str, Any]) -> JobDocument:
    graph = workflow.check_graph(request["prompt"])
    extra_data = request.get("extra_data")
    if extra_data is None:
        extra_data = {}
    if not isinstance(extra_data, dict):
        raise JobFileError("extra_data must be an object.")
    if request.get("partial_execution_targets") is not None:
        raise JobFileError(
            "partial_execution_targets is not supported; remove the nodes that should not run."
        )
    warnings = tuple(f"{key} was dropped: comfyd chooses it" for key in _OURS if key in request)
    unknown = [key for key in request if key not in {"prompt", "extra_data", *_OURS}]
    if unknown:
        names = ", ".join(quoted(key) for key in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        warnings += (f"dropped from the request body, as ComfyUI does: {names}{more}",)
    return JobDocument(graph=graph, extra_data=extra_data, warnings=warnings)


def _from_document(
    document: dict[str, Any], draw: Callable[[], int], drawn: Mapping[str, int] | None
) -> JobDocument:
    known = _Document.__struct_fields__
    for key in document:
        if key in _LATER:
            raise JobFileError(f"{key}: this version of comfyd does not support {_LATER[key]} yet.")
        if key == "on_partial":
            if document[key] != "fail":
                raise JobFileError(
                    'on_partial: this version of comfyd supports "fail" only, the default.'
                )
        elif key not in known:
            close = difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}."
            raise JobFileError(f"The job document has the unknown key {quoted(key)}; {hint}")
    if isinstance(document["workflow"], str):
        raise JobFileError(
            "workflow: this version of comfyd does not look up workflows by name yet; put the "
            "graph itself there."
        )
    try:
        decoded = msgspec.convert(
            {key: value for key, value in document.items() if key != "on_partial"}, _Document
        )
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at $.")
        raise JobFileError(f"{path}: {problem}." if path else f"{problem}.") from None
    _check_metadata(decoded.metadata)
    graph, seeds = workflow.apply_set(
        workflow.check_graph(decoded.workflow), decoded.set, drawn=drawn, draw=draw
    )
    return JobDocument(
        graph=graph,
        priority=decoded.priority,
        max_attempts=decoded.max_attempts,
        metadata=decoded.metadata,
        drawn=seeds,
    )


def _check_metadata(metadata: dict[str, Any]) -> None:
    size_bytes = len(msgspec.json.encode(metadata))
    if size_bytes > MAX_METADATA_BYTES:
        raise JobFileError(
            f"metadata: {size_bytes} bytes are too many; {MAX_METADATA_BYTES} are allowed."
        )
