"""``comfyd submit``: job files checked here, put in the spool safely, and waited for if asked."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from comfyd.cli.exits import Exit
from comfyd.cli.place import configured
from comfyd.cli.screen import put_json, say
from comfyd.config import Config
from comfyd.core import workflow
from comfyd.core.workflow import Kind
from comfyd.errors import ConfigError, DiskFull, JobFileError, UsageError
from comfyd.spool import jobfile, yamlfile
from comfyd.spool.layout import Spool, drop, extension_of, safe

_YAML_ENDS: Final = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was found good: its *source* as typed, and what to drop under which name."""

    source: str
    name: str
    data: bytes


def main(args: argparse.Namespace) -> int:
    """Submit all of the files or, if one is bad, none."""
    if args.file:
        raise UsageError("--file: this version of comfyd does not upload files with a job yet")
    if args.timeout is not None and not args.wait:
        raise UsageError("--timeout goes with --wait")
    if args.files.count("-") > 1:
        raise UsageError("- is stdin, which can be read only once")
    assignments = _assignments(args.set)
    config, _ = configured(args)
    prepared, bad = [], False
    for source in args.files:
        try:
            prepared.append(_prepare(source, args.name, assignments, args.priority, config))
        except JobFileError as error:
            bad = True
            say(f"comfyd: {source}: {error}")
    if bad:
        if prepared:
            say("comfyd: nothing was submitted")
        return Exit.BAD_JOB
    jobs = _drop(Spool(config.spool), prepared, quiet=args.json)
    if args.wait:
        from comfyd.cli.wait import wait

        return wait(config, jobs, timeout_s=args.timeout, json=args.json)
    if args.json:
        files = [each.source for each in prepared]
        put_json({"jobs": [{"job": j, "file": f} for j, f in zip(jobs, files, strict=True)]})
    return Exit.OK


def _assignments(texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text!r} must read NODE.INPUT=VALUE, such as 6.text=fox")
        if key in found:
            raise UsageError(f"--set {key} is given twice")
        try:
            found[key] = workflow.parse_json(value.encode())
        except JobFileError:
            found[key] = value  # no JSON, so it is text; `random` too
        except UnicodeEncodeError:
            raise UsageError(f"--set {key}: the value is not UTF-8 text") from None
    return found


def _prepare(
    source: str,
    stem: str | None,
    assignments: Mapping[str, Any],
    priority: int | None,
    config: Config,
) -> Prepared:
    data = _read(source, config.jobs.max_file_bytes)
    if source == "-":
        looks_json = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        name = "stdin.json" if looks_json else "stdin.yaml"
    else:
        name = Path(source).name
    if assignments or priority is not None:
        data, name = _document(data, name, assignments, priority), f"{_stem(name)}.json"
    if stem is not None:
        name = safe(_stem(stem)) + extension_of(name)
    job = jobfile.load(data, name, draw=lambda: secrets.randbits(53))
    for warning in job.warnings:
        say(f"comfyd: {source}: {warning}")
    if len(data) > config.jobs.max_file_bytes:
        raise JobFileError("With its settings the job is larger than jobs.max_file_bytes allows.")
    return Prepared(source, name, data)


def _stem(name: str) -> str:
    base, dot, extension = name.rpartition(".")
    return base if dot and f".{extension.lower()}" in {".json", *_YAML_ENDS} else name


def _read(source: str, max_bytes: int) -> bytes:
    try:
        with sys.stdin.buffer if source == "-" else open(source, "rb") as file:
            data = file.read(max_bytes + 1)
    except IsADirectoryError:
        raise JobFileError(
            "This is a folder; this version of comfyd takes single job files, not bundles."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise JobFileError(getattr(error, "strerror", None) or str(error)) from None
    if len(data) > max_bytes:
        raise JobFileError(f"The file has more than {max_bytes} bytes (jobs.max_file_bytes).")
    return data


def _document(
    data: bytes, name: str, assignments: Mapping[str, Any], priority: int | None
) -> bytes:
    """What *data* asks for as a job document, with the options of the command line in it."""
    yaml = name.lower().endswith(_YAML_ENDS)
    found = yamlfile.parse(data) if yaml else workflow.parse_json(data)
    match workflow.recognise(found):
        case Kind.DOCUMENT:
            document = dict(found)
        case Kind.WORKFLOW:
            document = {"workflow": found}
        case Kind.REQUEST:
            jobfile.load(data, name, draw=lambda: 0)  # its own faults first
            if found.get("extra_data"):
                raise JobFileError(
                    "The request body has extra_data, which a job document cannot hold; use"
                    " --set and --priority with the workflow itself."
                )
            document = {"workflow": found["prompt"]}
    if assignments:
        own = document.get("set", {})
        if not isinstance(own, dict):
            raise JobFileError("set: must be an object.")
        document["set"] = {**own, **assignments}
    if priority is not None:
        document["priority"] = priority
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()


def _drop(spool: Spool, prepared: list[Prepared], *, quiet: bool) -> list[str]:
    """Drop them in order and print each id at once, unless *quiet*."""
    if not os.path.isdir(spool.new):
        problem = f"there is no spool at {spool.root}: start comfyd run there once, or use --config"
        raise ConfigError("spool", problem)
    jobs: list[str] = []
    try:
        for each in prepared:
            jobs.append(drop(spool, each.name, each.data))
            if not quiet:
                print(jobs[-1], flush=True)
    except (DiskFull, PermissionError) as error:
        if jobs:
            say(f"comfyd: {len(jobs)} of {len(prepared)} jobs were submitted, the rest was not")
        if isinstance(error, DiskFull):
            raise DiskFull(f"nothing more was submitted: {error}; submit again later") from error
        problem = f"you may not write to {error.filename}: join the group of {spool.new}"
        raise ConfigError("spool", problem) from None
    return jobs
