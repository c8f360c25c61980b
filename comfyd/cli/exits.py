"""Exit codes, and which error means which."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from comfyd.errors import (
    ComfydError,
    ConfigError,
    JobFileError,
    JournalTooNew,
    SpoolBusy,
    UsageError,
)


class Exit(enum.IntEnum):
    """What the process ends with; public, from sysexits.h where that has a word for it."""

    OK = 0
    FAILED = 1
    USAGE = 64
    BAD_JOB = 65
    UNREACHABLE = 69
    INTERNAL = 70
    BUSY = 73
    CONFIG = 78
    INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


class Unreachable(ComfydError):
    """The daemon does not answer, or may not be asked by this user."""


class Refused(ComfydError):
    """What was asked cannot be answered: the person must ask something else."""


# The first that fits counts, so a class stands before its base.
_CODES: Final = (
    (UsageError, Exit.USAGE),
    (JobFileError, Exit.BAD_JOB),
    (Refused, Exit.FAILED),
    (Unreachable, Exit.UNREACHABLE),
    (SpoolBusy, Exit.BUSY),
    (ConfigError, Exit.CONFIG),
    (JournalTooNew, Exit.CONFIG),
)


def exit_of(error: ComfydError) -> Exit:
    """The exit code of *error*; INTERNAL for what has none of its own."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.INTERNAL)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """*error*, or everything in it if it is a group: nurseries raise groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
