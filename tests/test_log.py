"""Lines of the log: one an event, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from comfyd import log
from comfyd.config import Secret

NOWHERE = Path("/nowhere/journal")  # or the tests would write to the journal of whoever runs them


@pytest.fixture(autouse=True)
def _restore():
    """Each test leaves logging as it was."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers[:] = handlers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(format_: str, event: str, level: str = "info", **fields: object) -> str:
    """The one line that an event becomes."""
    stream = io.StringIO()
    log.configure("debug", format_, stream=stream, journal=NOWHERE)
    getattr(log.get_logger("comfyd.test"), level)(event, **fields)
    line = stream.getvalue()
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    return line[:-1]


def test_logfmt():
    line = told("logfmt", "job_claimed", job="a.1", note="two words", n=3, s=0.5, ok=True, no=None)
    time, _, rest = line.partition(" ")
    assert time.startswith("ts=20")
    assert time.endswith("Z")
    assert rest == (
        "level=info logger=comfyd.test event=job_claimed"
        ' job=a.1 note="two words" n=3 s=0.5 ok=true no=null'
    )


def test_json():
    fields = json.loads(told("json", "odd", "warning", nan=float("nan"), of=["a", 1], key={1: "x"}))
    assert fields.pop("ts")
    assert fields == {
        "level": "warning",
        "logger": "comfyd.test",
        "event": "odd",
        "nan": "nan",
        "of": '["a", 1]',
        "key": '{"1": "x"}',
    }


@pytest.mark.parametrize(
    ("level", "number"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_journald_gets_a_priority_and_no_time(level, number):
    assert told("journald", "x", level) == f"<{number}>logger=comfyd.test event=x"


def test_console_is_short():
    line = told("console", "job_claimed", job="a.1")
    assert line[2] == line[5] == ":"
    assert line[8:] == " info    job_claimed  job=a.1"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(no_color, coloured, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    log.configure("info", "console", stream=stream)
    log.get_logger("x").info("event")
    assert ("\x1b[" in stream.getvalue()) is coloured


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("", '""'),
        ('say "hi"', r'"say \"hi\""'),
        ("a\nlevel=error", r'"a\nlevel=error"'),
        ("\x1b[2J", r'"\x1b[2J"'),
        ("C:\\new", r'"C:\\new"'),
        ("\u202eevil\u2028", r'"\u202eevil\u2028"'),
        ("\x9b\x00", r'"\x9b\x00"'),
        ("été", "été"),
        ("\ud800", r'"\ud800"'),
        (Secret("hunter2"), "***"),
        (b"\n", r'"b\'\\n\'"'.replace(r"\'", "'")),
        (ValueError("no\nno"), r'"no\nno"'),
    ],
)
def test_values_cannot_break_out_of_their_line(value, written):
    assert told("journald", "x", v=value) == f"<6>logger=comfyd.test event=x v={written}"


@given(
    text=st.text(st.characters()),
    format_=st.sampled_from(["logfmt", "json", "journald", "console"]),
)
def test_whatever_is_told_is_one_printable_line(text, format_):
    assert told(format_, text, value=text, of=[text]).isprintable()


def test_names_of_fields_cannot_break_out_either():
    fields: dict[str, Any] = {"a b\n": 1}
    assert told("journald", "x", **fields) == "<6>logger=comfyd.test event=x a_b_=1"


def test_long_values_are_cut():
    line = told("logfmt", "x", v="y" * 100_000)
    assert len(line) < 5000
    assert "(100000 characters)" in line


def test_an_exception_is_one_line_too():
    stream = io.StringIO()
    log.configure("info", "logfmt", stream=stream)
    try:
        raise ExceptionGroup("both\n", [ValueError("one"), OSError("two")])
    except ExceptionGroup:
        log.get_logger("x").exception("failed")
    [line] = stream.getvalue().splitlines()
    assert "level=error" in line
    assert r"ValueError: one\n" in line


def test_what_is_below_the_level_is_not_told():
    stream = io.StringIO()
    log.configure("warning", "logfmt", stream=stream)
    log.get_logger("x").info("no")
    logging.getLogger("x").info("no")
    assert stream.getvalue() == ""
    log.get_logger("x").warning("yes")
    assert "event=yes" in stream.getvalue()


def test_loggers_made_before_follow_the_set_up():
    logger = log.get_logger("early")
    assert "event=x" in told("logfmt", "x")
    stream = io.StringIO()
    log.configure("info", "json", stream=stream)
    logger.info("late")
    assert json.loads(stream.getvalue())["logger"] == "early"


def test_the_standard_library_comes_out_the_same_way():
    log.configure("info", "logfmt", stream=io.StringIO())
    stream = io.StringIO()
    log.configure(
        "info", "journald", stream=stream, journal=NOWHERE
    )  # twice set up, still told once
    logging.getLogger("lib").warning("slow: %s\n", 3)
    logging.getLogger("lib").log(25, "odd level")
    logging.getLogger("httpx").info("GET /")
    assert stream.getvalue().splitlines() == [
        r'<4>logger=lib event="slow: 3\n"',
        '<6>logger=lib event="odd level"',
    ]


def test_a_library_with_a_wrong_format_is_told_as_it_is():
    logging.getLogger().handlers.clear()  # pytest's own would raise
    stream = io.StringIO()
    log.configure("info", "journald", stream=stream)
    logging.getLogger("lib").error("%d", "no number")
    assert stream.getvalue() == "<3>logger=lib event=%d\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_a_log_that_cannot_be_written_stops_nothing(error):
    class Broken(io.StringIO):
        calls = 0

        def write(self, text: str) -> int:
            Broken.calls += 1
            raise error

    log.configure("info", "logfmt", stream=Broken())
    log.get_logger("x").info("event")
    assert Broken.calls == 1


def test_a_narrow_encoding_is_no_error():
    raw = io.BytesIO()
    log.configure("info", "journald", stream=io.TextIOWrapper(raw, "ascii"), journal=NOWHERE)
    log.get_logger("x").info("été")
    assert raw.getvalue() == rb"<6>logger=x event=\xe9t\xe9" + b"\n"


def test_auto_looks_where_lines_go(tmp_path, monkeypatch):
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    path = tmp_path / "log"
    with path.open("w") as stream:
        log.configure("info", "auto", stream=stream)
        log.get_logger("x").info("one")
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.configure("info", "auto", stream=stream, journal=NOWHERE)
        log.get_logger("x").info("two")
    one, two = path.read_text().splitlines()
    assert one.startswith("ts=")
    assert two == "<6>logger=x event=two"

    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream, open(ours, "rb", buffering=0) as terminal:
        log.configure("info", "auto", stream=stream)
        log.get_logger("x").info("three")
        assert b" info    three" in terminal.read(1000)


def test_stderr_is_where_lines_go(capsys):
    log.configure("info", "auto")
    log.get_logger("x").info("event")
    out, err = capsys.readouterr()
    assert out == ""
    assert "event=event" in err


class Journald:
    """A journal that reads what it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def entry(self) -> dict[str, str]:
        """The next entry; fails on one that is not in the simple form of the native protocol."""
        lines = self.socket.recv(2**20).decode().split("\n")
        assert lines.pop() == ""
        fields = dict(line.split("=", 1) for line in lines)
        assert len(fields) == len(lines)
        for name in fields:  # any other is dropped: systemd.journal-fields(7), sd_journal_print(3)
            assert re.fullmatch("[A-Z][A-Z0-9_]{0,63}", name)
        return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    one = Journald(tmp_path / "journal")
    yield one
    one.socket.close()


def test_the_journal_gets_fields(journald):
    stream = io.StringIO()
    log.configure("info", "journald", stream=stream, journal=journald.path)
    about = {"job": "a.1", "server": "s", "prompt": "p", "missed": None}
    log.get_logger("comfyd.jobs").warning("job_ended", **about, total_s=0.5, ok=True)
    assert journald.entry() == {
        "MESSAGE": "job_ended job=a.1 server=s prompt=p missed=null total_s=0.5 ok=true",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "comfyd",
        "COMFYD_LOGGER": "comfyd.jobs",
        "COMFYD_EVENT": "job_ended",
        "COMFYD_JOB": "a.1",
        "COMFYD_SERVER": "s",
        "COMFYD_PROMPT": "p",
        "COMFYD_TOTAL_S": "0.5",
        "COMFYD_OK": "true",
    }
    logging.getLogger("lib").error("slow")
    assert journald.entry()["MESSAGE"] == "slow"
    assert stream.getvalue() == ""


def test_nothing_breaks_out_of_its_field_in_the_journal(journald):
    log.configure("info", "journald", stream=io.StringIO(), journal=journald.path)
    evil = "x\nPRIORITY=0\nMESSAGE=\x1b[2J\ud800"
    fields: dict[str, Any] = {evil: evil, "a" * 100: "long", "priority": 0, "message": "m"}
    log.get_logger("x").info(evil, **fields)
    entry = journald.entry()
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"].isprintable()
    assert entry["COMFYD_EVENT"] == r"x\nPRIORITY=0\nMESSAGE=\x1b[2J\ud800"
    assert entry["COMFYD_X_PRIORITY_0_MESSAGE___2J_"] == entry["COMFYD_EVENT"]
    assert entry["COMFYD_PRIORITY"] == "0"


def test_the_largest_event_fits_into_the_journal(journald):
    log.configure("info", "journald", stream=io.StringIO(), journal=journald.path)
    try:
        raise ValueError("\n" * 100_000)
    except ValueError:
        log.get_logger("x").exception("failed", **{f"v{n}": "é" * 100_000 for n in range(6)})
    entry = journald.entry()
    assert entry["COMFYD_V5"].endswith("(100000 characters)")
    assert len(entry["COMFYD_V5"]) < 5000
    assert "characters)" in entry["COMFYD_EXCEPTION"]


def test_a_journal_that_takes_nothing_gets_it_by_way_of_stderr(journald):
    stream = io.StringIO()
    log.configure("info", "journald", stream=stream, journal=journald.path)
    logger = log.get_logger("x")
    for number in range(2000):  # nobody reads: its queue is full some time, and we do not wait
        logger.info("event", n=number)
    lines = stream.getvalue().splitlines()
    assert lines
    assert lines[-1] == "<6>logger=x event=event n=1999"
    read = 2000 - len(lines)
    assert [journald.entry()["COMFYD_N"] for _ in range(read)] == [str(n) for n in range(read)]
    logger.info("again")
    assert journald.entry()["MESSAGE"] == "again"
    journald.socket.close()  # it restarts
    logger.info("gone")
    assert stream.getvalue().endswith("event=gone\n")


class TestRateLimiter:
    def test_one_passes_in_every_interval_and_tells_of_the_others(self):
        limiter = log.RateLimiter(10)
        assert [limiter.allow("a", now) for now in (5, 5, 14.9, 15, 24, 40)] == [
            0, None, None, 2, None, 1,
        ]  # fmt: skip

    def test_keys_do_not_disturb_each_other(self):
        limiter = log.RateLimiter(10)
        assert [limiter.allow(key, 0) for key in "aabb"] == [0, None, 0, None]

    def test_the_first_moment_of_a_clock_counts(self):
        assert log.RateLimiter(10).allow("a", -5) == 0

    def test_keys_are_bounded_and_the_oldest_goes(self):
        limiter = log.RateLimiter(10, max_keys=2)
        assert [limiter.allow(key, 0) for key in "abac"] == [0, 0, None, 0]
        assert limiter.allow("b", 1) is None
        assert limiter.allow("a", 1) == 0
