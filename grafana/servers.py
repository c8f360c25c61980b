"""*Servers*: in what state is each, how much does it do, does it speak to us, has it memory?"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from grafana.board import Content, board
from grafana.panels import (
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    About,
    Query,
    bars,
    graph,
    listing,
    row,
    stacked,
    timeline,
)
from grafana.queries import events, largest, per_minute, per_second, server

# A number for each state, so that one band can show them all; the worst is the highest.
STATES = {
    "up": (1, GREEN),
    "draining": (2, "blue"),
    "deaf": (3, YELLOW),
    "wedged": (4, ORANGE),
    "down": (5, RED),
}
_EACH = " or ".join(
    f"{value} * " + server("comfyd_server_state", f'state="{state}"')
    for state, (value, _) in STATES.items()
)

BY_SERVER = "instance, server"
NAME = "{{server}} of {{instance}}"


def servers() -> build.Dashboard:
    """The board for the machines."""
    contents: list[Content] = [
        row("Do they work?"),
        timeline(
            About(
                "State",
                "down: no answer, nothing is sent. wedged: it answers and does not work, nothing "
                "is sent. deaf: it sends no events, its prompts are polled, jobs go on. draining: "
                "a person lets it finish.",
                8,
                ("ComfydServerDown", "ComfydServerWedged", "ComfydSocketDeaf"),
            ),
            Query(largest(_EACH, BY_SERVER), NAME),
            {value: (state, colour) for state, (value, colour) in STATES.items()},
        ),
        timeline(
            About(
                "WebSocket",
                "Whether it is open. While it is not, ends are found by polling, seconds later.",
                8,
                ("ComfydSocketDeaf", "ComfydSocketFlapping"),
            ),
            Query(server("comfyd_websocket_connected"), NAME),
            {1: ("open", GREEN), 0: ("closed", RED)},
        ),
        timeline(
            About(
                "Drained by a person",
                "Nothing is sent to a drained server until `comfyd resume SERVER`, and no alert "
                "speaks of it.",
                8,
                ("ComfydServerDraining",),
            ),
            Query(largest(server("comfyd_server_draining"), BY_SERVER), NAME),
            {0: ("no", GREEN), 1: ("draining", "blue")},
        ),
        row("How much do they do?"),
        stacked(
            About(
                "Jobs done",
                "Results delivered from each server. Flat for one server while others work: see "
                "its state, and its queue.",
                8,
            ),
            [
                Query(
                    per_minute(
                        server("comfyd_jobs_finished_total", 'outcome="done"', 'server!="none"'),
                        BY_SERVER,
                    ),
                    NAME,
                )
            ],
            "opm",
        ),
        bars(
            About(
                "Jobs failed",
                "By server. One server alone with many: a missing model or node, or a sick card.",
                8,
                ("ComfydFailuresNotTheirOwn",),
            ),
            Query(
                events(server("comfyd_jobs_finished_total", 'outcome="failed"'), BY_SERVER), NAME
            ),
        ),
        graph(
            About(
                "Queue on the server",
                "Prompts there by its own count, those of others included. comfyd keeps only a "
                "few of its own there (the window), so more are someone else's.",
                8,
            ),
            [Query(server("comfyd_server_queue_remaining"), NAME)],
            "short",
        ),
        stacked(
            About("Output files", "Files fetched and checked.", 8),
            [Query(per_minute(server("comfyd_outputs_total"), BY_SERVER), NAME)],
            "opm",
        ),
        stacked(
            About("Output bytes", "What is downloaded from each server.", 8),
            [Query(per_second(server("comfyd_output_bytes_total"), BY_SERVER), NAME)],
            "Bps",
        ),
        graph(
            About(
                "Stale jobs",
                "Jobs that have been silent for `audit.stale_after` (5 minutes). Long nodes do "
                "that; for ever, and nothing moves.",
                8,
                ("ComfydJobsStale",),
            ),
            [Query(server("comfyd_stale_jobs"), NAME)],
            "short",
        ),
        row("Do they speak to us?"),
        graph(
            About(
                "Silence",
                "Time since the last message on the WebSocket. An idle server is silent; one that "
                "runs a job is not.",
                8,
            ),
            [
                Query(
                    f"time() - ({server('comfyd_websocket_last_message_timestamp_seconds')} > 0)",
                    NAME,
                )
            ],
            "s",
        ),
        stacked(
            About(
                "Messages by type",
                "Each is only a hint to look. `binary` are previews; many `invalid` or `other` "
                "want a look at the server's version.",
                8,
            ),
            [
                Query(
                    f"{per_second(server('comfyd_websocket_messages_total'), 'type')} > 0",
                    "{{type}}",
                )
            ],
            "mps",
        ),
        bars(
            About(
                "Attempts to connect",
                "By result. refused: nothing listens; timeout: no answer; rejected: something "
                "answers that is no ComfyUI, or wants a password.",
                8,
                ("ComfydSocketDeaf", "ComfydSocketFlapping"),
            ),
            Query(
                events(server("comfyd_websocket_connects_total"), "instance, server, result"),
                "{{server}} of {{instance}}: {{result}}",
            ),
        ),
        row("Have they memory?"),
        graph(
            About(
                "Memory in use",
                "Share of each device's memory. Models stay loaded, so high is normal; at the top, "
                "and jobs fail: out of memory.",
                8,
            ),
            [
                Query(
                    f"1 - {server('comfyd_server_vram_free_bytes')}"
                    f" / ({server('comfyd_server_vram_total_bytes')} > 0)",
                    "{{server}} of {{instance}}, {{device}}",
                )
            ],
            "percentunit",
            steps=[(None, GREEN), (0.95, ORANGE)],
        ).max(1),
        graph(
            About("Free memory", "Of each device, as the server says.", 8),
            [
                Query(
                    server("comfyd_server_vram_free_bytes"),
                    "{{server}} of {{instance}}, {{device}}",
                )
            ],
            "bytes",
        ),
        listing(
            About("Devices", "What each server says of itself.", 8),
            Query(server("comfyd_server_info")),
            {"instance": "Daemon", "server": "Server", "device": "Device", "version": "ComfyUI"},
        ),
    ]
    return board(
        "Servers",
        "In what state is each server, does it speak to us, and how much does it do?",
        contents,
        servers=True,
    )
