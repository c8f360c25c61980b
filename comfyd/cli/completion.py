"""Completion of the command line: ``comfyd completion SHELL``, and what it calls at each TAB."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import argcomplete
from argcomplete.shell_integration import shellcode

from comfyd import config
from comfyd.cli.exits import Exit
from comfyd.cli.reading import newest, opened
from comfyd.config import Config, Secrets
from comfyd.core import wishes
from comfyd.core.present import SHOWN_STATES
from comfyd.errors import ComfydError

JOBS_MAX: Final = 500  # the newest; nobody chooses from more
PATIENCE_S: Final = 1.0  # for a daemon that does not answer: somebody waits at a prompt

Completer = Callable[..., Iterable[str]]


def main(args: argparse.Namespace) -> int:
    """Print what makes the shell complete."""
    print(shellcode(["comfyd"], shell=args.shell))
    return Exit.OK


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, which asks by variables of the environment, and end the process."""
    attach(parser)
    argcomplete.autocomplete(parser)


def attach(parser: argparse.ArgumentParser) -> None:
    """Say of each argument whose values are not in the parser how to find them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, subparser in action.choices.items():
                _attach(command, subparser)


def _attach(command: str, parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        completer: Completer | None = None
        if action.dest in {"job", "jobs"} and not action.option_strings:
            completer = _jobs_for(command)
        elif action.dest == "server" and not action.option_strings:
            completer = _servers
        elif action.dest == "state" and action.choices is None:
            completer = _states
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]  # argcomplete's own way


def _jobs_for(command: str) -> Completer:
    """The jobs that *command* can be for, the newest first."""
    wanted = wishes.ALLOWED.get(command, SHOWN_STATES)

    def jobs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        with contextlib.suppress(ComfydError, OSError):
            with opened(_config(parsed_args), answer_s=PATIENCE_S) as source:
                found = newest(source, None, JOBS_MAX)
            return [job["job"] for job in found if job["state"] in wanted]
        return []

    return jobs


def _servers(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    with contextlib.suppress(ComfydError):
        return [server.name for server in _config(parsed_args).servers]
    return []


def _states(prefix: str, **_: Any) -> list[str]:
    return list(SHOWN_STATES)


def _config(args: argparse.Namespace) -> Config:
    path = config.find_config(getattr(args, "config", None), os.environ)
    return config.defaults(Path.cwd()) if path is None else config.load(path, Secrets.NONE)
