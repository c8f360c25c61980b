"""What can be typed: every command with its options, and nothing about what they do."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any, Final, NoReturn

from comfyd import __version__
from comfyd.core import wishes
from comfyd.errors import UsageError

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_EPILOG: Final = """\
exit codes: 0 ok, 1 a job failed or is not known, 64 usage, 65 bad job file, 69 daemon not
reachable, 70 internal error, 73 another daemon owns the spool, 78 configuration
"""

_CHOSEN: Final = """
Name jobs, or choose them with --state, --match or both. One line a job on stdout says what really
happened; with --json it is one JSON object a line, with "ok" and a word in "outcome".
exit codes: 0 all ended as asked, 1 some did not, 64 usage, 69 no daemon is running
"""

# verb, what it does, and how
_JOB_VERBS: Final = (
    (
        "cancel",
        "cancel jobs, wherever they are",
        """\
A job that waits goes to failed/ at once, with state and reason cancelled. A prompt on a server is
deleted from its queue, or interrupted by its id (never by interrupting whatever runs), and the job
is cancelled when the server's own queue and history confirm that it is gone. That may take longer
than the 25 s that are waited here; it goes on by itself. A success that came first stands: the job
is done. What has ended already and is being delivered comes too late to be cancelled.
"""
        + _CHOSEN,
    ),
    (
        "retry",
        "make new jobs of jobs that have ended",
        """\
The new job has an id of its own, is made of what was submitted, as it lies in done/ or failed/, and
takes over the key and the random numbers that were drawn. If the folder was taken away from there,
submit the file again. --match alone chooses what failed or was cancelled; what was retried already
is chosen neither by --match nor by --state, only by its name.
"""
        + _CHOSEN,
    ),
    (
        "hold",
        "keep queued jobs from being sent, until they are released",
        "A job that was sent already is not held any more; cancel it.\n" + _CHOSEN,
    ),
    (
        "release",
        "let held jobs go on",
        """\
Also a job that the daemon itself holds, since it crashed three times with it at hand: comfyd show
says so.
"""
        + _CHOSEN,
    ),
)

_CONFIRMED: Final = """
What is said is how it is afterwards. It survives a restart of the daemon.
exit codes: 0 it is as asked, 1 it is not, 64 usage, 69 no daemon is running
"""

# verb, what it does, how, and whether it takes a server
_SERVER_VERBS: Final = (
    (
        "pause",
        "stop the intake: files stay in new/",
        "Jobs that were taken already go on; hold keeps those that are queued.\n" + _CONFIRMED,
        None,
    ),
    (
        "resume",
        "let the intake go on, or a server that was drained or is wedged",
        "Without SERVER the intake, with SERVER that server and nothing else.\n" + _CONFIRMED,
        "?",
    ),
    (
        "drain",
        "send nothing more to a server, and let it finish what it has",
        "comfyd status shows when nothing is left there. comfyd resume SERVER undoes it.\n"
        + _CONFIRMED,
        1,
    ),
    (
        "forget",
        "give up on a server that is gone",
        """\
What was sent there is written off at once instead of after audit.abandon_after, and made elsewhere.
Should the server come back after all, what is left there is ended before anything new is sent. One
that answers is not forgotten: its prompts are alive; drain it.
"""
        + _CONFIRMED,
        1,
    ),
)


_RELOAD: Final = """
Servers, timeouts and limits change without losing a job or a connection that need not go. A server
that is taken out of the file gets nothing more and goes when it has finished what it runs; what
only waits there is fetched back. A bad file changes nothing, and what is wrong with it is said here
and in the daemon's log. What needs a restart (spool, state, metrics.listen) is refused as a whole.
SIGHUP does the same.
exit codes: 0 it holds, 78 it does not, 64 usage, 69 no daemon is running
"""

_GC: Final = """\
Results in done/ and failed/ that exceed retention.done or retention.failed go, the oldest first,
each folder whole; so do the stories of jobs that exceed retention.events. A job that has not ended
is never touched. The daemon does the same by itself every ten minutes. One line a result on stdout.
exit codes: 0 all of it, 1 something could not be removed, 64 usage, 69 no daemon is running
"""

_SNAPSHOT: Final = """\
FILE is written whole, is durable when this ends, and is for its owner alone. To restore it, stop
the daemon, put FILE in the place of comfyd.db in the state folder, remove comfyd.db-wal there, and
start: what has happened since is found out from the spool and the servers.
exit codes: 0 it is there, 1 it cannot be made, 64 usage, 69 the daemon does not answer
"""

_DOCTOR: Final = """\
Looks at the configuration, folders and their rights, file systems, servers and their clocks,
limits and free space, with the daemon running or not. It changes nothing.
exit codes: 0 nothing is wrong (there may be warnings), 1 something is
"""

SHELLS: Final = ("bash", "zsh", "fish")
_SHELLS: Final = """\
bash:  comfyd completion bash > /etc/bash_completion.d/comfyd
zsh:   comfyd completion zsh > a file _comfyd in a folder of $fpath
fish:  comfyd completion fish > ~/.config/fish/completions/comfyd.fish
"""


class Parser(argparse.ArgumentParser):
    """A parser that leaves the last word, and the exit code, to its caller."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of ending the process."""
        raise UsageError(f"{message}; see {self.prog} --help")


def duration_s(text: str) -> float:
    """Seconds of ``500ms``, ``15s``, ``5m``, ``2h`` or ``1d``, above zero."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)", text)
    if match is None or not (span_s := float(match[1]) * _UNITS_S[match[2]]):
        raise argparse.ArgumentTypeError(
            f"a duration is written 500ms, 15s, 5m, 2h or 1d, not {text!r}"
        )
    return span_s


def _whole(low: int, high: float = math.inf) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not low <= int(text) <= high:
            limit = "" if high == math.inf else f" to {high:.0f}"
            raise argparse.ArgumentTypeError(f"a whole number from {low}{limit}, not {text!r}")
        return int(text)

    return parse


def build_parser() -> Parser:
    """The whole command line; the result of parsing has ``command`` and the options' names."""
    parser = Parser(
        prog="comfyd",
        description="A job daemon for ComfyUI: drop a workflow in a folder, get its verified"
        " outputs exactly once.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"comfyd {__version__}")
    _add_config(parser, default=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(
        name: str, about: str, *, json: bool = False, told: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=told,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # Left out, it must not undo what stood before the command.
        _add_config(added, default=argparse.SUPPRESS)
        if json:
            added.add_argument("--json", action="store_true", help="JSON on stdout, for scripts")
        return added

    command("run", "run the daemon in the foreground, until SIGTERM or Ctrl-C")
    _demo(command("demo", "run sample jobs through a daemon and a simulated ComfyUI", json=True))
    _submit(command("submit", "put jobs in the spool; works while the daemon is down", json=True))

    status = command("status", "show servers, counts and the jobs at hand", json=True)
    status.add_argument("-w", "--watch", action="store_true", help="go on until Ctrl-C")

    jobs = command("jobs", "list jobs, newest first", json=True)
    jobs.add_argument("--state", metavar="S", help="only these, e.g. queued, running or failed")
    jobs.add_argument(
        "--limit", type=_whole(1, 1_000_000), default=50, metavar="N", help="at most (50)"
    )
    show = command("show", "tell one job's whole story", json=True)
    show.add_argument("job", metavar="JOB", help="job id or its beginning, or a prompt id")

    check = command("check", "audit one job now, and finish it if its end was missed", json=True)
    check.add_argument("job", metavar="JOB_OR_PROMPT_ID")

    for verb, about, told in _JOB_VERBS:
        _choice(command(verb, about, json=True, told=told), verb)
    for verb, about, told, server in _SERVER_VERBS:
        named = command(verb, about, json=True, told=told)
        if server:
            named.add_argument("server", nargs=server, metavar="SERVER", help="its name")

    command("reload", "let the daemon read its configuration again", json=True, told=_RELOAD)

    gc = command("gc", "remove now what retention no longer keeps", json=True, told=_GC)
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    snapshot = command(
        "snapshot", "copy the journal, whether the daemon runs or not", json=True, told=_SNAPSHOT
    )
    snapshot.add_argument("file", type=Path, metavar="FILE", help="must not exist")
    command("doctor", "check everything, and say how to mend it", json=True, told=_DOCTOR)

    config = command("check-config", "check a configuration file", json=True)
    config.add_argument("file", nargs="?", type=Path, metavar="FILE")

    _simulate(command("simulate", "serve a simulated ComfyUI on the loopback address"))
    shell = command("completion", "print what makes a shell complete comfyd's words", told=_SHELLS)
    shell.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def _choice(parser: argparse.ArgumentParser, verb: str) -> None:
    """Which jobs: named, or chosen by state and name."""
    states = wishes.ALLOWED[verb]
    parser.add_argument(
        "jobs", nargs="*", metavar="JOB", help="job id or its beginning, or a prompt id"
    )
    parser.add_argument(
        "--state", choices=states, metavar="S", help=f"all jobs that are S: {', '.join(states)}"
    )
    default = ", ".join(wishes.CONCERNED[verb])
    parser.add_argument(
        "--match",
        metavar="GLOB",
        help=f"all jobs whose id fits GLOB (* ? [...]); without --state those that are {default}",
    )


def _add_config(parser: argparse.ArgumentParser, *, default: Any) -> None:
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE", default=default, help="configuration file"
    )


def _submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="job files or folders; - is stdin")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="give an input a value: JSON, or else text; random draws a number",
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NODE.INPUT=PATH",
        help="upload a file, and give an input its name",
    )
    parser.add_argument("--priority", type=_whole(-1_000_000, 1_000_000), metavar="N")
    parser.add_argument("--name", help="stem of the job ids, instead of the file's")
    parser.add_argument("--wait", action="store_true", help="until every job has ended")
    parser.add_argument(
        "--timeout", type=duration_s, metavar="DURATION", help="with --wait: at most so long"
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="URL", help="a real ComfyUI instead of the simulator")
    parser.add_argument("--jobs", type=_whole(1, 1000), default=8, metavar="N", help="jobs (8)")
    parser.add_argument("--keep", action="store_true", help="keep the daemon until Ctrl-C")


def _simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_whole(0, 65535), default=8188, metavar="P", help="(8188)")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[=ARG]",
        help="switch a fault on; may be repeated",
    )
    parser.add_argument(
        "--run-time", type=duration_s, default=0.5, metavar="DURATION", help="of a node (500ms)"
    )
    parser.add_argument("--list-faults", action="store_true", help="list the faults and end")
