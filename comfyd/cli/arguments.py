"""What can be typed: every command with its options, and nothing about what they do."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any, Final, NoReturn

from comfyd import __version__
from comfyd.errors import UsageError

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_EPILOG: Final = """\
exit codes: 0 ok, 1 a job failed or is not known, 64 usage, 65 bad job file, 69 daemon not
reachable, 70 internal error, 73 another daemon owns the spool, 78 configuration
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

    def command(name: str, about: str, *, json: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
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

    config = command("check-config", "check a configuration file", json=True)
    config.add_argument("file", nargs="?", type=Path, metavar="FILE")

    _simulate(command("simulate", "serve a simulated ComfyUI on the loopback address"))
    return parser


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
