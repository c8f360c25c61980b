"""Every metric comfyd has, in one place: alert rules, boards and the README are held to this list.

Labels are closed sets: a value that is not listed here is counted as ``other``, so nothing that a
server, a file or a person says can add a series. Each number has one source: what happens in the
core is told by its notes (`observe`), what is so now by a snapshot at scrape time (`refresh`), and
the rest by the shell that sees it. Built once and passed down; tests build their own.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Final, assert_never

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from comfyd.core.model import JobId, Reason, Source
from comfyd.core.notes import Note
from comfyd.core.present import LIVE_STATES
from comfyd.core.snapshot import ServerState, Snapshot
from comfyd.core.wire.messages import MESSAGE_TYPES
from comfyd.core.wire.stats import Device, SystemStats
from comfyd.errors import (
    DiskFull,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)

OTHER: Final = "other"
NONE: Final = "none"  # the server of a job that never had one

OUTCOMES: Final = frozenset({"done", "failed", "cancelled"})
FAILURES: Final = frozenset(reason.value for reason in Reason)
SOURCES: Final = frozenset(source.value for source in Source)
PHASES: Final = frozenset({"wait", "queue", "run", "collect", "total"})
MISSED: Final = frozenset({"disconnected", "deaf", "silent"})
OPERATIONS: Final = frozenset({"submit", "history", "completion", "download", "upload", "attempt"})
RETRIES: Final = frozenset(
    {
        # how a request failed: see `reason_of`
        "refused", "timeout", "unreachable", "status", "protocol", "disk",
        # what an answer lacked
        "empty", "error", "unreadable", "missing", "invalid", "server", "conflict",
        # why an attempt was not the last
        "restart", "absent", "abandoned", "outputs",
    }
)  # fmt: skip
FETCHES: Final = frozenset({"found", "empty", "error"})
VERDICTS: Final = frozenset({"pending", "running", "finished", "absent", "unknown"})
LOSSES: Final = frozenset({"restart", "absent", "abandoned", "outputs"})
DROPS: Final = frozenset(
    {
        "stale_answer", "late_hint", "foreign_hint", "no_effect",
        "unknown_job", "known_job", "unknown_server",
    }
)  # fmt: skip
CONNECTS: Final = frozenset({"ok", "refused", "timeout", "rejected", "error"})
DISCONNECTS: Final = frozenset({"closed", "ping_timeout", "deaf", "error"})
DIRECTORIES: Final = frozenset({"new", "claimed"})
SPOOL_REJECTIONS: Final = frozenset(
    {"invalid_job", "duplicate", "conflict", "not_a_file", "too_big", "unreadable", "unmovable"}
)
TASKS: Final = frozenset(
    {
        "tracker", "dispatcher", "submitter", "fetcher", "collector", "prober", "auditor",
        "health", "watcher", "web", "control",
    }
)  # fmt: skip
TASK_ERRORS: Final = frozenset(
    {"ServerError", "ServerRefused", "ServerUnreachable", "ServerStatus", "ServerProtocol"}
)
# torch.device types that ComfyUI names (comfy/model_management.py), each with an index up to 15.
DEVICE_TYPES: Final = frozenset(
    {"cpu", "cuda", "mps", "xpu", "npu", "mlu", "hpu", "privateuseone", "directml"}
)
DEVICES_MAX: Final = 16

# fmt: off
LATENCIES_S: Final = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
DURATIONS_S: Final = (.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
# fmt: on


def label(value: str | None, allowed: frozenset[str]) -> str:
    """*value* if it is one of *allowed*, else ``other``."""
    return value if value in allowed else OTHER


def reason_of(error: Exception) -> str:
    """The ``reason`` label of a retry after *error*."""
    match error:
        case ServerRefused():
            return "refused"
        case ServerUnreachable():
            return "unreachable"
        case ServerStatus():
            return "status"
        case ServerProtocol():
            return "protocol"
        case DiskFull():
            return "disk"
        case TimeoutError():
            return "timeout"
        case _:
            return OTHER


def device_label(device: Device) -> str:
    """The ``device`` label: ``cpu``, ``cuda:0``; the names servers give have no limit."""
    if device.type not in DEVICE_TYPES:
        return OTHER
    if device.index is None:
        return device.type
    return f"{device.type}:{device.index}" if 0 <= device.index < DEVICES_MAX else OTHER


def version_label(stats: SystemStats) -> str:
    """The ``version`` label: the numbers of ComfyUI's version, whatever is written around them."""
    numbers = stats.version_tuple
    return OTHER if numbers is None else ".".join(str(number) for number in numbers)


class Metrics:
    """See the module. Not thread-safe in `refresh` and `system`; the rest may be called anywhere.

    Args:
      registry: Empty, and nobody else's.
      version: comfyd's, for ``comfyd_build_info``.

    """

    def __init__(self, registry: CollectorRegistry, *, version: str = "unknown") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that no query here uses
        self.registry = registry
        self._servers: frozenset[str] = frozenset()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, bounds_s: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=bounds_s, registry=registry)

        self._build = gauge(
            "comfyd_build_info", "1, with the versions of comfyd and Python.", "version", "python"
        )
        self._reload_ok = gauge(
            "comfyd_config_last_reload_successful",
            "Whether the last reading of the configuration succeeded.",
        )
        self._reload_at = gauge(
            "comfyd_config_last_reload_success_timestamp_seconds",
            "When the configuration was last read successfully.",
        )
        self._up = gauge(
            "comfyd_server_up", "Whether the last health probe of the server was good.", "server"
        )
        self._state = gauge(
            "comfyd_server_state", "1 for the current state of the server.", "server", "state"
        )
        self._info = gauge(
            "comfyd_server_info", "1, with ComfyUI's version and each of the server's devices.",
            "server", "version", "device",
        )  # fmt: skip
        self._vram_free = gauge(
            "comfyd_server_vram_free_bytes", "Free memory of a device.", "server", "device"
        )
        self._vram_total = gauge(
            "comfyd_server_vram_total_bytes", "Memory of a device.", "server", "device"
        )
        self._remaining = gauge(
            "comfyd_server_queue_remaining",
            "Prompts on the server by its own count, those of others included.",
            "server",
        )
        self._jobs = gauge("comfyd_jobs", "Jobs now in each state.", "state")
        self._oldest = gauge(
            "comfyd_oldest_job_age_seconds",
            "Time since the oldest job in the state was claimed (submitted: running ones too).",
            "state",
        )
        self._stale = gauge(
            "comfyd_stale_jobs", "Jobs on the server that have been silent too long.", "server"
        )
        self._finished = counter(
            "comfyd_jobs_finished_total", "Jobs that reached their end.", "server", "outcome"
        )
        self._failures = counter(
            "comfyd_job_failures_total", "Jobs that ended without a result.", "reason"
        )
        self._durations = histogram(
            "comfyd_job_duration_seconds", "Time finished jobs spent in each phase.", DURATIONS_S,
            "phase",
        )  # fmt: skip
        self._latency = histogram(
            "comfyd_completion_latency_seconds",
            "Time from the end signal to the published result.",
            LATENCIES_S,
        )
        self._completions = counter(
            "comfyd_completions_total", "Prompts that ended, by how that was learnt.",
            "server", "source",
        )  # fmt: skip
        self._missed = counter(
            "comfyd_missed_signals_total", "Prompts whose end signal did not reach us.",
            "server", "cause",
        )  # fmt: skip
        self._retries = counter(
            "comfyd_retries_total", "Operations that were tried again.", "operation", "reason"
        )
        self._fetches = histogram(
            "comfyd_history_fetch_seconds", "Time of one history fetch, its retries included.",
            LATENCIES_S, "result",
        )  # fmt: skip
        self._audits = counter(
            "comfyd_audits_total", "Prompts looked up, by what was found.", "server", "verdict"
        )
        self._lost = counter(
            "comfyd_attempts_lost_total", "Attempts given up, by cause.", "server", "cause"
        )
        self._charged = counter(
            "comfyd_attempts_charged_total", "Attempts held against their job.", "server"
        )
        self._dropped = counter(
            "comfyd_facts_dropped_total", "Outdated answers, foreign or late hints.", "reason"
        )
        self._connected = gauge(
            "comfyd_websocket_connected", "Whether the server's WebSocket is open.", "server"
        )
        self._connects = counter(
            "comfyd_websocket_connects_total", "Attempts to connect.", "server", "result"
        )
        self._disconnects = counter(
            "comfyd_websocket_disconnects_total", "Connections that ended.", "server", "cause"
        )
        self._messages = counter(
            "comfyd_websocket_messages_total", "Messages received.", "server", "type"
        )
        self._message_at = gauge(
            "comfyd_websocket_last_message_timestamp_seconds",
            "When the last message came; 0 before the first.",
            "server",
        )
        self._spool_files = gauge(
            "comfyd_spool_files", "Files and bundles in the spool, as last seen.", "directory"
        )
        self._spool_rejected = counter(
            "comfyd_spool_rejected_total", "Dropped files that gave no job of their own.", "reason"
        )
        self._pickup = histogram(
            "comfyd_spool_pickup_seconds", "Time from a complete file to its claim.", LATENCIES_S
        )
        self._free = gauge("comfyd_spool_free_bytes", "Space left on the spool's file system.")
        self._outputs = counter("comfyd_outputs_total", "Output files fetched.", "server")
        self._output_bytes = counter(
            "comfyd_output_bytes_total", "Size of the output files fetched.", "server"
        )
        self._commits = histogram(
            "comfyd_journal_commit_seconds", "Time of one group commit.", LATENCIES_S
        )
        self._restarts = counter(
            "comfyd_task_restarts_total", "Restarts of supervised tasks.", "task", "error"
        )
        self._build.labels(version, platform.python_version()).set(1)
        self._zero()

    def prepare(self, server_names: Iterable[str]) -> None:
        """Make *server_names* the only values of ``server``, and let their series start at 0.

        After a reload the counters of servers that stay go on; those that are gone disappear.
        """
        names = frozenset(server_names)
        by_server = (
            self._up, self._state, self._info, self._vram_free, self._vram_total, self._remaining,
            self._stale, self._finished, self._completions, self._missed, self._audits, self._lost,
            self._charged, self._connected, self._connects, self._disconnects, self._messages,
            self._message_at, self._outputs, self._output_bytes,
        )  # fmt: skip
        for gone in self._servers - names:
            for metric in by_server:
                metric.remove_by_labels({"server": gone})
        self._servers = names
        for name in names:
            for one in (self._up, self._remaining, self._stale, self._connected, self._message_at):
                one.labels(name)
            for count in (self._charged, self._outputs, self._output_bytes):
                count.labels(name)
            for state in ServerState:
                self._state.labels(name, state.value)
            for counter, values in (
                (self._completions, SOURCES),
                (self._missed, MISSED),
                (self._audits, VERDICTS),
                (self._lost, LOSSES),
                (self._connects, CONNECTS),
                (self._disconnects, DISCONNECTS),
                (self._messages, MESSAGE_TYPES),
            ):
                for value in values:
                    counter.labels(name, value)
        for name in (*names, NONE):
            for outcome in OUTCOMES:
                self._finished.labels(name, outcome)

    def _zero(self) -> None:
        """Series that do not depend on the servers: absent ones could not be alerted on."""
        for state in LIVE_STATES:
            self._jobs.labels(state)
        for state in ("queued", "submitted"):
            self._oldest.labels(state)
        for reason in FAILURES:
            self._failures.labels(reason)
        for phase in PHASES:
            self._durations.labels(phase)
        for result in FETCHES:
            self._fetches.labels(result)
        for reason in DROPS:
            self._dropped.labels(reason)
        for directory in DIRECTORIES:
            self._spool_files.labels(directory)
        for reason in SPOOL_REJECTIONS:
            self._spool_rejected.labels(reason)
        for operation in OPERATIONS:
            self._retries.labels(operation, "unreachable")
        for task in TASKS:
            self._restarts.labels(task, "ServerUnreachable")

    def _server(self, name: str | None) -> str:
        return NONE if name is None else label(name, self._servers)

    # --- what the core tells ---------------------------------------------------------------------

    def observe(self, notes: Iterable[Note]) -> None:
        """Count what *notes* tell: those of one batch, in its order."""
        lost: tuple[JobId | None, str] | None = None  # by the note just before
        for note in notes:
            before, lost = lost, None
            data, server = note.data, self._server(note.server)
            match note.kind:
                case "claimed":
                    if data.get("invalid"):
                        self.spool_rejected(data.get("reason") or "invalid_job")
                case "moved":
                    if before is not None and before[0] == note.job and data["state"] == "queued":
                        self.retry("attempt", before[1])
                case "retry":
                    self.retry(data["operation"], data["reason"])
                    lost = before
                case "audit":
                    # A refusal, or an answer that cannot be read, proves nothing by itself.
                    unclear = data["verdict"] in {"refused", "unreadable"}
                    verdict = "unknown" if unclear else label(data["verdict"], VERDICTS)
                    self._audits.labels(server, verdict).inc()
                case "ended":
                    self._completions.labels(server, label(data["source"], SOURCES)).inc()
                    if data["missed"] is not None:
                        self._missed.labels(server, label(data["missed"], MISSED)).inc()
                case "lost":
                    self._lost.labels(server, label(data["cause"], LOSSES)).inc()
                    if data["charged"]:
                        self._charged.labels(server).inc()
                    lost = note.job, data["cause"]
                case "finished":
                    self._finish(note, server)
                case "dropped":
                    self._dropped.labels(label(data["reason"], DROPS)).inc()
                case "fetched":
                    self._outputs.labels(server).inc(data["outputs"])
                    self._output_bytes.labels(server).inc(data["bytes"])
                case "accepted" | "signal":
                    pass  # part of the story; what they lead to is counted
                case _:
                    assert_never(note.kind)

    def _finish(self, note: Note, server: str) -> None:
        data = note.data
        self._finished.labels(server, label(data["outcome"], OUTCOMES)).inc()
        if data["reason"] is not None:
            self._failures.labels(label(data["reason"], FAILURES)).inc()
        for phase, span_s in data["durations_s"].items():
            # A job that never ran would otherwise make runs look fast.
            if span_s > 0 or data["outcome"] == "done":
                self._durations.labels(label(phase, PHASES)).observe(span_s)
        if data["latency_s"] is not None:
            self._latency.observe(data["latency_s"])

    def refresh(self, snapshot: Snapshot) -> None:
        """Set every gauge that says what is so now; called before each scrape is answered."""
        for state in LIVE_STATES:
            self._jobs.labels(state).set(snapshot.counts.get(state, 0))
        for state in ("queued", "submitted"):
            self._oldest.labels(state).set(snapshot.oldest_age_s(state))
        for view in snapshot.servers:
            if view.name not in self._servers:
                continue  # forgotten while this snapshot was made
            for one in ServerState:
                self._state.labels(view.name, one.value).set(one is view.state)
            self._stale.labels(view.name).set(view.stale)
            if view.queue_remaining is not None:
                self._remaining.labels(view.name).set(view.queue_remaining)
        if snapshot.free_bytes is not None:
            self._free.set(snapshot.free_bytes)

    # --- what the shells see ---------------------------------------------------------------------

    def config_read(self, *, ok: bool, at: float) -> None:
        """The configuration was read, at start or by a reload; *at* is seconds since the epoch."""
        self._reload_ok.set(ok)
        if ok:
            self._reload_at.set(at)

    def health(self, server: str, *, ok: bool) -> None:
        """A health probe of *server* ended."""
        self._up.labels(self._server(server)).set(ok)

    def system(self, server: str, stats: SystemStats) -> None:
        """What *server* says of itself now; devices it had before are forgotten."""
        name = self._server(server)
        for gauge in (self._info, self._vram_free, self._vram_total):
            gauge.remove_by_labels({"server": name})
        version = version_label(stats)
        if not stats.devices:
            self._info.labels(name, version, NONE).set(1)
        for device in stats.devices:
            where = device_label(device)
            self._info.labels(name, version, where).set(1)
            self._vram_free.labels(name, where).set(device.vram_free_bytes)
            self._vram_total.labels(name, where).set(device.vram_total_bytes)

    def connect(self, server: str, result: str) -> None:
        """An attempt to connect ended: one of CONNECTS."""
        name, result = self._server(server), label(result, CONNECTS)
        self._connects.labels(name, result).inc()
        self._connected.labels(name).set(result == "ok")

    def disconnect(self, server: str, cause: str) -> None:
        """A connection ended: one of DISCONNECTS."""
        name = self._server(server)
        self._disconnects.labels(name, label(cause, DISCONNECTS)).inc()
        self._connected.labels(name).set(0)

    def message(self, server: str, type_: str, *, at: float) -> None:
        """A message came: *type_* from ``wire.messages.label_of``, or ``binary``."""
        name = self._server(server)
        self._messages.labels(name, label(type_, MESSAGE_TYPES)).inc()
        self._message_at.labels(name).set(at)

    def history_fetch(self, result: str, seconds: float) -> None:
        """One history fetch ended, its retries included: one of FETCHES (unreadable: error)."""
        known = "error" if result == "unreadable" else label(result, FETCHES)
        self._fetches.labels(known).observe(seconds)

    def retry(self, operation: str, reason: str) -> None:
        """Something is tried again: one of OPERATIONS, one of RETRIES (see `reason_of`).

        The core's notes count their own; shells count the tries they make by themselves.
        """
        self._retries.labels(label(operation, OPERATIONS), label(reason, RETRIES)).inc()

    def journal_commit(self, seconds: float) -> None:
        """One group commit took so long."""
        self._commits.observe(seconds)

    def spool_pickup(self, seconds: float) -> None:
        """A dropped file was claimed so long after it was complete."""
        self._pickup.observe(max(0.0, seconds))  # its mtime may lie in the future

    def spool_files(self, directory: str, count: int) -> None:
        """So many files and bundles are in *directory*: one of DIRECTORIES."""
        self._spool_files.labels(label(directory, DIRECTORIES)).set(count)

    def spool_rejected(self, reason: str) -> None:
        """A dropped file gave no job of its own: one of SPOOL_REJECTIONS.

        Not for one that was claimed as an invalid job: its note is counted by `observe`.
        """
        self._spool_rejected.labels(label(reason, SPOOL_REJECTIONS)).inc()

    def task_restart(self, task: str, error: Exception) -> None:
        """A supervised task was started again after *error*; *task* without its server."""
        kind = label(type(error).__name__, TASK_ERRORS)
        self._restarts.labels(label(task, TASKS), kind).inc()
