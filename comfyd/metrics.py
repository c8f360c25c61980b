"""Every metric comfyd has, in one place: alert rules, boards and the README are held to this list.

Labels are closed sets: a value that is not listed here is counted as ``other``, so nothing that a
server, a file or a person says can add a series. Each number has one source: what happens in the
core is told by its notes (`observe`), what is so now by a snapshot at scrape time (`refresh`), and
the rest by the shell that sees it. Built once and passed down; tests build their own.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeVar, assert_never

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
# What a request fails by: see `reason_of`.
_REQUEST: Final = frozenset({"refused", "unreachable", "status", "protocol"})
# By operation, since only these pairs happen.
RETRIES: Final[Mapping[str, frozenset[str]]] = {
    "submit": _REQUEST | {"timeout"},
    "history": _REQUEST,
    "completion": frozenset({"empty", "error", "unreadable", "conflict", "disk"}),
    "download": _REQUEST | {"missing", "invalid", "server", "disk"},
    "upload": _REQUEST | {"disk"},
    "attempt": frozenset(
        {
            "restart", "absent", "abandoned", "outputs", "stalled",
            "error", "rejected", "recalled", "conflict", "unconfirmed",
        }
    ),
}  # fmt: skip
OPERATIONS: Final = frozenset(RETRIES)
FETCHES: Final = frozenset({"found", "empty", "error"})
OLDEST: Final = frozenset({"queued", "submitted"})
SERVER_STATES: Final = frozenset(state.value for state in ServerState)
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
RESULTS: Final = frozenset({"done", "failed"})
UNIT_RESTARTS: Final = frozenset({"ok", "failed", "timeout"})
SPOOL_REJECTIONS: Final = frozenset({"invalid_job", "duplicate", "conflict", "unmovable"})
TASKS: Final = frozenset({"tracker", "prober", "health"})  # the supervised ones
TASK_ERRORS: Final = frozenset(
    {"ServerError", "ServerRefused", "ServerUnreachable", "ServerStatus", "ServerProtocol"}
)
# torch.device types that ComfyUI names (comfy/model_management.py), each with an index up to 15.
DEVICE_TYPES: Final = frozenset(
    {"cpu", "cuda", "mps", "xpu", "npu", "mlu", "hpu", "privateuseone", "directml"}
)
DEVICES_MAX: Final = 16
# OpenMetrics: an exemplar has so many characters at most, names and values together.
EXEMPLAR_MAX: Final = 128

# fmt: off
LATENCIES_S: Final = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
DURATIONS_S: Final = (.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
# fmt: on


# Values that no set can list, in words.
SERVER: Final = "a name from the configuration"
SERVER_OR_NONE: Final = f"{SERVER}, or none if it was never sent"
DEVICE: Final = "cpu, cuda:0, and the like"
VERSION: Final = "a version"


Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class Family(NamedTuple):
    """One metric as declared.

    Attributes:
      labels: What each label may say besides ``other``: a closed set, or words for an open one.

    """

    name: str
    kind: str
    text: str
    labels: Mapping[str, frozenset[str] | str]
    metric: Counter | Gauge | Histogram


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


def exemplar(job: JobId | None) -> dict[str, str] | None:
    """What leads from a slow bucket to a job that fell into it: its id, if that is short enough.

    In OpenMetrics only, and no label: it makes no series.
    """
    if job is None or len("job_id") + len(job) > EXEMPLAR_MAX:
        return None
    return {"job_id": job}


def version_label(stats: SystemStats) -> str:
    """The ``version`` label: the numbers of ComfyUI's version, whatever is written around them."""
    numbers = stats.version_tuple
    return OTHER if numbers is None else ".".join(str(number) for number in numbers)


def _zero(family: Family, server: str = "") -> None:
    """Let every series that *family* can have (for *server*) start at 0, if they can be listed."""
    sets: list[Iterable[str]] = []
    for name, values in family.labels.items():
        if name == "server":
            sets.append([server])
        elif isinstance(values, str):
            return
        else:
            sets.append(values)
    if sets:
        for combination in itertools.product(*sets):
            family.metric.labels(*combination)


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

        self.families: list[Family] = []

        def declared(
            metric: Metric,
            kind: str,
            name: str,
            text: str,
            labels: Mapping[str, frozenset[str] | str],
        ) -> Metric:
            self.families.append(Family(name, kind, text, labels, metric))
            return metric

        def counter(name: str, text: str, **labels: frozenset[str] | str) -> Counter:
            made = Counter(name, text, tuple(labels), registry=registry)
            return declared(made, "counter", name, text, labels)

        def gauge(name: str, text: str, **labels: frozenset[str] | str) -> Gauge:
            made = Gauge(name, text, tuple(labels), registry=registry)
            return declared(made, "gauge", name, text, labels)

        def histogram(
            name: str, text: str, bounds_s: tuple[float, ...], **labels: frozenset[str] | str
        ) -> Histogram:
            made = Histogram(name, text, tuple(labels), buckets=bounds_s, registry=registry)
            return declared(made, "histogram", name, text, labels)

        self._build = gauge(
            "comfyd_build_info",
            "1, with the versions of comfyd and Python.",
            version=VERSION,
            python=VERSION,
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
            "comfyd_server_up",
            "Whether the last health probe of the server was good.",
            server=SERVER,
        )
        self._state = gauge(
            "comfyd_server_state",
            "1 for the current state of the server.",
            server=SERVER,
            state=SERVER_STATES,
        )
        self._draining = gauge(
            "comfyd_server_draining",
            "Whether the server is to get nothing more: drained, or configured no more; up or not.",
            server=SERVER,
        )
        self._info = gauge(
            "comfyd_server_info",
            "1, with ComfyUI's version and each of the server's devices.",
            server=SERVER,
            version=VERSION,
            device=DEVICE,
        )
        self._vram_free = gauge(
            "comfyd_server_vram_free_bytes",
            "Free memory of a device.",
            server=SERVER,
            device=DEVICE,
        )
        self._vram_total = gauge(
            "comfyd_server_vram_total_bytes", "Memory of a device.", server=SERVER, device=DEVICE
        )
        self._remaining = gauge(
            "comfyd_server_queue_remaining",
            "Prompts on the server by its own count, those of others included.",
            server=SERVER,
        )
        self._jobs = gauge("comfyd_jobs", "Jobs now in each state.", state=frozenset(LIVE_STATES))
        self._oldest = gauge(
            "comfyd_oldest_job_age_seconds",
            "Time since the oldest job in the state was claimed (submitted: running ones too).",
            state=OLDEST,
        )
        self._stale = gauge(
            "comfyd_stale_jobs", "Jobs on the server that have been silent too long.", server=SERVER
        )
        self._finished = counter(
            "comfyd_jobs_finished_total",
            "Jobs that reached their end.",
            server=SERVER_OR_NONE,
            outcome=OUTCOMES,
        )
        self._failures = counter(
            "comfyd_job_failures_total", "Jobs that ended without a result.", reason=FAILURES
        )
        self._durations = histogram(
            "comfyd_job_duration_seconds",
            "Time finished jobs spent in each phase.",
            DURATIONS_S,
            phase=PHASES,
        )
        self._latency = histogram(
            "comfyd_completion_latency_seconds",
            "Time from the end signal to the published result.",
            LATENCIES_S,
        )
        self._completions = counter(
            "comfyd_completions_total",
            "Prompts that ended, by how that was learnt.",
            server=SERVER,
            source=SOURCES,
        )
        self._missed = counter(
            "comfyd_missed_signals_total",
            "Prompts whose end signal did not reach us.",
            server=SERVER,
            cause=MISSED,
        )
        self._retries = counter(
            "comfyd_retries_total",
            "Operations that were tried again.",
            operation=OPERATIONS,
            reason=frozenset().union(*RETRIES.values()),
        )
        self._fetches = histogram(
            "comfyd_history_fetch_seconds",
            "Time of one history fetch, its retries included.",
            LATENCIES_S,
            result=FETCHES,
        )
        self._audits = counter(
            "comfyd_audits_total",
            "Prompts looked up, by what was found.",
            server=SERVER,
            verdict=VERDICTS,
        )
        self._lost = counter(
            "comfyd_attempts_lost_total",
            "Attempts given up, by cause.",
            server=SERVER,
            cause=LOSSES,
        )
        self._charged = counter(
            "comfyd_attempts_charged_total", "Attempts held against their job.", server=SERVER
        )
        self._dropped = counter(
            "comfyd_facts_dropped_total", "Outdated answers, foreign or late hints.", reason=DROPS
        )
        self._connected = gauge(
            "comfyd_websocket_connected", "Whether the server's WebSocket is open.", server=SERVER
        )
        self._connects = counter(
            "comfyd_websocket_connects_total",
            "Attempts to connect.",
            server=SERVER,
            result=CONNECTS,
        )
        self._disconnects = counter(
            "comfyd_websocket_disconnects_total",
            "Connections that ended.",
            server=SERVER,
            cause=DISCONNECTS,
        )
        self._messages = counter(
            "comfyd_websocket_messages_total",
            "Messages received.",
            server=SERVER,
            type=MESSAGE_TYPES,
        )
        self._message_at = gauge(
            "comfyd_websocket_last_message_timestamp_seconds",
            "When the last message came; 0 before the first.",
            server=SERVER,
        )
        self._spool_files = gauge(
            "comfyd_spool_files",
            "Files and bundles in the spool, as last seen.",
            directory=DIRECTORIES,
        )
        self._spool_rejected = counter(
            "comfyd_spool_rejected_total",
            "Dropped files that gave no job of their own.",
            reason=SPOOL_REJECTIONS,
        )
        self._pickup = histogram(
            "comfyd_spool_pickup_seconds", "Time from a complete file to its claim.", LATENCIES_S
        )
        self._free = gauge("comfyd_spool_free_bytes", "Space left on the spool's file system.")
        self._min_free = gauge(
            "comfyd_spool_min_free_bytes",
            "Space that is to stay free there (outputs.min_free_bytes).",
        )
        self._no_space = gauge(
            "comfyd_waiting_for_space", "Whether everything waits for space on a disk."
        )
        self._paused = gauge("comfyd_intake_paused", "Whether a person stopped the intake.")
        self._outputs = counter("comfyd_outputs_total", "Output files fetched.", server=SERVER)
        self._output_bytes = counter(
            "comfyd_output_bytes_total", "Size of the output files fetched.", server=SERVER
        )
        self._commits = histogram(
            "comfyd_journal_commit_seconds", "Time of one group commit.", LATENCIES_S
        )
        self._restarts = counter(
            "comfyd_task_restarts_total",
            "Restarts of supervised tasks.",
            task=TASKS,
            error=TASK_ERRORS,
        )
        self._removed = counter(
            "comfyd_results_removed_total",
            "Results that retention removed.",
            directory=RESULTS,
        )
        self._server_restarts = counter(
            "comfyd_server_restarts_total",
            "Restarts of a wedged server's systemd unit.",
            server=SERVER,
            result=UNIT_RESTARTS,
        )
        self._build.labels(version, platform.python_version()).set(1)
        for family in self.families:
            if "server" not in family.labels and family.metric is not self._retries:
                _zero(family)
        for operation, reasons in RETRIES.items():
            for reason in reasons:
                self._retries.labels(operation, reason)

    def prepare(self, server_names: Iterable[str]) -> None:
        """Make *server_names* the only values of ``server``, and let their series start at 0.

        After a reload the counters of servers that stay go on; those that are gone disappear.
        """
        names = frozenset(server_names)
        by_server = [family for family in self.families if "server" in family.labels]
        for family in by_server:
            for gone in self._servers - names:
                family.metric.remove_by_labels({"server": gone})
            for name in names:
                _zero(family, name)
        for outcome in OUTCOMES:
            self._finished.labels(NONE, outcome)
        self._servers = names

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
                    lost = None if data["operation"] == "attempt" else before
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
                    self._charged.labels(server).inc(data["charged"])
                    lost = note.job, data["cause"]
                case "finished":
                    self._finish(note, server)
                case "dropped":
                    self._dropped.labels(label(data["reason"], DROPS)).inc()
                case "fetched":
                    self._outputs.labels(server).inc(data["outputs"])
                    self._output_bytes.labels(server).inc(data["bytes"])
                case "charged":
                    self._charged.labels(server).inc(data["charged"])
                case (
                    "accepted" | "started" | "signal" | "blamed" | "retried" | "fenced" | "unfenced"
                ):
                    pass  # part of the story; what they lead to is counted
                case _:
                    assert_never(note.kind)

    def _finish(self, note: Note, server: str) -> None:
        data, example = note.data, exemplar(note.job)
        self._finished.labels(server, label(data["outcome"], OUTCOMES)).inc()
        if data["reason"] is not None:
            self._failures.labels(label(data["reason"], FAILURES)).inc()
        for phase, span_s in data["durations_s"].items():
            # A job that never ran would otherwise make runs look fast.
            if span_s > 0 or data["outcome"] == "done":
                self._durations.labels(label(phase, PHASES)).observe(span_s, example)
        if data["latency_s"] is not None:
            self._latency.observe(data["latency_s"], example)

    def refresh(self, snapshot: Snapshot) -> None:
        """Set every gauge that says what is so now; called before each scrape is answered."""
        for state in LIVE_STATES:
            self._jobs.labels(state).set(snapshot.counts.get(state, 0))
        for state in OLDEST:
            self._oldest.labels(state).set(snapshot.oldest_age_s(state))
        for view in snapshot.servers:
            if view.name not in self._servers:
                continue  # forgotten while this snapshot was made
            for one in ServerState:
                self._state.labels(view.name, one.value).set(one is view.state)
            self._draining.labels(view.name).set(view.draining)
            self._stale.labels(view.name).set(view.stale)
            if view.queue_remaining is not None:
                self._remaining.labels(view.name).set(view.queue_remaining)
            elif view.state is ServerState.DOWN:
                self._remaining.remove_by_labels({"server": view.name})
        if snapshot.free_bytes is not None:
            self._free.set(snapshot.free_bytes)
        if snapshot.min_free_bytes is not None:
            self._min_free.set(snapshot.min_free_bytes)
        self._no_space.set(bool(snapshot.waiting))
        self._paused.set(snapshot.paused)

    # --- what the shells see ---------------------------------------------------------------------

    def config_read(self, *, ok: bool, at: float) -> None:
        """The configuration was read, at start or by a reload; *at* is seconds since the epoch."""
        self._reload_ok.set(ok)
        if ok:
            self._reload_at.set(at)

    def health(self, server: str, *, ok: bool) -> None:
        """A health probe of *server* ended."""
        name = self._server(server)
        self._up.labels(name).set(ok)
        if not ok:  # what it said before is no news of it
            self._vram_free.remove_by_labels({"server": name})

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
        """Something is tried again: an operation of RETRIES, for one of its reasons.

        The core's notes count their own; shells count the tries they make by themselves.
        """
        reasons = RETRIES.get(operation, frozenset())
        self._retries.labels(label(operation, OPERATIONS), label(reason, reasons)).inc()

    def journal_commit(self, seconds: float) -> None:
        """One group commit took so long."""
        self._commits.observe(seconds)

    def spool_pickup(self, seconds: float) -> None:
        """A dropped file was claimed so long after it was complete."""
        self._pickup.observe(max(0.0, seconds))  # its mtime may lie in the future

    def spool_files(self, directory: str, count: int) -> None:
        """So many files and bundles are in *directory*: one of DIRECTORIES."""
        self._spool_files.labels(label(directory, DIRECTORIES)).set(count)

    def results_removed(self, directory: str, count: int) -> None:
        """Retention removed *count* results from *directory*: one of RESULTS."""
        self._removed.labels(label(directory, RESULTS)).inc(count)

    def server_restart(self, server: str, result: str) -> None:
        """A restart of a wedged *server* ended: one of UNIT_RESTARTS."""
        result = label(result, UNIT_RESTARTS)
        self._server_restarts.labels(self._server(server), result).inc()

    def spool_rejected(self, reason: str) -> None:
        """A dropped file gave no job of its own: one of SPOOL_REJECTIONS.

        Not for one that was claimed as an invalid job: its note is counted by `observe`.
        """
        self._spool_rejected.labels(label(reason, SPOOL_REJECTIONS)).inc()

    def task_restart(self, task: str, error: Exception) -> None:
        """A supervised task was started again after *error*; *task* without its server."""
        kind = label(type(error).__name__, TASK_ERRORS)
        self._restarts.labels(label(task, TASKS), kind).inc()
