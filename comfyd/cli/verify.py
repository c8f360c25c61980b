"""Whether a result is what its sample asked for: every byte of it is looked at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from comfyd.cli.samples import TEXT_NODE, Sample

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def problems_of(sample: Sample, folder: Path) -> list[str]:
    """What is wrong with the result in *folder*, one sentence each; empty if nothing. Blocking."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    except (OSError, ValueError) as error:
        return [f"result.json cannot be read: {error}"]
    problems = []
    if result.get("state") != "done":
        problems.append(f"result.json says {result.get('state')}, not done")
    outputs = result.get("outputs", [])
    if len(outputs) != sample.images:
        problems.append(f"{len(outputs)} outputs instead of {sample.images}")
    for output in outputs:
        problems += _file_problems(folder, output)
    if sample.text:
        said = result.get("ui", {}).get(TEXT_NODE, {}).get("text")
        if said != [sample.text]:
            problems.append(f"its text is {said!r}, not {sample.text!r}")
    return problems


def _file_problems(folder: Path, output: dict[str, Any]) -> list[str]:
    name = output["file"]
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]
    problems = []
    if len(data) != output["bytes"]:
        problems.append(f"{name} has {len(data)} bytes, not {output['bytes']}")
    if hashlib.sha256(data).hexdigest() != output["sha256"]:
        problems.append(f"{name} has another SHA-256 than result.json says")
    if not data.startswith(PNG_SIGNATURE):
        problems.append(f"{name} is no PNG file")
    return problems
