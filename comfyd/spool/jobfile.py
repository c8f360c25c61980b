"""A job file's bytes -> a job: JSON or YAML, one of three forms, nothing guessed.

``load`` is called when a file is claimed and again at each submission; the same bytes, the same
files beside them and the same drawn seeds always give the same graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from comfyd.config.values import MAX_DURATION_S, seconds_of
from comfyd.core import workflow
from comfyd.core.workflow import Graph, Input, Kind, near, quoted
from comfyd.errors import JobFileError
from comfyd.spool import yamlfile

MAX_METADATA_BYTES: Final = 65_536  # it is kept with the job's row and copied into every answer
MAX_SET: Final = 1000
MAX_FILES: Final = 100  # each is an upload before every attempt
MAX_KEY_CHARS: Final = 200

DOCUMENT_NAMES: Final = ("job.yaml", "job.json")  # of a bundle: exactly one of them

# Keys of a request body that are the daemon's to choose.
_OURS: Final = ("prompt_id", "client_id", "number", "front")


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    workflow: dict[str, Any] | str
    set: Annotated[dict[str, Any], msgspec.Meta(max_length=MAX_SET)] = {}
    files: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_FILES)] = {}
    priority: Annotated[int, msgspec.Meta(ge=-1_000_000, le=1_000_000)] = 0
    timeouts: dict[str, Any] = {}
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    on_partial: Literal["fail", "accept"] = "fail"
    key: str | None = None
    metadata: dict[str, Any] = {}


class JobDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What a job file asks for.

    Attributes:
      graph: Checked, with ``set`` applied; no prefix of ours and no uploaded name in it yet.
      files: Which file of the bundle is uploaded for which input of the graph.
      extra_data: Goes with the prompt as it is.
      max_attempts, queue_s, run_s, stall_s: None if the file leaves it to the configuration.
      key: Its idempotency key, if it has one.
      drawn: Every seed drawn, by ``<node id>.<input>``.
      warnings: Sentences for the result.

    """

    graph: Graph
    files: dict[Input, str] = {}
    extra_data: dict[str, Any] = {}
    priority: int = 0
    max_attempts: int | None = None
    queue_s: float | None = None
    run_s: float | None = None
    stall_s: float | None = None
    accept_partial: bool = False
    key: str | None = None
    metadata: dict[str, Any] = {}
    drawn: dict[str, int] = {}
    warnings: tuple[str, ...] = ()


def load(
    data: bytes,
    name: str,
    *,
    draw: Callable[[], int],
    drawn: Mapping[str, int] | None = None,
    beside: Collection[str] | None = None,
    named: Callable[[str], bytes] | None = None,
) -> JobDocument:
    """Read a job file.

    Args:
      name: Its file name: ``.yaml`` and ``.yml`` are YAML, everything else is JSON.
      draw: A random integer of 50 bits or more, for each ``random``.
      drawn: Seeds drawn when the file was claimed; used instead of drawing again.
      beside: The relative names of the other files of its bundle; None if it is a single file.
      named: Gives the workflow of a relative name, or raises JobFileError; None if there is none.

    Raises:
      JobFileError: It is no job that can be run; one sentence or two for its owner.

    """
    document = _parsed(data, name)
    match workflow.recognise(document):
        case Kind.WORKFLOW:
            return JobDocument(graph=workflow.check_graph(document))
        case Kind.REQUEST:
            return _from_request(document)
        case Kind.DOCUMENT:
            return _from_document(document, draw, drawn, beside, named)


def is_yaml(name: str) -> bool:
    """Whether a file of this name is read as YAML."""
    return name.lower().endswith((".yaml", ".yml"))


def _parsed(data: bytes, name: str) -> Any:
    return yamlfile.parse(data) if is_yaml(name) else workflow.parse_json(data)


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
    document: dict[str, Any],
    draw: Callable[[], int],
    drawn: Mapping[str, int] | None,
    beside: Collection[str] | None,
    named: Callable[[str], bytes] | None,
) -> JobDocument:
    known = _Document.__struct_fields__
    for key in document:
        if key not in known:
            close = difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}."
            raise JobFileError(f"The job document has the unknown key {quoted(key)}; {hint}")
    try:
        decoded = msgspec.convert(document, _Document)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at $.")
        raise JobFileError(f"{path}: {problem}." if path else f"{problem}.") from None
    _check_key(decoded.key)
    _check_metadata(decoded.metadata)
    limits_s = _timeouts_s(decoded.timeouts)
    if isinstance(decoded.workflow, str):
        base = _named(decoded.workflow, named)
    else:
        base = JobDocument(graph=workflow.check_graph(decoded.workflow))
    files = _files(base.graph, decoded.files, beside)
    for target, key in workflow.targets(base.graph, decoded.set, "set").items():
        if target in files:
            raise JobFileError(f"set and files both give {quoted(key)} a value; drop one of them.")
    graph, seeds = workflow.apply_set(base.graph, decoded.set, drawn=drawn, draw=draw)
    return JobDocument(
        graph=graph,
        files=files,
        extra_data=base.extra_data,
        priority=decoded.priority,
        max_attempts=decoded.max_attempts,
        queue_s=limits_s.get("queue"),
        run_s=limits_s.get("run"),
        stall_s=limits_s.get("stall"),
        accept_partial=decoded.on_partial == "accept",
        key=decoded.key,
        metadata=decoded.metadata,
        drawn=seeds,
        warnings=base.warnings,
    )


def _named(name: str, named: Callable[[str], bytes] | None) -> JobDocument:
    """The workflow, or request body, that stands in a file of its own."""
    check_relative(name, "workflow")
    if name.split("/")[0] in DOCUMENT_NAMES:
        raise JobFileError(
            f"workflow: {quoted(name)} is where job documents are; give the workflow another name."
        )
    if named is None:
        raise not_found(name)
    data = named(name)
    try:
        found = _parsed(data, name)
        match workflow.recognise(found):
            case Kind.WORKFLOW:
                return JobDocument(graph=workflow.check_graph(found))
            case Kind.REQUEST:
                return _from_request(found)
            case Kind.DOCUMENT:
                raise JobFileError("It is a job document itself; name a workflow in API format.")
    except JobFileError as error:
        raise JobFileError(f"workflow {quoted(name)}: {error.message}") from None


def not_found(name: str) -> JobFileError:
    """The sentence for a workflow that is nowhere."""
    return JobFileError(
        f"workflow: {quoted(name)} is not beside the job document, and no folder of workflows is"
        " configured (workflows)."
    )


def check_relative(name: str, option: str) -> None:
    """Refuse what is no plain relative name, such as ``photo.png`` or ``in/photo.png``.

    Raises:
      JobFileError: Says which name.

    """
    parts = name.split("/")
    if not name.isprintable() or any(part in {"", ".", ".."} for part in parts):
        raise JobFileError(
            f"{option}: {quoted(name)} must be a plain relative name, such as photo.png or"
            " in/photo.png."
        )


def _files(
    graph: Graph, files: Mapping[str, str], beside: Collection[str] | None
) -> dict[Input, str]:
    """The file of the bundle for each input that ``files`` names."""
    if files and beside is None:
        raise JobFileError(
            "files: there are none beside a single job file; put it as job.yaml or job.json into a"
            " folder with them, and drop the folder."
        )
    found = workflow.targets(graph, files, "files")
    for key in found.values():
        name = files[key]
        check_relative(name, "files")
        if beside is not None and name not in beside:
            offer = near(name, list(beside))
            raise JobFileError(f"files: {quoted(name)} is not in the bundle. {offer}")
    return {target: files[key] for target, key in found.items()}


def _timeouts_s(timeouts: Mapping[str, Any]) -> dict[str, float]:
    known = ("queue", "run", "stall")
    found_s = {}
    for name, value in timeouts.items():
        if name not in known:
            raise JobFileError(
                f"timeouts has the unknown key {quoted(name)}; known keys are {', '.join(known)}."
            )
        limit_s = seconds_of(value) if isinstance(value, str) else None
        if limit_s is None or not 1 <= limit_s <= MAX_DURATION_S:
            shown = quoted(value) if isinstance(value, str) else f"{value!r:.30}"
            raise JobFileError(
                f"timeouts.{name} must be a time from 1s to 3650d, such as 90s, 30m or 2h, not"
                f" {shown}."
            )
        found_s[name] = limit_s
    return found_s


def _check_key(key: str | None) -> None:
    if key is None:
        return
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise JobFileError(
            f"key must be 1 to {MAX_KEY_CHARS} printable characters; this one has {len(key)}"
            f"{'' if key.isprintable() else ', not all of them printable'}."
        )


def _check_metadata(metadata: dict[str, Any]) -> None:
    size_bytes = len(msgspec.json.encode(metadata))
    if size_bytes > MAX_METADATA_BYTES:
        raise JobFileError(
            f"metadata: {size_bytes} bytes are too many; {MAX_METADATA_BYTES} are allowed."
        )
