"""*Reliability*: what did not go as it should, and what comfyd did about it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from grafana.board import Content, board
from grafana.panels import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    About,
    Query,
    bars,
    coloured,
    graph,
    number,
    row,
    stacked,
)
from grafana.queries import daemon, events, of_comfyd, per_minute, quantile, server, total, within

SOURCES = {"signal": GREEN, "reconnect": YELLOW, "audit": ORANGE, "recovery": BLUE}

# An end that only a restart of comfyd kept from us is not missed, so it is not counted here either.
_ENDS = server("comfyd_completions_total", 'source!="recovery"')
_MISSED = server("comfyd_missed_signals_total")


def reliability() -> build.Dashboard:
    """The board for what went wrong."""
    contents: list[Content] = [
        number(
            About(
                "Ends told by signal, last day",
                "Share of the prompts whose end the WebSocket told. The others were found by "
                "looking: they are late, not lost.",
                6,
                ("ComfydSignalsMissed",),
            ),
            Query(f"1 - {within(_MISSED, '1d')} / ({within(_ENDS, '1d')} > 0)"),
            "percentunit",
            steps=[(None, RED), (0.9, YELLOW), (0.99, GREEN)],
            empty="no ends",
        ),
        number(
            About(
                "Missed signals, last day",
                "Prompts that ended without their end signal reaching us.",
                6,
                ("ComfydSignalsMissed",),
            ),
            Query(within(_MISSED, "1d")),
            "short",
            steps=[(None, GREEN), (0.5, YELLOW)],
        ),
        number(
            About(
                "Lost attempts, last day",
                "Runs that were given up. Their jobs run again.",
                6,
                ("ComfydAttemptsLost",),
            ),
            Query(within(server("comfyd_attempts_lost_total"), "1d")),
            "short",
            steps=[(None, GREEN), (0.5, YELLOW), (10, RED)],
        ),
        number(
            About(
                "Silent jobs now",
                "Prompts that have said nothing for `audit.stale_after`.",
                6,
                ("ComfydJobsStale",),
            ),
            Query(total(server("comfyd_stale_jobs"))),
            "short",
            steps=[(None, GREEN), (1, YELLOW)],
        ),
        row("How do we learn of ends?"),
        coloured(
            stacked(
                About(
                    "Completions by source",
                    "signal: the WebSocket said so. reconnect: found after a reconnect. audit: "
                    "found by looking. recovery: found after a restart of comfyd.",
                    8,
                    ("ComfydSignalsMissed",),
                ),
                [Query(per_minute(server("comfyd_completions_total"), "source"), "{{source}}")],
                "opm",
            ),
            SOURCES,
        ),
        bars(
            About(
                "Missed signals by cause",
                "disconnected: the WebSocket was closed. deaf: it was open, and the server sent "
                "nothing. silent: it worked, and this end did not come.",
                8,
                ("ComfydSignalsMissed",),
            ),
            Query(events(_MISSED, "cause"), "{{cause}}"),
        ),
        bars(
            About(
                "Disconnects by cause",
                "closed: by the server. ping_timeout: the network, or a server that stands still. "
                "deaf: by us, to get one that hears.",
                8,
                ("ComfydSocketFlapping",),
            ),
            Query(
                events(server("comfyd_websocket_disconnects_total"), "instance, server, cause"),
                "{{server}} of {{instance}}: {{cause}}",
            ),
        ),
        row("What is lost and done again?"),
        bars(
            About(
                "Lost attempts by cause",
                "restart: the server lost its memory. absent: the prompt is nowhere. abandoned: "
                "the server was away for too long. outputs: the files were gone.",
                8,
                ("ComfydAttemptsLost",),
            ),
            Query(
                events(server("comfyd_attempts_lost_total"), "instance, server, cause"),
                "{{server}} of {{instance}}: {{cause}}",
            ),
        ),
        bars(
            About(
                "Attempts charged",
                "Held against their job: after `max_attempts` of them it fails. On one server "
                "alone: its card or its machine.",
                8,
                ("ComfydAttemptsLost",),
            ),
            Query(
                events(server("comfyd_attempts_charged_total"), "instance, server"),
                "{{server}} of {{instance}}",
            ),
        ),
        bars(
            About(
                "Retries",
                "What was tried again, and why. Some are normal around a server's restart.",
                8,
                ("ComfydHistoryRetriesHigh",),
            ),
            Query(
                events(daemon("comfyd_retries_total"), "operation, reason"),
                "{{operation}}: {{reason}}",
            ),
        ),
        row("What do audits find?"),
        stacked(
            About(
                "Audits by verdict",
                "Prompts looked up in queue and history. finished: its end was missed. absent: it "
                "may be lost. unknown: the server gave no usable answer.",
                8,
            ),
            [Query(per_minute(server("comfyd_audits_total"), "verdict"), "{{verdict}}")],
            "opm",
        ),
        graph(
            About(
                "History: time of a fetch",
                "95 of 100 are faster, retries included, by what was found.",
                8,
            ),
            [Query(quantile(0.95, "comfyd_history_fetch_seconds", "result"), "{{result}}")],
            "s",
        ),
        bars(
            About(
                "History: fetches",
                "empty: the record is not there yet, or no more. error: no usable answer.",
                8,
            ),
            Query(events(daemon("comfyd_history_fetch_seconds_count"), "result"), "{{result}}"),
        ),
        row("Does the daemon hold?"),
        bars(
            About(
                "Restarts of tasks",
                "Supervised tasks that ended by a server's error and were started again.",
                6,
                ("ComfydTaskRestarts",),
            ),
            Query(
                events(daemon("comfyd_task_restarts_total"), "task, error"), "{{task}}: {{error}}"
            ),
        ),
        bars(
            About(
                "Facts dropped",
                "Answers that were out of date, hints for prompts that are not ours or came late. "
                "Foreign hints are normal where others use the server.",
                6,
            ),
            Query(events(daemon("comfyd_facts_dropped_total"), "reason"), "{{reason}}"),
        ),
        bars(
            About(
                "Servers restarted",
                "Wedged servers whose `restart_unit` was restarted, or was to be.",
                6,
                ("ComfydServerWedged",),
            ),
            Query(
                events(server("comfyd_server_restarts_total"), "instance, server, result"),
                "{{server}} of {{instance}}: {{result}}",
            ),
        ),
        graph(
            About(
                "Open files",
                "Of the daemon. A line that only climbs is a leak.",
                6,
            ),
            [Query(of_comfyd(daemon("process_open_fds")), "{{instance}}")],
            "short",
        ),
    ]
    return board(
        "Reliability",
        "What did not go as it should, and what was done about it?",
        contents,
        servers=True,
    )
