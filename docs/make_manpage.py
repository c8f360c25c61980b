"""Makes docs/man/comfyd.1 from the code: ``python docs/make_manpage.py``.

Commands and options are those of ``comfyd/cli/arguments.py``; what else a manual page has is below.
A test holds the committed page to this.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final
from unittest import mock

from argparse_manpage.manpage import Manpage

from comfyd import __version__
from comfyd.cli.arguments import build_parser

PAGE: Final = Path(__file__).parent / "man" / "comfyd.1"

REST: Final = r"""
.SH ENVIRONMENT
.TP
.B COMFYD_CONFIG
The configuration file, unless \fB\-c\fR names one.
.TP
.B NO_COLOR
If it is set to anything, nothing is coloured.
.SH FILES
.TP
.I comfyd.yaml
The configuration, in the current folder; else \fI/etc/comfyd/comfyd.yaml\fR.
.TP
.I spool/new
Where jobs are dropped.
.TP
.I spool/done, spool/failed
A folder for each job that has ended, with \fIresult.json\fR or \fIerror.json\fR.
.TP
.I state/comfyd.db
The journal.
.TP
.I state/control.sock
Where the running daemon is asked.
.SH EXIT STATUS
.TS
l l.
0	all is well
1	a job failed, or something was not as asked
64	the command line is wrong
65	a job file is wrong
69	the daemon is not reachable
70	an internal error: the daemon stops, and a restart carries on
73	another daemon owns the spool
78	the configuration is wrong
.TE
"""


def page() -> str:
    """The whole page."""
    data = {
        "prog": "comfyd",
        "project_name": f"comfyd {__version__}",
        "manual_title": "User Commands",
        "description": "a durable job daemon for ComfyUI",
        "date": " ",
    }
    parser = build_parser()
    parser.epilog = None  # it is in EXIT STATUS
    for action in parser._actions:
        for command in (action.choices or {}).values() if action.dest == "command" else ():
            command.description = f"{command.description}\n\n{command.epilog or ''}".rstrip()
    with mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}):
        made = str(Manpage(parser, _data=data))
    lines = (line.rstrip() for line in f"'\\\" t\n{made.rstrip()}{REST}".splitlines())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
