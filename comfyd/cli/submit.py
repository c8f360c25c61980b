"""``comfyd submit``: jobs checked here, put in the spool safely, and waited for if asked."""

from __future__ import annotations

import argparse
import os
from typing import Any

from comfyd.cli.exits import Exit
from comfyd.cli.parcel import Options, Parcel, prepare
from comfyd.cli.place import configured
from comfyd.cli.screen import put_json, say
from comfyd.core import workflow
from comfyd.errors import ConfigError, DiskFull, JobFileError, UsageError
from comfyd.spool.layout import Spool


def main(args: argparse.Namespace) -> int:
    """Submit all of the jobs or, if one is bad, none."""
    if args.timeout is not None and not args.wait:
        raise UsageError("--timeout goes with --wait")
    if args.files.count("-") > 1:
        raise UsageError("- is stdin, which can be read only once")
    options = Options(args.name, _assignments(args.set), _attachments(args.file), args.priority)
    config, _ = configured(args)
    prepared, bad = [], False
    for source in args.files:
        try:
            prepared.append(prepare(source, options, config))
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


def _attachments(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, path = text.partition("=")
        if not equals or not key or not path:
            raise UsageError(f"--file {text!r} must read NODE.INPUT=PATH, such as 10.image=a.png")
        if key in found:
            raise UsageError(f"--file {key} is given twice")
        found[key] = path
    return found


def _drop(spool: Spool, prepared: list[Parcel], *, quiet: bool) -> list[str]:
    """Drop them in order and print each id at once, unless *quiet*."""
    if not os.path.isdir(spool.new):
        problem = f"there is no spool at {spool.root}: start comfyd run there once, or use --config"
        raise ConfigError("spool", problem)
    jobs: list[str] = []
    try:
        for each in prepared:
            jobs.append(each.drop(spool))
            if not quiet:
                print(jobs[-1], flush=True)
    except (DiskFull, JobFileError, PermissionError) as error:
        if jobs:
            say(f"comfyd: {len(jobs)} of {len(prepared)} jobs were submitted, the rest was not")
        if isinstance(error, DiskFull):
            raise DiskFull(f"nothing more was submitted: {error}; submit again later") from error
        if not isinstance(error, PermissionError):
            raise
        problem = f"you may not write to {error.filename}: join the group of {spool.new}"
        raise ConfigError("spool", problem) from None
    return jobs
