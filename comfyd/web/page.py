"""``/``: the status page for people.

Whole without JavaScript: a browser that runs none loads it again every REFRESH_S. One that runs it
puts the news in place (page.js). Names come from files and servers, so every one is escaped,
stripped of control and direction characters, and set apart (``<bdi>``); the policy of the page
allows nothing but its own style and script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from comfyd.core.attention import FAILED_MAX, Need, needs
from comfyd.core.model import Row, State
from comfyd.core.present import SHOWN_STATES, job_summary
from comfyd.core.snapshot import Snapshot
from comfyd.web.api import Reads

JOBS: Final = 50  # at hand: more would be a long page, fetched every two seconds
RECENT: Final = 10  # of each: failures, results, held jobs
REFUSED: Final = "refused by every server that works now: waits for another"
REFRESH_S: Final = 10
NAME_MAX: Final = 200

STYLE: Final = files("comfyd.web").joinpath("page.css").read_text("utf-8")
SCRIPT: Final = files("comfyd.web").joinpath("page.js").read_text("utf-8")
_ICON: Final = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Ccircle cx='8' cy='8' r='7' fill='%233d63dd'/%3E"
    "%3Cpath d='M5 8l2.2 2.2L11.2 6' fill='none' stroke='white' stroke-width='1.8'/%3E%3C/svg%3E"
)


def _hash(source: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


POLICY: Final = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)};"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

_KINDS: Final = {
    **dict.fromkeys(("up", "done"), "good"),
    **dict.fromkeys(("running", "collecting", "publishing"), "busy"),
    **dict.fromkeys(("down", "wedged", "failed"), "bad"),
    **dict.fromkeys(("deaf", "held", "draining", "stopping"), "odd"),
}
_ULID: Final = re.compile(r"(.+)(\.[0-9A-HJKMNP-TV-Z]{26})")
_MISSED: Final = {
    "disconnected": "the connection was down",
    "deaf": "the connection heard nothing",
    "silent": "it was not sent",
}
_FOUND: Final = {
    "reconnect": "on reconnecting",
    "audit": "by the auditor",
    "recovery": "at the start",
    "signal": "",
}


def text(value: object) -> str:
    """*value* as inert HTML text: nothing in it is markup, hidden, or turns the line around."""
    said = "" if value is None else str(value)
    if len(said) > NAME_MAX:
        said = said[: NAME_MAX - 1] + "…"
    if not said.isprintable():
        said = "".join("�" if unicodedata.category(c)[0] == "C" else c for c in said)
    return html.escape(said)


def span(seconds: float | None) -> str:
    """*seconds* for people: ``4.2 s``, ``3 min``, ``2 h``, ``5 d``; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.1f} s"
    for unit, size_s, limit in (("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def whole(seconds: float | None) -> str:
    """As `span`, without a fraction."""
    return f"{seconds:.0f} s" if seconds is not None and seconds < 90 else span(seconds)


def about(seconds: float | None) -> str:
    """A guess at *seconds*, no more exact than it is; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 2.5:
        return "a moment"
    if seconds < 90:
        return f"{5 * max(1, round(seconds / 5))} s"
    return span(seconds)


def size(count: int | None) -> str:
    """*count* bytes in GiB."""
    return "" if count is None else f"{count / 2**30:.1f} GiB"


def _name(value: object) -> str:
    return "" if value is None else f"<bdi>{text(value)}</bdi>"


def _state(state: str) -> str:
    return f'<span class="state {_KINDS.get(state, "idle")}">{text(state)}</span>'


def _job(job: str) -> str:
    """A link to the job's story; the part of its id that only makes it unique is set back."""
    parts = _ULID.fullmatch(job) if len(job) <= NAME_MAX else None
    shown = _name(job)
    if parts is not None:
        shown = f'<bdi>{text(parts[1])}<span class="id">{text(parts[2])}</span></bdi>'
    return f'<a href="/api/v1/jobs/{quote(job, safe="")}">{shown}</a>'


def _small(words: str, kind: str = "") -> str:
    """A second line in a cell; nothing for no *words*, which are HTML already."""
    mark = f' class="{kind}"' if kind else ""
    return f"<small{mark}>{words}</small>" if words else ""


def _ago(at: str | None, now: float, then: float | None) -> str:
    if at is None or then is None:
        return ""
    return (
        f'<time datetime="{text(at)}" title="{text(at)}">{whole(max(0.0, now - then))} ago</time>'
    )


class Column(NamedTuple):
    """Attributes:

    kind: n for what stays on one line, job for what names the row (on a phone, the head of its
      card), grow for what takes the room that is left.
    """

    head: str
    kind: str = ""


def _table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already. The roles outlive its look on a phone."""
    head = "".join(f'<th role="columnheader" scope="col">{text(c.head)}</th>' for c in columns)
    body = "".join(
        '<tr role="row">'
        + "".join(
            _cell(column, cell, first=not i)
            for i, (column, cell) in enumerate(zip(columns, row, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<table role="table"><thead role="rowgroup"><tr role="row">'
        f'{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def _cell(column: Column, cell: str, *, first: bool) -> str:
    kind = f' class="{column.kind}"' if column.kind else ""
    label = "" if first else f' data-is="{text(column.head)}"'
    return f'<td role="cell"{kind}{label}>{cell and f"<div>{cell}</div>"}</td>'


def _section(
    part: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    none: str = "",
    aside: str = "",
    more: str = "",
) -> str:
    """One part of the page: its table, or the sentence *none*; hidden where there is neither."""
    beside = f"<small>{aside}</small>" if aside else ""
    body = _table(columns, rows) if rows else f"<p>{none}</p>"
    hidden = "" if rows or none else " hidden"
    last = f'<p class="more">{more}</p>' if more else ""
    return (
        f'<section id="{part}" data-part{hidden}><h2><span>{text(title)}</span>{beside}</h2>'
        f"{body}{last}</section>"
    )


# --- its parts -----------------------------------------------------------------------------------


def _verdict(found: Sequence[Need], status: dict[str, Any]) -> str:
    counts = status["jobs"]
    busy = sum(counts[state] for state in ("submitting", "submitted", "running", "stopping"))
    words = [f"{busy} on servers" if busy else "", f"{counts['queued']} queued"]
    doing = ", ".join(filter(None, words)) if busy or counts["queued"] else "Nothing to do"
    if status["ready_s"] and (busy or counts["queued"]):
        doing += f"; all of it in about {about(status['ready_s'])} at the recent pace"
    if not found:
        kind, said, listed = "", "Everything is fine.", ""
    else:
        kind = "needs"
        said = "1 thing needs you." if len(found) == 1 else f"{len(found)} things need you."
        items = "".join(
            f'<li><a href="#{need.where}">{_name(need.what)}</a></li>' for need in found
        )
        listed = f"<ul>{items}</ul>"
    return (
        f'<div id="verdict" data-part class="verdict {kind}" role="status">'
        f"<strong>{said}</strong>{listed}<p>{text(doing)}.</p></div>"
    )


def _counts(counts: dict[str, int]) -> str:
    shown = (
        ("Running", counts["running"], ""),
        ("Sent", counts["submitting"] + counts["submitted"] + counts["stopping"], ""),
        ("Collecting", counts["collecting"] + counts["publishing"], ""),
        ("Queued", counts["queued"], ""),
        ("Held", counts["held"], "bad"),
        ("Done", counts["done"], ""),
        ("Failed", counts["failed"], ""),
    )
    tiles = "".join(
        f'<div class="{kind if count else "nil"}"><dt>{head}</dt><dd>{count:,}</dd></div>'
        for head, count, kind in shown
    )
    return f'<dl id="counts" data-part class="counts">{tiles}</dl>'


def _servers(status: dict[str, Any]) -> str:
    runs: dict[str, list[dict[str, Any]]] = {}
    for job in status["at_hand"]:
        if job["state"] == "running":
            runs.setdefault(job["server"], []).append(job)
    rows = [
        (
            f"<strong>{_name(server['name'])}</strong>"
            + _small(text(f"ComfyUI {server['version']}" if server["version"] else "")),
            _state(server["state"])
            + _small(_name(server["reason"]) if server["reason"] else "")
            + _small(_deafness(server)),
            "".join(
                f"<div>{_job(job['job'])}{_small(_node(job['progress']))}</div>"
                for job in runs.get(server["name"], [])
            )
            or '<span class="soft">nothing</span>',
            f"{server['in_flight']} of {server['window']}",
            text(server["queue_remaining"]),
            span(server["run_s"]),
            text(server["missed"]),
            "".join(
                f"<div>{size(device['vram_free_bytes'])}"
                + _small(f"of {size(device['vram_total_bytes'])}, {_name(device['name'])}")
                + "</div>"
                for device in server["devices"]
            ),
        )
        for server in status["servers"]
    ]
    columns = (
        Column("Server", "job"), Column("State", "wide"), Column("Runs", "grow"),
        Column("Ours", "n"), Column("Its queue", "n"), Column("A job takes", "n"),
        Column("Missed", "n"), Column("Memory free", "wide"),
    )  # fmt: skip
    up = sum(server["state"] == "up" for server in status["servers"])
    return _section(
        "servers",
        "Servers",
        columns,
        rows,
        none="No server is configured, so nothing can be sent.",
        aside=f"{up} of {len(rows)} up",
    )


def _deafness(server: dict[str, Any]) -> str:
    """That a server which works is not heard; of one that is down nobody expects it."""
    if server["connected"] or server["state"] == "down":
        return ""
    return f"no events, it is polled: {_name(server['tracker'])}"


def _node(progress: dict[str, Any] | None) -> str:
    """The node at work."""
    if progress is None or not progress["name"]:
        return ""
    counted = f" {progress['step']:.0f} of {progress['steps']:.0f}" if progress["steps"] else ""
    return _name(progress["name"]) + counted


def _at_node(progress: dict[str, Any]) -> str:
    """Where in its graph a prompt is."""
    done = (
        f"{progress['nodes_done']} of {progress['nodes']} nodes done" if progress["nodes"] else ""
    )
    return ", ".join(filter(None, [_node(progress), done]))


def _bar(progress: dict[str, Any] | None) -> str:
    if progress is None:
        return ""
    share = progress["share"]
    if share is None and progress["steps"]:
        share = progress["step"] / progress["steps"]
    shown = "" if share is None else f'<progress value="{share:.3f}" max="1">{share:.0%}</progress>'
    return shown + _small(_at_node(progress))


def _jobs(status: dict[str, Any]) -> str:
    running_first = sorted(status["at_hand"], key=lambda job: job["state"] != "running")
    more = status["more"] + len(running_first[JOBS:])
    rows = [
        (
            _job(job["job"]) + _small(f"attempt {job['attempt']}" if job["attempt"] > 1 else ""),
            _state(job["state"]) + _small(f"for {whole(job['for_s'])}"),
            _name(job["server"]),
            (_bar(job["progress"]) if job["state"] == "running" else "")
            + _small(f"silent for {whole(job['silent_s'])}" if job["stale"] else "", "bad"),
            about(job["ready_s"]),
        )
        for job in running_first[:JOBS]
    ]
    columns = (
        Column("Job", "job"), Column("State", "n"), Column("Server", "server"),
        Column("Progress", "grow"),
        Column("Ready in", "n"),
    )  # fmt: skip
    return _section(
        "jobs",
        "At hand",
        columns,
        rows,
        none="No job is on a server.",
        aside="sent, running or being collected",
        more=f"and {more:,} more" if more else "",
    )


def _queue(status: dict[str, Any]) -> str:
    rows = [
        (
            f"{job['position']:,}",
            _job(job["job"])
            + _small(f"priority {job['priority']}" if job["priority"] else "")
            + _small(REFUSED if job["refused"] else ""),
            whole(job["for_s"]),
            about(job["ready_s"]),
        )
        for job in status["queue"]
    ]
    more = max(0, status["jobs"]["queued"] - len(rows))
    columns = (
        Column("#", "n"), Column("Job", "job"), Column("Waits", "n"), Column("Ready in", "n"),
    )  # fmt: skip
    none = "The queue is empty: drop a workflow into new/."
    if more:  # each waits for its next try
        none = "Nothing can be sent at this moment."
    return _section(
        "queue",
        "Queue",
        columns,
        rows,
        none=none,
        aside="next first",
        more=f'and <a href="/api/v1/jobs?state=queued">{more:,} more</a>' if more else "",
    )


def _held(held: Sequence[Row], counts: dict[str, int]) -> str:
    rows = [(_job(row.job), _name(row.held)) for row in held]
    more = max(0, counts["held"] - len(rows))
    return _section(
        "held",
        "Held",
        (Column("Job", "job"), Column("Why", "grow")),
        rows,
        aside="comfyd release JOB, or comfyd cancel JOB",
        more=f'and <a href="/api/v1/jobs?state=held">{more:,} more</a>' if more else "",
    )


def _failed(failed: Sequence[Row], now: float) -> str:
    rows = []
    for row in failed[:RECENT]:
        told = job_summary(row)
        reason = (
            f'<span class="state bad">{text((told["reason"] or "failed").replace("_", " "))}</span>'
        )
        rows.append(
            (
                _job(row.job),
                reason,
                _name(told["message"]),
                _name(row.server),
                _ago(told["times"]["published"], now, row.published_at),
            )
        )
    columns = (
        Column("Job", "job"), Column("Reason", "n"), Column("What happened", "grow told"),
        Column("Server", "server"),
        Column("When", "n"),
    )  # fmt: skip
    return _section(
        "failed",
        "Failures",
        columns,
        rows,
        none="No job has failed.",
        aside="the latest; comfyd retry JOB",
        more='<a href="/api/v1/jobs?state=failed">all failures</a>' if len(failed) > RECENT else "",
    )


def _done(done: Sequence[Row], now: float) -> str:
    rows = []
    for row in done:
        told = job_summary(row)
        found = _FOUND.get(told["completion"] or "", "")
        rows.append(
            (
                _job(row.job) + _small(f"found {found}" if found else "", "odd"),
                _name(row.server),
                span(told["durations_s"]["run"]),
                _ago(told["times"]["published"], now, row.published_at),
            )
        )
    columns = (
        Column("Job", "job"), Column("Server", "server"), Column("Ran", "n"), Column("When", "n"),
    )  # fmt: skip
    return _section("done", "Results", columns, rows, none="No result yet.", aside="the latest")


def _missed(status: dict[str, Any], now: float, ats: Sequence[float]) -> str:
    rows = [
        (
            _job(each["job"]),
            _name(each["server"]),
            text(_MISSED.get(each["cause"], each["cause"])),
            text(_FOUND.get(each["source"], each["source"])),
            _ago(each["at"], now, at),
        )
        for each, at in zip(status["missed"], ats, strict=True)
    ]
    columns = (
        Column("Job", "job"), Column("Server", "server"), Column("Why", "grow"),
        Column("Found", "n"), Column("When", "n"),
    )  # fmt: skip
    total = sum(server["missed"] for server in status["servers"])
    return _section(
        "missed",
        "Missed signals",
        columns,
        rows,
        none="Every end signal has come since the daemon started.",
        aside=f"{total:,} since the daemon started; no job was lost by it" if total else "",
    )


def render(
    now: Snapshot, *, held: Iterable[Row], failed: Iterable[Row], done: Iterable[Row]
) -> str:
    """The page.

    Args:
      held: The last that arrived, at most RECENT.
      failed, done: Those published last, the last one first; of the failures FAILED_MAX at most.

    """
    held, failed, done = list(held), list(failed), list(done)
    status, found = now.to_dict(), needs(now, failed)
    status["jobs"] = dict.fromkeys(SHOWN_STATES, 0) | status["jobs"]
    title = f"({len(found)}) comfyd" if found else "comfyd"
    about_it = [
        f'<time datetime="{text(status["at"])}">{text(status["at"][11:19])} UTC</time>',
        f"up {whole(status['uptime_s'])}" if status["uptime_s"] is not None else "",
        f"{size(status['free_bytes'])} free" if status["free_bytes"] is not None else "",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<noscript><meta http-equiv="refresh" content="{REFRESH_S}"></noscript>'
        f'<link rel="icon" href="{_ICON}">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>comfyd <small>{text(status['version'])}</small></h1>"
        f'<p class="soft"><span id="live">reloads every {REFRESH_S} s</span> · '
        f'<span id="daemon" data-part>{" · ".join(filter(None, about_it))}</span></p></header>'
        "<main>"
        + _verdict(found, status)
        + _counts(status["jobs"])
        + _servers(status)
        + _jobs(status)
        + _held(held, status["jobs"])
        + _failed(failed, now.at)
        + f'<div class="pair">{_queue(status)}{_done(done, now.at)}</div>'
        + _missed(status, now.at, [each.at for each in now.missed])
        + '</main><footer><a href="/metrics">metrics</a> <a href="/api/v1/status">status</a>'
        f' <a href="/api/v1/jobs">jobs</a></footer><script>{SCRIPT}</script></body></html>\n'
    )


def routes(reads: Reads) -> list[Route]:
    """The route of the page."""

    async def page(request: Request) -> Response:
        content = render(
            await reads.snapshot(),
            held=await reads.rows(State.HELD, RECENT, None),
            failed=await reads.latest(State.FAILED, FAILED_MAX),
            done=await reads.latest(State.DONE, RECENT),
        )
        return HTMLResponse(content, headers={"content-security-policy": POLICY})

    return [Route("/", page)]
