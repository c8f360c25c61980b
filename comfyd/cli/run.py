"""``comfyd run``: the daemon, in the foreground."""

from __future__ import annotations

import argparse
from functools import partial

import trio

from comfyd import app, log
from comfyd.cli.exits import Exit
from comfyd.cli.place import configured


def main(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT; every error is the caller's to report."""
    config, _ = configured(args)
    log.configure(config.log.level, config.log.format)
    trio.run(partial(app.run, config, signals=True))
    return Exit.OK
