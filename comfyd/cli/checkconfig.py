"""``comfyd check-config``: every problem of a configuration file, one a line."""

from __future__ import annotations

import argparse
import os

from comfyd import config
from comfyd.cli.exits import Exit
from comfyd.cli.screen import put_json, say
from comfyd.errors import UsageError


def main(args: argparse.Namespace) -> int:
    """Exit 78 if there is a problem."""
    path = config.find_config(args.file or args.config, os.environ)
    if path is None:
        raise UsageError("there is no configuration file to check; name one")
    problems = config.check(path)
    if args.json:
        found = [
            {
                "file": str(each.file or path),
                "line": each.line,
                "col": each.col,
                "key": each.key,
                "problem": each.problem,
            }
            for each in problems
        ]
        put_json({"file": str(path), "ok": not problems, "problems": found})
    else:
        for each in problems:
            print(each)
    if problems:
        return Exit.CONFIG
    say(f"comfyd: {path}: good")
    return Exit.OK
