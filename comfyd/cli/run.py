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
    config, path = configured(args)
    log.configure(config.log)
    trio.run(partial(app.run, config, config_path=path, signals=True))
    return Exit.OK
