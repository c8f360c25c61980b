"""Every exception comfyd raises on purpose, arranged by who must act.

ComfydError
├── ConfigError          the operator must act: a setting is missing or wrong (exit 78)
├── UsageError           the person at the command line must act (exit 64)
├── SpoolBusy            another daemon owns this spool or state folder (exit 73)
├── JobFileError         whoever dropped the job file must act; the file goes to failed/
├── ServerError          a ComfyUI server or the network; transient until proven otherwise
│   ├── ServerRefused        nothing was sent: the address refused the connection
│   ├── ServerUnreachable    connecting, reading or writing failed or took too long
│   ├── ServerStatus         it answered with an HTTP status that is no answer to the question
│   └── ServerProtocol       it answered, but not what the protocol allows
├── DiskFull             a write was refused (full, quota, read-only); wait, nothing was changed
├── JournalError         the journal cannot be read or written; fail-stop (exit 70)
│   ├── JournalDamaged       what is in the file is not what was written; set aside at start
│   └── JournalTooNew        written by a newer comfyd; nothing was touched (exit 78)
└── ProtocolViolation    our own bug: a fact arrived that the state table does not allow (exit 70)
"""

from __future__ import annotations

from pathlib import Path


class ComfydError(Exception):
    """Base class; never raised itself."""


class ConfigError(ComfydError):
    """A setting is missing or wrong.

    Args:
      key: Dotted path of the setting, e.g. ``"tracker.deaf_after"``; "" for the whole file.
      problem: What is wrong and what would be right, in one sentence.
      file: The configuration file, if there is one.
      line: 1-based line in *file*.
      col: 1-based column in *file*.

    """

    def __init__(
        self,
        key: str,
        problem: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        col: int | None = None,
    ) -> None:
        where = ":".join(str(part) for part in (file, line, col) if part is not None)
        super().__init__(": ".join(part for part in (where, key, problem) if part))
        self.key = key
        self.problem = problem
        self.file = file
        self.line = line
        self.col = col


class UsageError(ComfydError):
    """The command line asks for something that cannot be done as written."""


class SpoolBusy(ComfydError):
    """Another daemon holds the lock of this spool or state folder."""


class JobFileError(ComfydError):
    """A dropped file is no job we can run; *message* tells its owner what to do."""

    def __init__(self, message: str, *, reason: str = "invalid_job") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class ServerError(ComfydError):
    """A server or the network failed. Proves nothing about any job."""


class ServerRefused(ServerError):
    """The connection was refused: no byte of the request was sent."""


class ServerUnreachable(ServerError):
    """No complete answer came: what the server did with the request is unknown.

    Args:
      sent: Whether any byte of the request may have reached the server.

    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class ServerStatus(ServerError):
    """The server (or a proxy before it) answered with an unexpected HTTP status.

    Args:
      status: The HTTP status code.
      body: The start of the body as text, for people; never logged.
      retry_after_s: What a Retry-After header asked for, in seconds.

    """

    def __init__(self, status: int, body: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s


class ServerProtocol(ServerError):
    """A complete answer that does not decode to what ComfyUI's protocol allows."""


class AnswerTooLong(ServerProtocol):
    """An answer that is, or says that it will be, longer than it may be."""


class DiskFull(ComfydError):
    """A write was refused (disk full, over quota, read-only) and undone; try again later."""


class JournalError(ComfydError):
    """The journal cannot be trusted any more: stop, let a restart re-read it."""


class JournalDamaged(JournalError):
    """The journal's content is not what was written: truncated, overwritten, a part missing.

    Args:
      path: The journal.
      finding: What is wrong with it, in a few words.

    """

    def __init__(self, path: Path, finding: str) -> None:
        super().__init__(
            f"{path}: the journal is damaged ({finding}). At its next start the daemon moves it"
            " aside and builds a new one from the spool's folders and the servers: results stay as"
            " they are, claimed jobs go on. Or put a snapshot in its place before"
        )
        self.finding = finding


class JournalTooNew(JournalError):
    """The journal's schema is newer than this program's; nothing was touched."""


class ProtocolViolation(ComfydError):
    """A fact that the state table does not allow: a bug, never an external event."""
