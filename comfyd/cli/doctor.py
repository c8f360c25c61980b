"""``comfyd doctor``: everything that can be wrong around comfyd, and how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _User:
    """Whoever the daemon runs as; one that only has a number is in no group but its own."""

    uid: int
    gid: int
    name: str | None

    def become(self) -> None:
        if self.name is None:
            os.setgroups([self.gid])
        else:
            os.initgroups(self.name, self.gid)
        os.setgid(self.gid)
        os.setuid(self.uid)

    def __str__(self) -> str:
        return self.name or f"the user with id {self.uid}"


def _look_as_the_daemon(args: argparse.Namespace) -> None:
    """As root, become the daemon's user for good: to root everything seems permitted."""
    path = config.find_config(args.config, os.environ)
    if os.geteuid() != 0 or path is None:
        return
    user = _daemons_user(path)
    if user is None:
        return
    pid = os.fork()
    if pid == 0:
        may = False
        with contextlib.suppress(OSError):
            user.become()
            may = all(os.access(path, os.R_OK) for path in (__file__, os.__file__, sys.executable))
        os._exit(not may)
    if os.waitpid(pid, 0)[1] != 0:  # such as when all of it lies in root's home
        say(f"comfyd: looking with root's rights: {user} may not run {sys.executable}")
        return
    say(f"comfyd: looking with the rights of {user}, whose the folders are")
    user.become()


def _daemons_user(path: Path) -> _User | None:
    """Who owns state, or the spool if root has taken state over; None if that is root, or nobody.

    Root's state and another's spool is trouble to be found: seen with root's eyes it is none.
    """
    for folder_of in (config.state_of, config.spool_of):
        try:
            found = folder_of(path).stat()
        except (ComfydError, OSError):
            continue  # what is wrong there is found later
        if found.st_uid != 0:
            try:
                user = pwd.getpwuid(found.st_uid)
            except KeyError:
                return _User(found.st_uid, found.st_gid, None)
            return _User(user.pw_uid, user.pw_gid, user.pw_name)
    return None


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
    # A secret that cannot be read, maybe only by this user, keeps nothing else from being found.
    secrets = config.Secrets.NONE if problems else config.Secrets.REACHABLE
    found, _ = config.read(path, secrets)
    if found is not None:
        yield from everything(found)
