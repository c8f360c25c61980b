"""Which configuration is meant, and the folders it names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from comfyd import config
from comfyd.cli.screen import say
from comfyd.config import Config, Secrets


def configured(
    args: argparse.Namespace, secrets: Secrets = Secrets.NONE
) -> tuple[Config, Path | None]:
    """The configuration that the command line, the environment or the folder names, and its file.

    Args:
      secrets: Which of the files that it names are read; only the daemon talks to servers.

    Raises:
      ConfigError: The file cannot be read or has a problem.

    """
    path = config.find_config(args.config, os.environ)
    if path is None:
        say("comfyd: no configuration file; using the defaults in this folder")
        return config.defaults(Path.cwd()), None
    return config.load(path, secrets), path
