"""The configuration: one YAML file -> one frozen ``Config``, or problems with their places.

``schema`` declares the settings, ``values`` and ``server`` read single ones, ``section`` joins the
two, ``document`` is the YAML underneath. Nothing here waits, and nothing is read from disk but what
``Secrets`` lists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from comfyd.config import document
from comfyd.config.document import MAX_CHARS, Scalar
from comfyd.config.schema import (
    Audit,
    Client,
    Completion,
    Config,
    Health,
    History,
    Jobs,
    Listen,
    Log,
    Metrics,
    Outputs,
    Retention,
    Retentions,
    Server,
    Tracker,
    Watch,
)
from comfyd.config.section import read_section
from comfyd.config.server import UNREAD, Secret
from comfyd.config.values import Context, Failed, Refused, Secrets, attempt, folder
from comfyd.errors import ConfigError

__all__ = [
    "UNREAD", "Audit", "Client", "Completion", "Config", "Health", "History", "Jobs", "Listen",
    "Log", "Metrics", "Outputs", "Retention", "Retentions", "Secret", "Secrets", "Server",
    "Tracker", "Watch", "check", "defaults", "find_config", "load", "parse", "read", "spool_of",
    "state_of",
]  # fmt: skip

SYSTEM_CONFIG: Final = Path("/etc/comfyd/comfyd.yaml")
LOCAL_CONFIG: Final = Path("comfyd.yaml")


def find_config(cli: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Where the configuration is.

    Args:
      cli: What ``--config`` said.
      environ: ``COMFYD_CONFIG`` comes next, and is not checked to exist either.

    Returns:
      The first of those two, ``comfyd.yaml`` here and the system's; None if there is none, which
      means ``defaults``.

    """
    if cli is not None:
        return cli
    if named := environ.get("COMFYD_CONFIG"):
        return Path(named)
    return next((path for path in (LOCAL_CONFIG, SYSTEM_CONFIG) if path.exists()), None)


def load(path: Path, secrets: Secrets = Secrets.ALL) -> Config:
    """Read the file at *path*.

    Args:
      secrets: Which of the files that it names are read.

    Raises:
      ConfigError: It cannot be read, or the first problem in it.

    """
    config, problems = read(path, secrets)
    if config is None:
        raise problems[0]
    return config


def check(path: Path) -> list[ConfigError]:
    """Every problem of the file at *path*, in the order of its lines; empty if it is good.

    A credential that only systemd can give is taken for good.
    """
    return read(path, Secrets.REACHABLE)[1]


def parse(
    text: str, *, file: Path | None, base: Path, environ: Mapping[str, str] = os.environ
) -> Config:
    """Read a configuration from *text*.

    Args:
      file: Its name, for messages.
      base: Absolute folder that relative paths start from.
      environ: Where ``CREDENTIALS_DIRECTORY`` is looked up.

    Raises:
      ConfigError: The first problem in it.

    """
    config, problems = _parse(text, file=file, base=base, environ=environ)
    if config is None:
        raise problems[0]
    return config


def defaults(base: Path) -> Config:
    """What an empty file in *base*, an absolute folder, configures."""
    return Config(spool=base / "spool", state=base / "state")


def read(path: Path, secrets: Secrets = Secrets.ALL) -> tuple[Config | None, list[ConfigError]]:
    """The file at *path* and no problem; or None and every problem, in the order of its lines."""
    try:
        text = _text_of(path)
    except ConfigError as error:
        return None, [error]
    base = path.absolute().parent
    return _parse(text, file=path, base=base, environ=os.environ, secrets=secrets)


def state_of(path: Path) -> Path:
    """The state folder that the file at *path* names, as well as can be told if it is a bad file.

    Raises:
      ConfigError: It cannot be read at all.

    """
    return _folder_of(path, "state")


def spool_of(path: Path) -> Path:
    """As ``state_of``, the spool."""
    return _folder_of(path, "spool")


def _folder_of(path: Path, key: str) -> Path:
    text, base = _text_of(path), path.absolute().parent
    # In a file that is no YAML, a line of its own can still be read.
    lines = [line for line in text.splitlines() if line.startswith(f"{key}:")]
    for part in (text, *lines):
        try:
            root = document.parse(part)
            if isinstance(root, document.Mapping) and key in root.values:
                ctx = Context(file=path, base=base, environ={}, problems=[])
                return folder(root.values[key], key, ctx)
        except (ConfigError, Refused):
            continue
    return base / key


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            # UTF-8 takes at most four bytes a character: what is cut off here is too large anyway.
            data = file.read(4 * MAX_CHARS + 4)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError("", f"cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        at = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError("", f"is not UTF-8 text{at}", file=path) from None


def _parse(
    text: str,
    *,
    file: Path | None,
    base: Path,
    environ: Mapping[str, str],
    secrets: Secrets = Secrets.ALL,
) -> tuple[Config | None, list[ConfigError]]:
    """The configuration and no problem, or None and at least one."""
    try:
        root = document.parse(text)
    except ConfigError as error:
        found = ConfigError(error.key, error.problem, file=file, line=error.line, col=error.col)
        return None, [found]
    ctx = Context(file=file, base=base, environ=environ, problems=[], secrets=secrets)
    paths = {"spool": base / "spool", "state": base / "state"}

    def read_config(node: document.Node, path: str, ctx: Context) -> Config:
        return read_section(Config, node, path, ctx, paths)

    config = attempt(read_config, root or Scalar("", plain=True, line=1, col=1), "", ctx)
    problems = sorted(ctx.problems, key=lambda problem: (problem.line or 0, problem.col or 0))
    return (None if problems or isinstance(config, Failed) else config), problems
