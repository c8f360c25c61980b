"""The ``comfyd`` program: runs one command and turns what it raises into an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from comfyd.cli.arguments import build_parser
from comfyd.cli.exits import Exit, exit_of, leaves
from comfyd.cli.screen import say
from comfyd.errors import ComfydError

# Imported only when chosen: a command pays for what it uses.
_COMMANDS: Final = {
    "run": ("run", "main"),
    "demo": ("demo", "main"),
    "submit": ("submit", "main"),
    "status": ("status", "main"),
    "jobs": ("jobs", "list_jobs"),
    "show": ("jobs", "show"),
    "check": ("jobs", "check"),
    **dict.fromkeys(("cancel", "retry", "hold", "release"), ("verbs", "jobs")),
    **dict.fromkeys(("pause", "resume", "drain", "forget"), ("verbs", "servers")),
    "reload": ("verbs", "reload"),
    "gc": ("upkeep", "gc"),
    "snapshot": ("upkeep", "snapshot"),
    "doctor": ("doctor", "main"),
    "completion": ("completion", "main"),
    "check-config": ("checkconfig", "main"),
    "simulate": ("simulate", "main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv* (``sys.argv`` without it) and return the exit code.

    Errors that a person can act on are one sentence on stderr; only a bug shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the names: no encoding stops us
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the boundary: whatever it is becomes a code
        return _reported(error)
    return code


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks at a TAB
        importlib.import_module("comfyd.cli.completion").complete(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if args.command is None:
        parser.print_help(sys.stderr)
        return Exit.USAGE
    return _chosen(args)


def _chosen(args: argparse.Namespace) -> int:
    module, function = _COMMANDS[args.command]
    return int(getattr(importlib.import_module(f"comfyd.cli.{module}"), function)(args))


def _reported(error: BaseException) -> int:
    """Say what went wrong; the exit code of it."""
    causes = list(leaves(error))
    if any(isinstance(cause, BrokenPipeError) for cause in causes):
        # Whoever read our output has seen enough. Python would complain once more at exit.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return Exit.OK
    if all(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return Exit.INTERRUPTED
    if isinstance(error, OSError):  # a file that may not be used; in a group it came from a bug
        say(f"comfyd: {error}")
        return Exit.INTERNAL
    ours = [cause for cause in causes if isinstance(cause, ComfydError)]
    if len(ours) < len(causes):
        import traceback

        traceback.print_exception(error)
        say("comfyd: this is a bug in comfyd; please report it with the lines above")
        return Exit.INTERNAL
    for cause in ours:
        say(f"comfyd: {cause}")
    return max(map(exit_of, ours))


if __name__ == "__main__":
    sys.exit(main())
