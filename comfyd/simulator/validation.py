"""Whether a posted graph may run: what ComfyUI checks, and the errors it answers with.

After execution.py of ComfyUI 0.3.64: a graph is accepted when at least one of its outputs is valid,
and the errors of the others come along with the acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from comfyd.simulator.files import Files
from comfyd.simulator.nodes import InputSpec, NodeClass, choices_of

Graph = dict[str, dict[str, Any]]
Reason = dict[str, Any]

_CONVERSIONS: Final = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
_TRACEBACK: Final = ['  File "execution.py", line 1, in validate_inputs\n']


@dataclass(frozen=True, slots=True)
class Verdict:
    """What validation found.

    Attributes:
      error: The body's `error`; None if the graph is accepted.
      outputs: Ids of the output nodes that will be executed.
      node_errors: The body's `node_errors`; not empty with outputs means a partial acceptance.

    """

    error: dict[str, Any] | None
    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)


def validate(
    graph: Graph, classes: Mapping[str, NodeClass], files: Files, targets: list[str] | None
) -> Verdict:
    """Check *graph*, converting literal inputs in place as ComfyUI does.

    *classes* are the node classes that are installed, by name; *targets* are the output nodes that
    are wanted, None means all. A graph that is no object of objects raises TypeError or the like,
    for which the server answers 500.
    """
    outputs = []
    for node_id in graph:
        if "class_type" not in graph[node_id]:
            message = "Cannot execute because a node is missing the class_type property."
            return Verdict(_error("invalid_prompt", message, f"Node ID '#{node_id}'"))
        class_type = graph[node_id]["class_type"]
        node_class = classes.get(class_type)
        if node_class is None:
            message = f"Cannot execute because node {class_type} does not exist."
            return Verdict(_error("invalid_prompt", message, f"Node ID '#{node_id}'"))
        if node_class.is_output and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return Verdict(_error("prompt_no_outputs", "Prompt has no outputs", ""))
    return _Validation(graph, classes, files).outputs(outputs)


def _error(kind: str, message: str, details: str) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": {}}


class _Validation:
    """One pass over one graph; remembers what was found of each node."""

    def __init__(self, graph: Graph, classes: Mapping[str, NodeClass], files: Files) -> None:
        self._graph = graph
        self._classes = classes
        self._files = files
        self._found: dict[str, list[Reason] | None] = {}  # None: valid; a list: not, and why
        self._node_errors: dict[str, Any] = {}

    def outputs(self, outputs: list[str]) -> Verdict:
        good = []
        sentences = []
        for output in outputs:
            reasons: list[Reason] | None
            try:
                reasons = self._node(output, ())
            except (KeyError, IndexError, TypeError, ValueError) as error:
                reasons = [
                    {
                        "type": "exception_during_validation",
                        "message": "Exception when validating node",
                        "details": str(error),
                        "extra_info": {
                            "exception_type": type(error).__name__,
                            "traceback": _TRACEBACK,
                        },
                    }
                ]
                self._found[output] = reasons
            if reasons is None:
                good.append(output)
                continue
            sentences += [f"{reason['message']}: {reason['details']}" for reason in reasons]
            self._blame(output)
        if good:
            return Verdict(None, good, self._node_errors)
        error_body = _error(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            "\n".join(sentences),
        )
        return Verdict(error_body, [], self._node_errors)

    def _blame(self, output: str) -> None:
        for node_id, reasons in self._found.items():
            if not reasons:
                continue  # valid, or invalid only because of a node upstream
            entry = self._node_errors.setdefault(
                node_id,
                {
                    "errors": reasons,
                    "dependent_outputs": [],
                    "class_type": self._graph[node_id]["class_type"],
                },
            )
            entry["dependent_outputs"].append(output)

    def _node(self, node_id: str, above: tuple[str, ...]) -> list[Reason] | None:
        if node_id in self._found:
            return self._found[node_id]
        if node_id in above:
            return []  # a cycle: ComfyUI refuses it without a word
        inputs = self._graph[node_id]["inputs"]
        node_class = self._classes[self._graph[node_id]["class_type"]]
        reasons: list[Reason] = []
        is_valid = True
        for name, spec in (node_class.required | node_class.optional).items():
            if name not in inputs:
                if name in node_class.required:
                    reasons.append(
                        _reason("required_input_missing", "Required input is missing", name, name)
                    )
            elif isinstance(inputs[name], list):
                reason, upstream_is_valid = self._link(name, spec, inputs[name], (*above, node_id))
                reasons += [reason] if reason else []
                is_valid = is_valid and upstream_is_valid
            else:
                reason = _literal(node_class, name, spec, inputs)
                reasons += [reason] if reason else []
        if node_class.check is not None and node_class.checked in inputs:
            sentence = node_class.check(self._files, inputs)
            if sentence is not None:
                name = node_class.checked
                message = "Custom validation failed for node"
                details = f"{name} - {sentence}"
                reasons.append(_reason("custom_validation_failed", message, details, name))
        self._found[node_id] = None if is_valid and not reasons else reasons
        return self._found[node_id]

    def _link(
        self, name: str, spec: InputSpec, link: list[Any], above: tuple[str, ...]
    ) -> tuple[Reason | None, bool]:
        """The error of one link, and whether the node it leads to is valid."""
        config = _config(spec)
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            extra: dict[str, Any] = {"input_config": config, "received_value": link}
            return _reason("bad_linked_input", message, name, name, **extra), True
        source, slot = link
        received = self._classes[self._graph[source]["class_type"]].returns[slot]
        if spec[0] not in ("*", received):
            message = "Return type mismatch between linked nodes"
            details = f"{name}, received_type({received}) mismatch input_type({spec[0]})"
            extra = {"input_config": config, "received_type": received, "linked_node": link}
            return _reason("return_type_mismatch", message, details, name, **extra), True
        try:
            return None, self._node(source, above) is None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            message = "Exception when validating inner node"
            extra = {
                "input_config": config,
                "exception_message": str(error),
                "exception_type": type(error).__name__,
                "traceback": _TRACEBACK,
                "linked_node": link,
            }
            kind = "exception_during_inner_validation"
            self._found[source] = [_reason(kind, message, str(error), name, **extra)]
            return None, False


def _config(spec: InputSpec) -> InputSpec:
    return spec if len(spec) > 1 else [*spec, {}]


def _reason(kind: str, message: str, details: str, input_name: str, **extra: Any) -> Reason:
    return {
        "type": kind,
        "message": message,
        "details": details,
        "extra_info": {"input_name": input_name, **extra},
    }


def _literal(
    node_class: NodeClass, name: str, spec: InputSpec, inputs: dict[str, Any]
) -> Reason | None:
    """Convert one literal in place; its error if it is of the wrong type or out of range."""
    kind, limits = _config(spec)
    value = inputs[name]
    if isinstance(value, dict) and "__value__" in value:
        value = inputs[name] = value["__value__"]
    extra = {"input_config": _config(spec), "received_value": value}
    if isinstance(kind, str) and kind in _CONVERSIONS:
        try:
            value = inputs[name] = _CONVERSIONS[kind](value)
        except (TypeError, ValueError, OverflowError) as error:
            message = f"Failed to convert an input value to a {kind} value"
            details = f"{name}, {value}, {error}"
            extra["exception_message"] = str(error)
            return _reason("invalid_input_type", message, details, name, **extra)
    if name == node_class.checked:
        return None
    extra["received_value"] = value
    if "min" in limits and value < limits["min"]:
        message = f"Value {value} smaller than min of {limits['min']}"
        return _reason("value_smaller_than_min", message, name, name, **extra)
    if "max" in limits and value > limits["max"]:
        message = f"Value {value} bigger than max of {limits['max']}"
        return _reason("value_bigger_than_max", message, name, name, **extra)
    choices = choices_of(spec)
    if choices is not None and value not in choices:
        details = f"{name}: '{value}' not in {choices}"
        return _reason("value_not_in_list", "Value not in list", details, name, **extra)
    return None
