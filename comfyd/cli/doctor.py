"""``comfyd doctor``: everything that can be wrong around comfyd, and how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

from comfyd import config
from comfyd.cli.examine import Finding, everything, ok, problem, warning
from comfyd.cli.exits import Exit
from comfyd.cli.screen import Table, counted, put, put_json, say
from comfyd.errors import ComfydError


def main(args: argparse.Namespace) -> int:
    """Exit 1 if anything is a problem; warnings are none."""
    _look_as_the_daemon(args)
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


def _look_as_the_daemon(args: argparse.Namespace) -> None:
    """As root, become the state folder's owner for good: to root everything seems permitted."""
    path = config.find_config(args.config, os.environ)
    if os.geteuid() != 0 or path is None:
        return
    try:
        user = pwd.getpwuid(config.state_of(path).stat().st_uid)
    except (ComfydError, OSError, KeyError):
        return  # what is wrong there is found below
    if user.pw_uid == 0:
        return
    pid = os.fork()
    if pid == 0:
        may = False
        with contextlib.suppress(OSError):
            _become(user)
            may = all(os.access(path, os.R_OK) for path in (__file__, os.__file__, sys.executable))
        os._exit(not may)
    if os.waitpid(pid, 0)[1] != 0:  # such as when all of it lies in root's home
        say(f"comfyd: looking with root's rights: {user.pw_name} may not run {sys.executable}")
        return
    say(f"comfyd: looking with the rights of {user.pw_name}, whose the state folder is")
    _become(user)


def _become(user: pwd.struct_passwd) -> None:
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


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
