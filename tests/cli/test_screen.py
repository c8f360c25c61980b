"""How things look, on a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from comfyd.cli.follow import Followed, Follower
from comfyd.cli.jobs import listed, phrase
from comfyd.cli.progress import shown
from comfyd.cli.screen import Table, counted, lines_of, plain, put, size, span, tone
from comfyd.cli.status import parts
from comfyd.core.model import JobId, Row
from comfyd.core.present import job_summary
from comfyd.core.snapshot import JobView, ServerState, ServerView, Snapshot
from comfyd.spool.layout import Spool
from tests.cli.conftest import Site

EVIL = "a\x1b[31m\u202eb\n\x9b1mc\x00d\ud800e"


class Terminal(io.StringIO):
    """A screen that keeps what was written on it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def on(screen: Terminal, *parts: str | Table) -> str:
    """What ``put`` writes on *screen*; pytest's own capture is set up again after fixtures."""
    with contextlib.redirect_stdout(screen):
        put(*parts)
    return screen.getvalue()


def test_what_is_shown_is_one_inert_line():
    assert plain(EVIL) == "a�[31m�b �1mc�d�e"
    assert plain(None) == ""
    assert plain("Grüße, 日本") == "Grüße, 日本"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.04, "0.0 s"),
        (89.9, "89.9 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "2 h"),
        (172799, "48 h"),
        (172800, "2 d"),
    ],
)
def test_spans(seconds: float | None, text: str):
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, ""), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes(count: int | None, text: str):
    assert size(count) == text


def test_huge_sizes_stay_in_the_largest_unit():
    assert size(1 << 60) == "1048576.0 TiB"


def test_counts():
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_tones():
    assert [tone(word) for word in ("done", "failed", "deaf", "queued")] == [
        "green",
        "red",
        "yellow",
        "",
    ]


def test_a_table_in_a_pipe_is_aligned_and_inert():
    table = Table(("JOB", "STATE", "WHY"), [("a", "failed", EVIL), ("long-name", "up", "")])
    assert list(lines_of(table)) == [
        "JOB        STATE   WHY",
        "a          failed  a�[31m�b �1mc�d�e",
        "long-name  up",
    ]


def test_a_table_without_rows_is_its_heads():
    assert list(lines_of(Table(("A", "B"), []))) == ["A  B"]


def test_a_terminal_gets_colour_but_no_control_of_it(terminal: Terminal):
    table = Table(("JOB", "STATE", ""), [("[red]x[/]", "done", EVIL)])
    written = on(terminal, "plain [bold]text[/bold]", table)
    assert "\x1b[32mdone" in written
    assert "[red]x[/]" in written
    assert "[bold]text[/bold]" in written
    assert "�[31m" in written
    assert "\u202e" not in written
    assert "\x9b" not in written


def test_no_color_leaves_the_table(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    written = on(terminal, Table(("JOB", "STATE"), [("x", "done")]))
    assert "─" in written
    assert "\x1b[3" not in written


def test_a_dumb_terminal_gets_plain_text(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    written = on(terminal, Table(("JOB", "STATE"), [("x", "done")]))
    assert written == "JOB  STATE\nx    done\n"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_narrow_terminal_never_cuts_a_job_id(
    width: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    job = JobId("portrait.01K0000000000000000000000A")
    row = Row(job=job, seq=1, held="A sentence about why this is so.")
    written = on(terminal, listed([job_summary(row)]))
    assert job in written
    assert "queued" in written
    bare = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert max(map(len, bare.splitlines())) <= width or width == 40


# --- status --------------------------------------------------------------------------------------


def status_lines(snapshot: Snapshot) -> str:
    return "\n".join(line for part in parts(snapshot.to_dict()) for line in lines_of(part))


def server(state: ServerState, reason: str = "") -> ServerView:
    return ServerView(name="gpu", url="http://me:pw@gpu:8188", state=state, reason=reason, stale=2)


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        (ServerState.UP, "", "up"),
        (ServerState.DOWN, "", "does not answer"),
        (ServerState.DOWN, "connection refused", "connection refused"),
        (ServerState.DEAF, "", "it is polled"),
        (ServerState.WEDGED, "", "nothing more is sent"),
        (ServerState.DRAINING, "", "gets nothing more"),
    ],
)
def test_a_server_is_told_in_words(state: ServerState, reason: str, told: str):
    text = status_lines(Snapshot(at=1.0, version="1", servers=(server(state, reason),)))
    assert told in text
    assert state.value in text
    assert "pw" not in text


def test_status_tells_what_needs_attention():
    jobs = tuple(
        JobView(job=f"j{n}", state="running", server="gpu", prompt_id="p", attempt=1, since=0.0)
        for n in range(30)
    )
    text = status_lines(
        Snapshot(
            at=100.0,
            version="1",
            started_at=0.0,
            paused=True,
            waiting="Waiting for space.",
            servers=(server(ServerState.UP),),
            counts={"queued": 3, "held": 0},
            oldest_at={"queued": 10.0, "submitted": None},
            jobs=jobs,
            more=5,
            free_bytes=1 << 30,
        )
    )
    for told in (
        "comfyd 1, up 2 min, 1.0 GiB free",
        "jobs: 3 queued\n",
        "oldest queued job: 2 min",
        "stale: 2 jobs silent for too long",
        "intake is paused",
        "Waiting for space.",
        "and 15 more at hand",
    ):
        assert told in text
    assert "oldest submitted" not in text


def test_watching_goes_on_until_told(site: Site, monkeypatch: pytest.MonkeyPatch):
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("comfyd.cli.status.time.sleep", sleep)
    code, out, err = site("status", "--watch")
    assert code == 0
    assert out.count("jobs: none yet") == 3
    assert err.count("not running") <= 3


def test_watching_on_a_terminal_redraws(
    site: Site, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("comfyd.cli.status.time.sleep", sleep)
    with contextlib.redirect_stdout(terminal):
        assert site("status", "--watch")[0] == 0
    written = terminal.getvalue()
    assert "\x1b[?1049h" in written
    assert written.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in written
    assert "not running" in written


# --- progress ------------------------------------------------------------------------------------


def follower(site: Site, count: int = 3) -> Follower:
    return Follower.of(Spool(site.home / "spool"), [f"job{n}" for n in range(count)])


def test_a_pipe_gets_a_line_for_each_change_or_each_end(site: Site):
    for changes, expected in (
        (True, ["job0: running on sim", "job0: done in 1.0 s, 1 file"]),
        (False, ["job0: done in 1.0 s, 1 file"]),
    ):
        stream, jobs = io.StringIO(), follower(site)
        with shown(stream, changes=changes) as show:
            show.update(jobs)
            jobs.hear({"at_hand": [{"job": "job0", "state": "running", "server": "sim"}]})
            show.update(jobs)
            show.update(jobs)
            jobs.jobs["job0"] = Followed(
                "job0", "done", total_s=1.0, outputs=1, folder=site.spool.done
            )
            show.update(jobs)
        assert stream.getvalue().splitlines() == expected


def test_a_terminal_gets_a_table_and_a_bar(site: Site, terminal: Terminal):
    jobs = follower(site)
    with shown(terminal, changes=True) as show:
        show.update(jobs)
        jobs.jobs["job0"] = Followed("job0", "failed", message="[red]no" + EVIL)
        show.update(jobs)
    written = terminal.getvalue()
    assert "1 of 3 ended, 1 failed" in written
    assert "[red]no" in written
    assert "\u202e" not in written


def test_more_jobs_than_lines_show_what_moves(site: Site, terminal: Terminal):
    jobs = follower(site, 500)
    jobs.hear({"at_hand": [{"job": "job444", "state": "running", "server": "sim"}]})
    jobs.jobs["job333"] = Followed("job333", "failed")
    with shown(terminal, changes=True) as show:
        show.update(jobs)
    written = terminal.getvalue()
    assert "job444" in written
    assert "job333" in written
    assert written.count("job") < 40


def test_missing_jobs_are_asked_for_in_turn(site: Site):
    jobs = follower(site, 5)
    asked = [[each.job for each in jobs.missing(2)] for _ in range(3)]
    assert sorted({job for some in asked for job in some}) == [f"job{n}" for n in range(5)]
    jobs.jobs.clear()
    assert jobs.missing(2) == []


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("claimed", {"payload": "x.json", "invalid": True}, "claimed as x.json, no valid job"),
        ("accepted", {"number": 1, "server": "sim"}, "accepted on sim"),
        ("signal", {"sign": "ending"}, "signal: ending"),
        ("fetched", {"outputs": 0, "bytes": 0}, "put together, nothing to download"),
        ("finished", {"outcome": "failed", "reason": "lost"}, "failed: lost"),
        ("moved", {}, "moved"),
        ("audit", {"verdict": "unknown", "reason": "500"}, "audit: unknown (500)"),
        (
            "retry",
            {"operation": "submit", "reason": "refused"},
            "submit to be tried again: refused",
        ),
        (
            "retry",
            {"operation": "upload", "reason": "status", "said": "HTTP status 500", "server": "a"},
            "upload to be tried again: status on a (HTTP status 500)",
        ),
        (
            "charged",
            {"charged": 1, "reason": "turned_away", "server": "a"},
            "charged on a: it took others, and not this one",
        ),
        ("charged", {"charged": 1, "reason": "stalled", "server": "a"}, "charged on a: stalled"),
    ],
)
def test_events_in_words(kind: str, data: dict[str, object], words: str):
    assert phrase(kind, data) == words
