"""``comfyd jobs``, ``show`` and ``check``: what became of jobs."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any, Final

from comfyd.cli.exits import Exit, Unreachable
from comfyd.cli.place import configured
from comfyd.cli.reading import CHECK_S, ask_daemon, check_state, newest, opened
from comfyd.cli.screen import Table, counted, put, put_json, say, size, span
from comfyd.web.control_client import DaemonUnreachable

_PUBLISHED: Final = ("done", "failed", "cancelled")


def list_jobs(args: argparse.Namespace) -> int:
    """``comfyd jobs``."""
    check_state(args.state)
    config, _ = configured(args)
    with opened(config) as source:
        found = newest(source, args.state, args.limit)
        notice = source.notice
    if notice:
        say(f"comfyd: {notice}")
    if args.json:
        put_json({"jobs": found})
    elif found:
        put(listed(found))
    else:
        say("comfyd: no jobs" + (f" are {args.state}" if args.state else " yet"))
    return Exit.OK


def show(args: argparse.Namespace) -> int:
    """``comfyd show``."""
    config, _ = configured(args)
    with opened(config) as source:
        story, notice = source.story(args.job), source.notice
    if notice:
        say(f"comfyd: {notice}")
    if args.json:
        put_json(story)
    else:
        put(*told(story))
        if story["state"] in _PUBLISHED:
            place = "done" if story["state"] == "done" else "failed"
            folder = config.spool / place / story["job"]
            put(f"result     {folder}" + ("" if folder.is_dir() else " (taken away)"))
    return Exit.OK


def check(args: argparse.Namespace) -> int:
    """``comfyd check``."""
    config, _ = configured(args)
    try:
        answer = ask_daemon(config, {"verb": "check", "job": args.job}, CHECK_S)
    except DaemonUnreachable as error:
        raise Unreachable(f"{error} A check needs the running daemon.") from None
    result = answer["result"]
    if args.json:
        put_json(result)
        return Exit.OK
    job, before, after, verdict = (result.get(k) for k in ("job", "before", "after", "verdict"))
    if before in _PUBLISHED:
        put(f"{job}: {after}, nothing to check")
    else:
        became = f"was {before}, is {after}" if before != after else f"still {after}"
        found = f"; the last audit found its prompt {verdict}" if verdict else ""
        put(f"{job}: {became}{found}")
    message = (result.get("summary") or {}).get("message")
    if message:
        put(message)
    return Exit.OK


# --- for people ----------------------------------------------------------------------------------


def listed(jobs: list[dict[str, Any]]) -> Table:
    """Summaries as a table."""
    rows = [
        (
            job["job"],
            job["state"],
            job["server"] or "",
            str(job["attempts"]),
            job["completion"] or "",
            span(job["durations_s"]["total"]) if job["times"]["published"] else "",
            _clock(job["times"]["claimed"]),
            job["message"],
        )
        for job in jobs
    ]
    heads = ("JOB", "STATE", "SERVER", "TRIES", "FOUND BY", "TOOK", "CLAIMED (UTC)", "MESSAGE")
    return Table(heads, rows, spare=("CLAIMED (UTC)", "FOUND BY", "TRIES", "TOOK", "SERVER"))


def told(story: dict[str, Any]) -> list[str | Table]:
    """One job's story."""
    made: list[str | Table] = [f"job        {story['job']}"]

    def line(name: str, text: object) -> None:
        if text not in (None, "", [], {}):
            made.append(f"{name:<10} {text}")

    line("state", story["state"])
    if story["message"]:
        reason = f"{story['reason']}: " if story["reason"] else ""
        line("why", reason + story["message"])
    line("server", story["server"])
    line("prompt", story["prompt_id"])
    attempts = f"{story['attempts']} made, {story['charged']} of {story['max_attempts']} charged"
    line("attempts", attempts)
    line("found by", story["completion"])
    line("priority", story["priority"] or "")
    spans = story["durations_s"].items()
    line("took", ", ".join(f"{phase} {span(took_s)}" for phase, took_s in spans if took_s))
    outputs = story["outputs"]
    if outputs and outputs["files"]:
        line("outputs", f"{counted(outputs['files'], 'file')}, {size(outputs['bytes'])}")
    line("retry of", story["retry_of"])
    line("key", story.get("key"))
    for name in ("drawn", "metadata", "detail"):
        if story.get(name):
            line(name, json.dumps(story[name], ensure_ascii=False))
    for warning in story["warnings"]:
        line("warning", warning)
    for each in story["abandoned"]:
        line("abandoned", f"{each['prompt_id']} on {each['server']} ({each['url']})")
    if story["events"]:
        made.append(_events(story["events"]))
    return made


def _events(events: list[dict[str, Any]]) -> Table:
    began = datetime.fromisoformat(events[0]["at"])
    rows = [
        (
            _clock(event["at"], milliseconds=True),
            f"{(datetime.fromisoformat(event['at']) - began).total_seconds():+.3f} s",
            phrase(event["kind"], event["data"]),
        )
        for event in events
        if event["data"].get("state") not in _PUBLISHED  # ``finished`` says it too, and more
    ]
    return Table(("AT (UTC)", "AFTER", "WHAT"), rows, toned="", spare=("AT (UTC)",))


def _clock(at: str, *, milliseconds: bool = False) -> str:
    """An RFC 3339 time, shorter."""
    return at[: 23 if milliseconds else 19].replace("T", " ")


def phrase(kind: str, data: dict[str, Any]) -> str:
    """One event in words; an unknown one as it is."""
    on = f" on {data['server']}" if data.get("server") else ""
    match kind, data:
        case "claimed", {"payload": payload}:
            return f"claimed as {payload}" + (", no valid job" if data.get("invalid") else "")
        case "retried", {"new": new}:
            return f"retried as {new}"
        case "absorbed", {"name": name}:
            return f"submitted again as {name}: same key, same content"
        case "moved", {"state": state}:
            return f"{state}{on}"
        case "accepted", _:
            return f"accepted{on}"
        case "signal", {"sign": "ended"}:
            return f"end signal received{on}"
        case "signal", {"sign": sign}:
            return f"signal: {sign}{on}"
        case "retry", {"operation": operation, "reason": reason}:
            said = f" ({data['said']})" if data.get("said") else ""
            return f"{operation} to be tried again: {reason}{on}{said}"
        case "charged", {"reason": "turned_away"}:
            return f"charged{on}: it took others, and not this one"
        case "charged", {"reason": reason}:
            return f"charged{on}: {reason}"
        case "audit", {"verdict": verdict}:
            why = f" ({data['reason']})" if data.get("reason") else ""
            return f"audit{on}: {verdict}{why}"
        case "ended", {"source": source}:
            missed = f", its end signal was missed: {data['missed']}" if data.get("missed") else ""
            return f"ended{on} with {data.get('end') or 'a record'}, learnt by {source}{missed}"
        case "lost", {"cause": cause}:
            return (
                f"attempt lost{on}: {cause}, {'charged' if data.get('charged') else 'not charged'}"
            )
        case "fetched", {"outputs": 0}:
            return "put together, nothing to download"
        case "fetched", {"outputs": count, "bytes": count_bytes}:
            return f"{counted(count, 'output')} downloaded and verified, {size(count_bytes)}"
        case "finished", {"outcome": outcome}:
            return f"{outcome}: {data['reason']}" if data.get("reason") else str(outcome)
        case _:
            rest = ", ".join(f"{key} {value}" for key, value in data.items())
            return f"{kind}: {rest}" if rest else kind
