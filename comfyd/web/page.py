"""``/``: the status page for people. Plain HTML made here, without a script.

Names come from files and servers, so every one is escaped, stripped of control and direction
characters, and set apart (``<bdi>``); the policy of the page allows nothing but its own style.
"""

from __future__ import annotations

import base64
import hashlib
import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from comfyd.core.present import LIVE_STATES, job_summary
from comfyd.web.api import Reads

RECENT: Final = 20
REFRESH_S: Final = 15
NAME_MAX: Final = 200

STYLE: Final = """
:root{color-scheme:light dark;--line:#8884;--bad:#b3261e;--good:#146c2e}
@media (prefers-color-scheme:dark){:root{--bad:#f2b8b5;--good:#7fd99a}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;vertical-align:top}
th,td{border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.bad{color:var(--bad)}.good{color:var(--good)}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

_GOOD: Final = frozenset({"up", "done", "running"})
_BAD: Final = frozenset({"down", "wedged", "deaf", "failed", "held"})


def text(value: object) -> str:
    """*value* as inert HTML text: nothing in it is markup, hidden, or turns the line around."""
    said = "" if value is None else str(value)
    if len(said) > NAME_MAX:
        said = said[: NAME_MAX - 1] + "…"
    plain = "".join("�" if unicodedata.category(c)[0] == "C" else c for c in said)
    return html.escape(plain)


def _name(value: object) -> str:
    return f"<bdi>{text(value)}</bdi>"


def _state(state: str) -> str:
    kind = "good" if state in _GOOD else "bad" if state in _BAD else ""
    return f'<span class="{kind}">{text(state)}</span>' if kind else text(state)


def _job(job: str) -> str:
    return f'<a href="/api/v1/jobs/{quote(job, safe="")}">{_name(job)}</a>'


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


def size(count: int | None) -> str:
    """*count* bytes in GiB."""
    return "" if count is None else f"{count / 2**30:.1f} GiB"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a sentence where there are none."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    head = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<h2>{text(caption)}</h2>" + (body if lines else "<p>None.</p>")


def render(status: dict[str, Any], recent: Iterable[dict[str, Any]]) -> str:
    """The page, from ``Snapshot.to_dict()`` and the summaries of the latest jobs."""
    counts = status["jobs"]
    shown = [f"{counts.get(state, 0)} {state}" for state in LIVE_STATES if counts.get(state)]
    lines = [", ".join(shown) or "Nothing to do"]
    if status["oldest_age_s"].get("queued"):
        lines.append(f"oldest queued job: {span(status['oldest_age_s']['queued'])}")
    lines += [f"{status['stale']} stale"] if status["stale"] else []
    lines += ["intake is paused"] if status["paused"] else []
    lines += [status["waiting"]] if status["waiting"] else []
    if status["free_bytes"] is not None:
        lines.append(f"{size(status['free_bytes'])} free")
    servers = [
        (
            _name(server["name"]),
            _state(server["state"]) + (f" {_name(server['reason'])}" if server["reason"] else ""),
            _name(server["tracker"]),
            f"{server['in_flight']} of {server['window']}",
            text(server["queue_remaining"]),
            text(server["stale"]),
            _name(server["version"]),
            "<br>".join(
                f"{_name(device['name'])} {size(device['vram_free_bytes'])}"
                f" of {size(device['vram_total_bytes'])} free"
                for device in server["devices"]
            ),
        )
        for server in status["servers"]
    ]
    at_hand = [
        (
            _job(job["job"]),
            _state(job["state"]),
            _name(job["server"]),
            text(job["attempt"]),
            span(job["for_s"]),
            f'<span class="bad">{span(job["silent_s"])}</span>'
            if job["stale"]
            else span(job["silent_s"]),
        )
        for job in status["at_hand"]
    ]
    latest = [
        (
            _job(job["job"]),
            _state(job["state"]),
            _name(job["server"]),
            text(job["completion"]),
            span(job["durations_s"]["total"]),
            text(job["times"]["claimed"]),
            _name(job["message"]),
        )
        for job in recent
    ]
    more = f"<p>and {status['more']} more</p>" if status["more"] else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        f"<title>comfyd</title><style>{STYLE}</style></head><body>"
        f"<h1>comfyd {text(status['version'])}</h1>"
        f"<p>{text(status['at'])}, up {span(status['uptime_s'])}</p>"
        f"<p>{'; '.join(map(text, lines))}.</p>"
        + _table(
            "Servers",
            ("Name", "State", "Tracker", "Ours", "In its queue", "Stale", "ComfyUI", "Devices"),
            servers,
        )
        + _table("At hand", ("Job", "State", "Server", "Attempt", "For", "Silent for"), at_hand)
        + more
        + _table(
            "Latest",
            ("Job", "State", "Server", "Found by", "Took", "Claimed", "Message"),
            latest,
        )
        + '<p><a href="/metrics">metrics</a> · <a href="/api/v1/status">status</a> ·'
        ' <a href="/api/v1/jobs">jobs</a></p></body></html>\n'
    )


def routes(reads: Reads) -> list[Route]:
    """The route of the page."""

    async def page(request: Request) -> Response:
        snapshot = await reads.snapshot()
        rows = await reads.rows(None, RECENT, None)
        content = render(snapshot.to_dict(), [job_summary(row) for row in rows])
        return HTMLResponse(content, headers={"content-security-policy": POLICY})

    return [Route("/", page)]
