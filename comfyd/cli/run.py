"""``comfyd run``: the daemon, in the foreground."""

from __future__ import annotations

import argparse
from functools import partial

import trio

from comfyd import app, log
from comfyd.cli.exits import Exit
from comfyd.cli.place import configured
from comfyd.config import Config, Secrets, read


def main(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT; every error is the caller's to report."""
    config, path = configured(args, Secrets.ALL)
    _log_as(config)
    reread = app.nothing_to_read if path is None else partial(read, path.absolute())
    trio.run(partial(app.run, config, signals=True, reread=reread, on_reload=_log_as))
    return Exit.OK


def _log_as(config: Config) -> None:
    log.configure(config.log.level, config.log.format)
