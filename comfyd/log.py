"""Logging: every event is one line on stderr, or one entry of the journal, for whoever reads it.

Events are named in lower_case with fields: ``log.info("job_claimed", job=job)``; docs/logs.md lists
them. What the standard library's logging is told (by libraries, mostly) comes out the same way.
Whatever a value holds, it neither starts a new line nor reaches a terminal as a control sequence.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger

Event = MutableMapping[str, Any]

JOURNAL: Final = Path("/run/systemd/journal/socket")

# Longer values are cut: journald takes lines of 48 KiB, and a line is for reading.
_MAX_VALUE_CHARS: Final = 4000
_MAX_TRACEBACK_CHARS: Final = 30_000
_MAX_NAME_CHARS: Final = 64  # of a field in the journal; one with a longer name is dropped there

_PRIORITIES: Final = {
    "debug": 7,
    "info": 6,
    "warning": 4,
    "error": 3,
    "critical": 2,
}  # sd-daemon(3)
_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_BARE: Final = re.compile(r'[^\s"=\\]+')
_HEAD: Final = ("ts", "level", "logger", "event")

# These tell of every request at info; ours say it once, with the job.
_CHATTY: Final = ("httpx", "httpcore", "hypercorn")


def configure(
    level: str,
    format: str = "auto",  # noqa: A002
    *,
    stream: TextIO | None = None,
    journal: Path = JOURNAL,
) -> None:
    """Set up logging for the whole process; may be called again.

    Args:
      level: ``debug``, ``info``, ``warning`` or ``error``: what is below it is not told.
      format: ``logfmt``, ``json``, ``journald`` (fields of their own in systemd's journal),
        ``console`` (for people) or ``auto``: journald if *stream* leads there, console if it is a
        terminal, else logfmt.
      stream: Where lines go; stderr as it is now if None.
      journal: The journal's socket. While it takes nothing, lines go to *stream*, in logfmt with a
        priority.

    """
    target = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    if format == "auto":
        format = _fitting_format(target, os.environ)  # noqa: A001
    lines = _Lines(target)
    sink = _Journal(lines, journal) if format == "journald" else lines
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _RENDERERS[format](target),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *names: _Logger(sink, names[0] if names else "comfyd"),
        cache_logger_on_first_use=False,  # loggers made at import follow a later configure()
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward())
    root.setLevel(number)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger *name*, such as ``comfyd.tracker``; every line says it."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))


class RateLimiter:
    """Lets one event a key pass in every *every_s* seconds, and counts the others.

    Args:
      every_s: Seconds above zero.
      max_keys: Keys remembered; beyond it the one that passed longest ago is forgotten.

    """

    def __init__(self, every_s: float, *, max_keys: int = 1000) -> None:
        self._every_s = every_s
        self._max_keys = max_keys
        self._seen: dict[str, tuple[float, int]] = {}  # key: (when it passed, held back since)

    def allow(self, key: str, now_s: float) -> int | None:
        """Whether an event of *key* may be told at *now_s*, on any clock that does not run back.

        Returns:
          None if not; else how many of its like were held back since the last one.

        """
        passed_s, held_back = self._seen.get(key, (-math.inf, 0))
        if now_s - passed_s < self._every_s:
            self._seen[key] = (passed_s, held_back + 1)
            return None
        self._seen.pop(key, None)  # the order of the dict is that of passing
        if len(self._seen) >= self._max_keys:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now_s, 0)
        return held_back


class _Lines:
    """Writes whole lines to one stream, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more, or the disk is full. There is nowhere left to say so, and
                # jobs must not stop for want of a reader.
                return


class _Journal:
    """Writes entries to systemd's journal in its native protocol: one datagram each."""

    def __init__(self, lines: _Lines, path: Path) -> None:
        self._lines = lines
        self._path = str(path)

    def write(self, fields: Mapping[str, Any]) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(entry(fields), self._path)
        except OSError:  # it restarts, is busy, or is not there: stderr leads to it as well
            self._lines.write(_prioritised(fields))


def entry(fields: Mapping[str, Any]) -> bytes:
    """An event's *fields* as a journal entry (systemd's "Native Journal Protocol").

    Our own fields are ``COMFYD_...``: the names without a prefix mean something to the journal. No
    value needs the binary form, for escaped ones are one line each.
    """
    rest = dict(fields)
    level, logger, event = rest.pop("level"), rest.pop("logger"), rest.pop("event")
    # Everything is there as a field too: the message is for reading, and a datagram holds 200 KiB.
    trace = {key: rest[key] for key in rest if key == "exception"}
    words = [event, _logfmt({key: rest[key] for key in rest if key not in trace})]
    message = _cut(" ".join(filter(None, words)), _MAX_VALUE_CHARS)
    told = {
        "MESSAGE": " ".join(filter(None, [message, _logfmt(trace)])),
        "PRIORITY": _PRIORITIES[level],
        "SYSLOG_IDENTIFIER": "comfyd",
        "COMFYD_LOGGER": logger,
        "COMFYD_EVENT": event,
    } | {_journal_name(key): value for key, value in rest.items() if value is not None}
    lines = (f"{name}={escape(_text(value))}\n" for name, value in told.items())
    return "".join(lines).encode("utf-8", "backslashreplace")


def _journal_name(key: str) -> str:
    return f"COMFYD_{re.sub(r'[^A-Z0-9_]', '_', key.upper())}"[:_MAX_NAME_CHARS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Logger:
    """One name over a sink; structlog calls the method named after the level."""

    def __init__(self, sink: _Lines | _Journal, name: str) -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = sink.write


class _Forward(logging.Handler):
    """Passes the standard library's records on to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit their format, in any library
            message = str(record.msg)
        number = max(10, min(50, record.levelno // 10 * 10))  # libraries make levels of their own
        get_logger(record.name).log(number, message, exc_info=record.exc_info)


def _fitting_format(stream: TextIO, environ: Mapping[str, str]) -> str:
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file at all, or closed
        return "logfmt"
    if environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":  # systemd.exec(5)
        return "journald"
    return "console" if stream.isatty() else "logfmt"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def escape(text: str) -> str:
    """*text* with everything that does not print as one visible character spelled out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _plain(value: Any) -> Any:
    """*value* as JSON can hold it, cut to what a line may carry."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, default=str, skipkeys=True, ensure_ascii=False)
    return _cut(str(value), _MAX_VALUE_CHARS)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _fields(logger: _Logger, event: Event) -> dict[str, Any]:
    """The event's fields in their order, those that every line has first."""
    head = {"level": event["level"], "logger": logger.name, "event": str(event["event"])}
    rest = {key: _plain(value) for key, value in event.items() if key not in (*_HEAD, "exception")}
    if "exception" in event:
        rest["exception"] = _cut(str(event["exception"]), _MAX_TRACEBACK_CHARS)
    return head | rest


def _word(value: Any) -> str:
    """One logfmt value."""
    if not isinstance(value, str):
        return json.dumps(value)
    if _BARE.fullmatch(value) and value.isprintable():
        return value
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escape(quoted)}"'


def _logfmt(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{re.sub(r'[^A-Za-z0-9_.]', '_', key)}={_word(fields[key])}" for key in fields)


# What is handed to the sink: a line, or (as arguments, structlog's way) the fields themselves.
Rendered = str | tuple[tuple[dict[str, Any]], dict[str, Any]]
Renderer = Callable[[_Logger, str, Event], Rendered]


def _logfmt_renderer(stream: TextIO) -> Renderer:
    return lambda logger, _, event: _logfmt({"ts": _now()} | _fields(logger, event))


def _json_renderer(stream: TextIO) -> Renderer:
    return lambda logger, _, event: json.dumps({"ts": _now()} | _fields(logger, event))


def _journald_renderer(stream: TextIO) -> Renderer:
    return lambda logger, _, event: ((_fields(logger, event),), {})


def _prioritised(fields: Mapping[str, Any]) -> str:
    """A line for a journal that reads our stderr: see sd-daemon(3)."""
    rest = {key: value for key, value in fields.items() if key != "level"}
    return f"<{_PRIORITIES[fields['level']]}>{_logfmt(rest)}"


def _console_renderer(stream: TextIO) -> Renderer:
    coloured = stream.isatty() and not os.environ.get("NO_COLOR")

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if coloured else text

    def render(logger: _Logger, _: str, event: Event) -> str:
        fields = _fields(logger, event)
        level, _name, what = fields.pop("level"), fields.pop("logger"), fields.pop("event")
        clock = datetime.now().astimezone().strftime("%H:%M:%S")
        head = f"{paint('2', clock)} {paint(_COLOURS[level], f'{level:<7}')} "
        return head + paint("1", escape(what)) + (f"  {_logfmt(fields)}" if fields else "")

    return render


_RENDERERS: Final = {
    "logfmt": _logfmt_renderer,
    "json": _json_renderer,
    "journald": _journald_renderer,
    "console": _console_renderer,
}
