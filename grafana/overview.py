"""*Overview*: is everything finishing, how fast, what waits, and when will it be empty?"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as build

from grafana.board import Content, board
from grafana.panels import (
    GREEN,
    GREY,
    ORANGE,
    RED,
    STAT_HEIGHT,
    YELLOW,
    About,
    Query,
    bars,
    coloured,
    graph,
    listing,
    number,
    row,
    stacked,
    words,
)
from grafana.queries import (
    daemon,
    events,
    largest,
    mean,
    of_comfyd,
    per_minute,
    quantile,
    smallest,
    total,
    within,
)

OUTCOMES = {"done": GREEN, "failed": RED, "cancelled": GREY}

# Every job that is not held, times the mean run of the last hour, over the servers that work.
# Idle hours do not make it longer, as they would if the pace were measured instead.
_LEFT = total(daemon("comfyd_jobs", 'state!="held"'), "instance")
_RUN_TIME = within(daemon("comfyd_job_duration_seconds_sum", 'phase="run"'), "1h", "instance")
_RUNS = within(daemon("comfyd_job_duration_seconds_count", 'phase="run"'), "1h", "instance")
_TROUBLED = (
    daemon("comfyd_server_state", 'state=~"down|wedged|deaf"')
    + f" unless on (job, instance, server) {daemon('comfyd_server_draining')} == 1"
)
_WORKING = total(daemon("comfyd_server_state", 'state=~"up|deaf"'), "instance")
EMPTY_IN = f"{_LEFT} * {_RUN_TIME} / ({_RUNS} > 0) / ({_WORKING} > 0) or ({_LEFT} == 0)"


def overview() -> build.Dashboard:
    """The board to open first."""
    contents: list[Content] = [
        words(
            About(
                "Daemon",
                "Whether Prometheus reaches comfyd. Without it nothing below is current; jobs on "
                "servers go on, and comfyd finds them again.",
                3,
                ("ComfydDown", "ComfydRestarting"),
            ),
            Query(smallest(of_comfyd(daemon("up")))),
            {1: ("up", GREEN), 0: ("DOWN", RED)},
        ),
        number(
            About(
                "Servers in trouble",
                "Servers that are down, wedged or deaf. Draining ones are not counted: a person "
                "wanted that. The board Servers shows which, and since when.",
                3,
                (
                    "ComfydNoServerUsable",
                    "ComfydServerDown",
                    "ComfydServerWedged",
                    "ComfydSocketDeaf",
                ),
            ),
            Query(f"{total(_TROUBLED)} or vector(0)"),
            "short",
            steps=[(None, GREEN), (1, ORANGE)],
        ),
        number(
            About(
                "Failed in the last hour",
                "Jobs that ended without a result. Below: why.",
                3,
                ("ComfydFailuresNotTheirOwn", "ComfydJobLost"),
            ),
            Query(within(daemon("comfyd_jobs_finished_total", 'outcome="failed"'), "1h")),
            "short",
            steps=[(None, GREEN), (0.5, YELLOW), (10, RED)],
        ),
        words(
            About(
                "Intake",
                "Whether dropped files are taken. A person pauses it with `comfyd pause`, and ends "
                "that with `comfyd resume`.",
                3,
                ("ComfydIntakePaused",),
            ),
            Query(largest(daemon("comfyd_intake_paused"))),
            {0: ("open", GREEN), 1: ("PAUSED", ORANGE)},
        ),
        words(
            About(
                "Space",
                "Whether everything waits for space on a disk. It goes on by itself once there is.",
                3,
                ("ComfydWaitingForSpace",),
            ),
            Query(largest(daemon("comfyd_waiting_for_space"))),
            {0: ("enough", GREEN), 1: ("WAITS", RED)},
        ),
        number(
            About("Waiting", "Jobs that no server has yet.", 3),
            Query(total(daemon("comfyd_jobs", 'state="queued"'))),
            "short",
        ),
        number(
            About(
                "Oldest waiting job",
                "How long the job that waits longest has waited. It grows without end when "
                "nothing moves.",
                3,
                ("ComfydQueueAgeHigh",),
            ),
            Query(largest(daemon("comfyd_oldest_job_age_seconds", 'state="queued"'))),
            "s",
            steps=[(None, GREEN), (3600, YELLOW), (6 * 3600, RED)],
        ),
        number(
            About(
                "Empty in",
                "When the last job will be done if none is added: all jobs, times the mean run of "
                "the last hour, over the servers that work. No answer: no server works, or no run "
                "ended in the last hour.",
                3,
            ),
            Query(largest(EMPTY_IN)),
            "s",
            empty="no end in sight",
        ),
        row("Is everything finishing?"),
        coloured(
            stacked(
                About(
                    "Jobs ended",
                    "By outcome. Flat while jobs wait means that nothing is finishing.",
                    12,
                    ("ComfydFailuresNotTheirOwn", "ComfydJobLost"),
                ),
                [Query(per_minute(daemon("comfyd_jobs_finished_total"), "outcome"), "{{outcome}}")],
                "opm",
            ),
            OUTCOMES,
        ),
        bars(
            About(
                "Failures by reason",
                "Jobs that ended without a result. execution_error, rejected and invalid_job are "
                "of the job's own making; lost, stalled and output_missing are the servers'.",
                12,
                ("ComfydFailuresNotTheirOwn", "ComfydJobLost"),
            ),
            Query(events(daemon("comfyd_job_failures_total"), "reason"), "{{reason}}"),
        ),
        row("How fast?"),
        graph(
            About(
                "Drop to result",
                "From the claim of a dropped file to its published result: half of the jobs are "
                "faster than p50, nineteen of twenty faster than p95.",
                8,
            ),
            [
                Query(quantile(0.5, "comfyd_job_duration_seconds", "", 'phase="total"'), "p50"),
                Query(quantile(0.95, "comfyd_job_duration_seconds", "", 'phase="total"'), "p95"),
            ],
            "s",
        ),
        stacked(
            About(
                "Where the time goes",
                "Mean time in each phase: wait (here, for a server), queue (on the server), run, "
                "collect (download, verify, publish). Much wait wants more servers, much collect "
                "a faster network or disk.",
                8,
            ),
            [
                Query(
                    mean("comfyd_job_duration_seconds", "phase", 'phase!="total"'),
                    "{{phase}}",
                )
            ],
            "s",
        ),
        graph(
            About(
                "comfyd's own share",
                "How soon a dropped file is taken, and how soon after its end a result is "
                "published; 99 of 100 are faster.",
                8,
                ("ComfydCompletionLatencyHigh",),
            ),
            [
                Query(quantile(0.99, "comfyd_spool_pickup_seconds"), "file to claim"),
                Query(quantile(0.99, "comfyd_completion_latency_seconds"), "end to result"),
            ],
            "s",
        ),
        row("What waits, and when will it be empty?"),
        stacked(
            About(
                "Jobs by state",
                "Where the jobs are that have not ended. Many held: a person, or crashes, hold "
                "them; `comfyd show JOB` says which.",
                8,
                ("ComfydJobsHeld",),
            ),
            [Query(total(daemon("comfyd_jobs"), "state"), "{{state}}")],
            "short",
        ),
        graph(
            About(
                "Oldest job",
                "Time since the oldest job in the state was claimed. Submitted ones may run.",
                8,
                ("ComfydQueueAgeHigh",),
            ),
            [
                Query(
                    largest(daemon("comfyd_oldest_job_age_seconds"), "state"),
                    "{{state}}",
                )
            ],
            "s",
        ),
        graph(
            About(
                "Empty in",
                "As the number above, over time. It falls by a second a second when the pace "
                "holds and nothing is added.",
                8,
            ),
            [Query(EMPTY_IN, "{{instance}}")],
            "s",
            empty="no end in sight",
        ),
        row("Can it go on?"),
        graph(
            About(
                "Spool: space left",
                "When what is free falls to what is kept free (`outputs.min_free_bytes`), all "
                "jobs wait, and nothing is lost.",
                5,
                ("ComfydDiskLow", "ComfydWaitingForSpace"),
            ),
            [
                Query(daemon("comfyd_spool_free_bytes"), "free at {{instance}}"),
                Query(daemon("comfyd_spool_min_free_bytes"), "kept free at {{instance}}"),
            ],
            "bytes",
        ),
        graph(
            About(
                "Spool: files",
                "In `new/`: dropped and not yet taken. In `claimed/`: one for each job that has "
                "not ended.",
                5,
                ("ComfydSpoolNotDrained",),
            ),
            [Query(total(daemon("comfyd_spool_files"), "directory"), "{{directory}}")],
            "short",
        ),
        bars(
            About(
                "Drops that gave no job",
                "invalid_job and conflict are in `failed/` with a reason; duplicate is the same "
                "job dropped again; unmovable is left where it lies.",
                5,
            ),
            Query(events(daemon("comfyd_spool_rejected_total"), "reason"), "{{reason}}"),
        ),
        graph(
            About(
                "Journal: time of a commit",
                "Nothing is sent before it is written. Tens of milliseconds are a slow disk.",
                5,
            ),
            [
                Query(quantile(0.5, "comfyd_journal_commit_seconds"), "p50"),
                Query(quantile(0.99, "comfyd_journal_commit_seconds"), "p99"),
            ],
            "s",
            steps=[(None, GREEN), (0.1, ORANGE)],
        ),
        bars(
            About(
                "Results removed",
                "By `retention` or `comfyd gc`, from `done/` and `failed/`.",
                4,
            ),
            Query(events(daemon("comfyd_results_removed_total"), "directory"), "{{directory}}"),
        ),
        words(
            About(
                "Configuration",
                "If the last reading failed, the settings from before are in use; the log says "
                "file, line and key.",
                5,
                ("ComfydConfigReloadFailed",),
            ),
            Query(smallest(daemon("comfyd_config_last_reload_successful"))),
            {1: ("good", GREEN), 0: ("FAILED", RED)},
        ),
        number(
            About("Configuration in use since", "When it was last read successfully.", 5),
            Query(
                "1000 * " + largest(daemon("comfyd_config_last_reload_success_timestamp_seconds"))
            ),
            "dateTimeFromNow",
        ),
        number(
            About("Memory of the daemon", "Resident memory of its process.", 4),
            Query(total(of_comfyd(daemon("process_resident_memory_bytes")))),
            "bytes",
        ),
        listing(
            About("Versions", "Of comfyd, and of the Python that runs it.", 10),
            Query(daemon("comfyd_build_info")),
            {"instance": "Daemon", "version": "comfyd", "python": "Python"},
        ).height(STAT_HEIGHT),
    ]
    return board(
        "Overview",
        "Is everything finishing, how fast, what waits, and when will it be empty?",
        contents,
        servers=False,
    )
