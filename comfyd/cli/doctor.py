"""``comfyd doctor``: everything that can be wrong around comfyd, and how to mend it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from comfyd import config
from comfyd.cli.examine import Finding, everything, ok, problem, warning
from comfyd.cli.exits import Exit
from comfyd.cli.screen import Table, counted, put, put_json, say


def main(args: argparse.Namespace) -> int:
    """Exit 1 if anything is a problem; warnings are none."""
    findings = list(_found(args))
    problems = sum(each.level == "problem" for each in findings)
    warnings = sum(each.level == "warning" for each in findings)
    if args.json:
        keys = ("subject", "level", "what", "remedy")
        shown = [{key: getattr(each, key) for key in keys} for each in findings]
        put_json({"ok": not problems, "findings": shown})
    else:
        rows = [
            (each.subject, each.level, " ".join(filter(None, [each.what, each.remedy])))
            for each in findings
        ]
        put(Table(("SUBJECT", "STATE", "FINDING"), rows))
    if problems:
        say(f"comfyd: {counted(problems, 'problem')}, {counted(warnings, 'warning')}")
        return Exit.FAILED
    say(f"comfyd: nothing is wrong, {counted(warnings, 'warning')}")
    return Exit.OK


def _found(args: argparse.Namespace) -> Iterator[Finding]:
    subject = "configuration"
    path = config.find_config(args.config, os.environ)
    if path is None:
        remedy = "Name one with -c, or write /etc/comfyd/comfyd.yaml."
        yield warning(subject, "There is no file; the defaults in this folder are used.", remedy)
        yield from everything(config.defaults(Path.cwd()))
        return
    problems = config.check(path)
    for each in problems:
        yield problem(subject, f"{each}.", "Mend that line; comfyd check-config looks again.")
    if not problems:
        yield ok(subject, f"{path} is good.")
        yield from everything(config.load(path, config.Secrets.REACHABLE))
