"""The exposition is held to the contract, to Prometheus' naming rules, and to a fixed size."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from comfyd import metrics as m
from comfyd.comfyui import listener
from comfyd.core.model import JobId, State
from comfyd.core.notes import Kind, Note
from comfyd.core.present import LIVE_STATES, SHOWN_STATES, shown_counts
from comfyd.core.snapshot import ServerState, ServerView, Snapshot
from comfyd.core.wire.messages import MESSAGE_TYPES
from comfyd.core.wire.stats import Device, SystemStats
from comfyd.errors import (
    DiskFull,
    ServerProtocol,
    ServerRefused,
    ServerStatus,
    ServerUnreachable,
)
from comfyd.metrics import Metrics

# name: (type, labels). What is public: a change here is a change for everyone's boards and alerts.
CONTRACT: dict[str, tuple[str, tuple[str, ...]]] = {
    "comfyd_build_info": ("gauge", ("python", "version")),
    "comfyd_config_last_reload_successful": ("gauge", ()),
    "comfyd_config_last_reload_success_timestamp_seconds": ("gauge", ()),
    "comfyd_server_up": ("gauge", ("server",)),
    "comfyd_server_state": ("gauge", ("server", "state")),
    "comfyd_server_draining": ("gauge", ("server",)),
    "comfyd_server_info": ("gauge", ("device", "server", "version")),
    "comfyd_server_vram_free_bytes": ("gauge", ("device", "server")),
    "comfyd_server_vram_total_bytes": ("gauge", ("device", "server")),
    "comfyd_server_queue_remaining": ("gauge", ("server",)),
    "comfyd_jobs": ("gauge", ("state",)),
    "comfyd_oldest_job_age_seconds": ("gauge", ("state",)),
    "comfyd_stale_jobs": ("gauge", ("server",)),
    "comfyd_jobs_finished_total": ("counter", ("outcome", "server")),
    "comfyd_job_failures_total": ("counter", ("reason",)),
    "comfyd_job_duration_seconds": ("histogram", ("phase",)),
    "comfyd_completion_latency_seconds": ("histogram", ()),
    "comfyd_completions_total": ("counter", ("server", "source")),
    "comfyd_missed_signals_total": ("counter", ("cause", "server")),
    "comfyd_retries_total": ("counter", ("operation", "reason")),
    "comfyd_history_fetch_seconds": ("histogram", ("result",)),
    "comfyd_audits_total": ("counter", ("server", "verdict")),
    "comfyd_attempts_lost_total": ("counter", ("cause", "server")),
    "comfyd_attempts_charged_total": ("counter", ("server",)),
    "comfyd_facts_dropped_total": ("counter", ("reason",)),
    "comfyd_websocket_connected": ("gauge", ("server",)),
    "comfyd_websocket_connects_total": ("counter", ("result", "server")),
    "comfyd_websocket_disconnects_total": ("counter", ("cause", "server")),
    "comfyd_websocket_messages_total": ("counter", ("server", "type")),
    "comfyd_websocket_last_message_timestamp_seconds": ("gauge", ("server",)),
    "comfyd_spool_files": ("gauge", ("directory",)),
    "comfyd_spool_rejected_total": ("counter", ("reason",)),
    "comfyd_spool_pickup_seconds": ("histogram", ()),
    "comfyd_spool_free_bytes": ("gauge", ()),
    "comfyd_spool_min_free_bytes": ("gauge", ()),
    "comfyd_waiting_for_space": ("gauge", ()),
    "comfyd_intake_paused": ("gauge", ()),
    "comfyd_outputs_total": ("counter", ("server",)),
    "comfyd_output_bytes_total": ("counter", ("server",)),
    "comfyd_journal_commit_seconds": ("histogram", ()),
    "comfyd_task_restarts_total": ("counter", ("error", "task")),
    "comfyd_results_removed_total": ("counter", ("directory",)),
    "comfyd_server_restarts_total": ("counter", ("result", "server")),
    "python_info": ("gauge", ("implementation", "major", "minor", "patchlevel", "version")),
}

J = JobId("portrait.01K0000000000000000000000A")
STATS = SystemStats(
    "v0.3.64-2-gabc",
    (0, 3, 64),
    (Device("cuda:0 NVIDIA RTX 4090 : cudaMallocAsync", "cuda", 0, 24 << 30, 20 << 30),),
)
DURATIONS = {"wait": 1.0, "queue": 2.0, "run": 3.0, "collect": 0.5, "total": 6.5}

# One note of each kind, as the core emits them.
NOTES: dict[str, Note] = {
    "claimed": Note("claimed", J, None, {"payload": "a.json", "invalid": True}),
    "retried": Note("retried", J, None, {"new": "b"}),
    "moved": Note("moved", J, "a", {"state": "submitted"}),
    "accepted": Note("accepted", J, "a", {"number": 3.0}),
    "started": Note("started", J, "a"),
    "fenced": Note("fenced", J, "a"),
    "unfenced": Note("unfenced", J, "a"),
    "charged": Note("charged", J, "a", {"charged": 1, "reason": "stalled"}),
    "blamed": Note("blamed", J, "a", {"blame": "server"}),
    "signal": Note("signal", J, "a", {"sign": "ended"}),
    "retry": Note("retry", J, "a", {"operation": "completion", "reason": "empty"}),
    "audit": Note("audit", J, "a", {"verdict": "finished", "reason": ""}),
    "ended": Note("ended", J, "a", {"source": "audit", "missed": "deaf", "end": "success"}),
    "lost": Note("lost", J, "a", {"cause": "restart", "charged": True}),
    "finished": Note(
        "finished", J, "a",
        {"outcome": "done", "reason": None, "durations_s": DURATIONS, "latency_s": 0.2},
    ),
    "dropped": Note("dropped", J, "a", {"reason": "late_hint"}, story=False),
    "fetched": Note("fetched", J, "a", {"outputs": 2, "bytes": 4096}),
}  # fmt: skip


@pytest.fixture
def metrics():
    one = Metrics(CollectorRegistry(), version="1.2.3")
    one.prepare(["a", "b"])
    return one


def text_of(metrics):
    return generate_latest(metrics.registry).decode()


def samples_of(metrics):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text_of(metrics))
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return samples_of(metrics)[name, tuple(sorted(labels.items()))]


def changes(metrics, act):
    """What *act* added to, by series; timestamps and the process' own left out."""
    before = samples_of(metrics)
    act()
    after = samples_of(metrics)
    assert after.keys() >= before.keys()
    return {
        (name, *(v for _, v in labels)): after[name, labels] - before.get((name, labels), 0)
        for name, labels in after
        if name.startswith("comfyd_") and after[name, labels] != before.get((name, labels), 0)
    }


def test_names_types_and_labels_are_the_contract(metrics):
    metrics.system("a", STATS)
    found = {}
    for family in parse_text(text_of(metrics)):
        if family.name.startswith("process_"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        label_sets = {tuple(sorted(set(s.labels) - {"le"})) for s in family.samples}
        (labels,) = label_sets  # every one has a series from the start, and all look alike
        found[name] = family.type, labels
    assert found == CONTRACT


def test_the_process_tells_of_itself(metrics):
    assert "process_resident_memory_bytes" in text_of(metrics)
    assert value(metrics, "comfyd_build_info", version="1.2.3", python=_python()) == 1


def _python():
    import platform

    return platform.python_version()


def test_both_formats_pass_the_parsers_and_hold_no_created_series(metrics):
    metrics.observe(NOTES.values())
    metrics.system("a", STATS)
    opened = generate_openmetrics(metrics.registry).decode()
    assert {f.name for f in parse_openmetrics(opened)} == {
        f.name for f in parse_text(text_of(metrics))
    }
    assert "_created" not in opened
    assert "_created" not in text_of(metrics)


def test_alert_inputs_are_there_at_zero(metrics):
    found = samples_of(metrics)
    for name, (kind, _) in CONTRACT.items():
        series = [v for (n, _), v in found.items() if n.startswith(name)]
        if name not in {"comfyd_build_info", "python_info"} and series:
            assert set(series) == {0}, name
        vram = {"comfyd_server_vram_free_bytes", "comfyd_server_vram_total_bytes"}
        empty = {"comfyd_server_info", *vram}  # not known before a server says so
        assert bool(series) == (name not in empty), (name, kind)
    for server in "ab":
        for cause in m.MISSED:
            labels = (("cause", cause), ("server", server))
            assert ("comfyd_missed_signals_total", labels) in found


def test_every_kind_of_note_has_its_example_here():
    assert set(NOTES) == set(get_args(Kind))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("claimed", {("comfyd_spool_rejected_total", "invalid_job"): 1}),
        ("retried", {}),
        ("moved", {}),
        ("accepted", {}),
        ("signal", {}),
        ("retry", {("comfyd_retries_total", "completion", "empty"): 1}),
        ("audit", {("comfyd_audits_total", "a", "finished"): 1}),
        (
            "ended",
            {
                ("comfyd_completions_total", "a", "audit"): 1,
                ("comfyd_missed_signals_total", "deaf", "a"): 1,
            },
        ),
        (
            "lost",
            {
                ("comfyd_attempts_lost_total", "restart", "a"): 1,
                ("comfyd_attempts_charged_total", "a"): 1,
            },
        ),
        ("dropped", {("comfyd_facts_dropped_total", "late_hint"): 1}),
        (
            "fetched",
            {("comfyd_outputs_total", "a"): 2, ("comfyd_output_bytes_total", "a"): 4096},
        ),
    ],
)
def test_a_note_moves_its_metric_and_no_other(metrics, kind, expected):
    assert changes(metrics, lambda: metrics.observe([NOTES[kind]])) == expected


def test_a_key_that_is_taken_is_counted_as_a_conflict(metrics):
    note = Note(
        "claimed", JobId("a"), None, {"payload": "a", "invalid": True, "reason": "conflict"}
    )
    found = changes(metrics, lambda: metrics.observe([note]))
    assert found == {("comfyd_spool_rejected_total", "conflict"): 1}


def test_a_finished_job_is_counted_and_timed(metrics):
    metrics.observe([NOTES["finished"]])
    assert value(metrics, "comfyd_jobs_finished_total", server="a", outcome="done") == 1
    assert value(metrics, "comfyd_completion_latency_seconds_count") == 1
    assert value(metrics, "comfyd_completion_latency_seconds_sum") == pytest.approx(0.2)
    for phase, span_s in DURATIONS.items():
        assert value(metrics, "comfyd_job_duration_seconds_sum", phase=phase) == span_s


def test_a_job_that_never_ran_does_not_make_runs_look_fast(metrics):
    data = {
        "outcome": "failed",
        "reason": "rejected",
        "durations_s": {"wait": 4.0, "queue": 0.0, "run": 0.0, "collect": 0.0, "total": 4.0},
        "latency_s": None,
    }
    metrics.observe([Note("finished", J, None, data)])
    assert value(metrics, "comfyd_jobs_finished_total", server="none", outcome="failed") == 1
    assert value(metrics, "comfyd_job_failures_total", reason="rejected") == 1
    assert value(metrics, "comfyd_job_duration_seconds_count", phase="run") == 0
    assert value(metrics, "comfyd_job_duration_seconds_count", phase="wait") == 1
    assert value(metrics, "comfyd_completion_latency_seconds_count") == 0


def test_a_lost_attempt_is_a_retry_only_if_the_job_goes_back_to_the_queue(metrics):
    lost, queued = NOTES["lost"], Note("moved", J, None, {"state": "queued"})
    ended = Note("moved", J, None, {"state": "collecting"})
    other = Note("moved", JobId("other"), None, {"state": "queued"})
    metrics.observe([lost, queued, lost, ended, lost, other, queued])
    assert value(metrics, "comfyd_retries_total", operation="attempt", reason="restart") == 1
    assert value(metrics, "comfyd_attempts_lost_total", server="a", cause="restart") == 3


@pytest.mark.parametrize("said", ["refused", "unreadable", "unknown"])
def test_an_audit_that_proves_nothing_is_unknown(metrics, said):
    metrics.observe([Note("audit", J, "b", {"verdict": said, "reason": ""})])
    assert value(metrics, "comfyd_audits_total", server="b", verdict="unknown") == 1


def test_a_snapshot_sets_every_gauge_of_now(metrics):
    counts = shown_counts({State.SUBMITTED: 5, State.QUEUED: 7, State.DONE: 9}, running=2)
    assert counts["submitted"] == 3
    assert set(counts) == set(SHOWN_STATES)
    view = ServerView(
        name="a", url="http://a", state=ServerState.DEAF, stale=2, queue_remaining=4, draining=True
    )
    gone = ServerView(name="gone", url="http://g", state=ServerState.UP)
    snapshot = Snapshot(
        at=100.0,
        version="1",
        servers=(view, gone),
        counts=counts,
        oldest_at={"queued": 40.0, "submitted": None},
        free_bytes=123,
        min_free_bytes=99,
        paused=True,
        waiting="Waiting for space.",
    )
    metrics.refresh(snapshot)
    assert {s: value(metrics, "comfyd_jobs", state=s) for s in LIVE_STATES} == {
        **dict.fromkeys(LIVE_STATES, 0), "queued": 7, "submitted": 3, "running": 2,
    }  # fmt: skip
    assert value(metrics, "comfyd_oldest_job_age_seconds", state="queued") == 60
    assert value(metrics, "comfyd_oldest_job_age_seconds", state="submitted") == 0
    one_hot = {
        s.value: value(metrics, "comfyd_server_state", server="a", state=s.value)
        for s in ServerState
    }
    assert one_hot == {"up": 0, "down": 0, "deaf": 1, "wedged": 0, "draining": 0}
    assert value(metrics, "comfyd_stale_jobs", server="a") == 2
    assert value(metrics, "comfyd_server_queue_remaining", server="a") == 4
    assert value(metrics, "comfyd_spool_free_bytes") == 123
    assert value(metrics, "comfyd_spool_min_free_bytes") == 99
    assert value(metrics, "comfyd_server_draining", server="a") == 1
    assert value(metrics, "comfyd_server_draining", server="b") == 0
    assert value(metrics, "comfyd_waiting_for_space") == 1
    assert value(metrics, "comfyd_intake_paused") == 1
    metrics.refresh(Snapshot(at=1.0, version="1"))
    assert value(metrics, "comfyd_waiting_for_space") == 0
    assert value(metrics, "comfyd_intake_paused") == 0
    assert "gone" not in text_of(metrics)


def test_the_shells_tell_what_they_see(metrics):
    metrics.config_read(ok=True, at=50.0)
    metrics.config_read(ok=False, at=60.0)
    metrics.health("a", ok=True)
    metrics.connect("a", "ok")
    metrics.connect("b", "ok")
    metrics.disconnect("b", "ping_timeout")
    metrics.message("a", "executing", at=77.0)
    metrics.history_fetch("unreadable", 0.3)
    metrics.journal_commit(0.002)
    metrics.spool_pickup(-5.0)
    metrics.spool_files("new", 3)
    metrics.spool_rejected("duplicate")
    metrics.results_removed("failed", 3)
    metrics.server_restart("a", "timeout")
    metrics.task_restart("tracker", ServerRefused("no"))
    metrics.task_restart("tracker", KeyError("bug"))
    for name, labels, expected in (
        ("comfyd_config_last_reload_successful", {}, 0),
        ("comfyd_config_last_reload_success_timestamp_seconds", {}, 50),
        ("comfyd_server_up", {"server": "a"}, 1),
        ("comfyd_websocket_connected", {"server": "a"}, 1),
        ("comfyd_websocket_connected", {"server": "b"}, 0),
        ("comfyd_websocket_disconnects_total", {"server": "b", "cause": "ping_timeout"}, 1),
        ("comfyd_websocket_messages_total", {"server": "a", "type": "executing"}, 1),
        ("comfyd_websocket_last_message_timestamp_seconds", {"server": "a"}, 77),
        ("comfyd_history_fetch_seconds_count", {"result": "error"}, 1),
        ("comfyd_journal_commit_seconds_count", {}, 1),
        ("comfyd_spool_pickup_seconds_sum", {}, 0),
        ("comfyd_spool_files", {"directory": "new"}, 3),
        ("comfyd_spool_rejected_total", {"reason": "duplicate"}, 1),
        ("comfyd_task_restarts_total", {"task": "tracker", "error": "ServerRefused"}, 1),
        ("comfyd_task_restarts_total", {"task": "tracker", "error": "other"}, 1),
        ("comfyd_results_removed_total", {"directory": "failed"}, 3),
        ("comfyd_server_restarts_total", {"server": "a", "result": "timeout"}, 1),
    ):
        assert value(metrics, name, **labels) == expected, name


def test_a_changed_device_replaces_the_old_one(metrics):
    metrics.system("a", STATS)
    labels = {"server": "a", "version": "0.3.64", "device": "cuda:0"}
    assert value(metrics, "comfyd_server_info", **labels) == 1
    assert value(metrics, "comfyd_server_vram_free_bytes", server="a", device="cuda:0") == 20 << 30
    metrics.system("a", SystemStats("what?", None, (Device("", "cpu", None, 8, 4),)))
    assert value(metrics, "comfyd_server_info", server="a", version="other", device="cpu") == 1
    assert "cuda:0" not in text_of(metrics)
    metrics.system("a", SystemStats("0.4", (0, 4, 0)))
    assert value(metrics, "comfyd_server_info", server="a", version="0.4.0", device="none") == 1


def test_a_server_that_is_configured_no_more_disappears_and_the_others_go_on(metrics):
    metrics.observe([NOTES["ended"]])
    metrics.prepare(["a", "c"])
    assert value(metrics, "comfyd_completions_total", server="a", source="audit") == 1
    assert value(metrics, "comfyd_completions_total", server="c", source="audit") == 0
    assert 'server="b"' not in text_of(metrics)


# --- exemplars ------------------------------------------------------------------------------------


def exemplars(metrics):
    """The exemplars of an OpenMetrics exposition, by series."""
    text = generate_openmetrics(metrics.registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.exemplar
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_a_bucket_names_a_job_that_fell_into_it(metrics):
    metrics.observe([NOTES["finished"]])
    found = exemplars(metrics)
    latency = found["comfyd_completion_latency_seconds_bucket", ("le", "0.25")]
    assert (latency.labels, latency.value) == ({"job_id": J}, 0.2)
    run = found["comfyd_job_duration_seconds_bucket", ("le", "5.0"), ("phase", "run")]
    assert (run.labels, run.value) == ({"job_id": J}, 3.0)
    assert len(found) == 1 + len(DURATIONS)
    assert J not in text_of(metrics)  # the plain format has no place for it


def test_the_longest_job_id_fits_and_a_longer_one_is_left_out(metrics):
    finished = NOTES["finished"]
    longest = JobId("x" * 64 + ".01K0000000000000000000000A")
    metrics.observe([Note("finished", longest, "a", finished.data)])
    assert {one.labels["job_id"] for one in exemplars(metrics).values()} == {longest}
    metrics.observe([Note("finished", JobId("y" * 999), "a", finished.data)])
    assert {one.labels["job_id"] for one in exemplars(metrics).values()} == {longest}
    assert value(metrics, "comfyd_completion_latency_seconds_count") == 2


# --- nothing anyone says adds a series -----------------------------------------------------------


def hostile(metrics, word, number):
    """Everything that can be told to *metrics*, with *word* wherever a word goes."""
    metrics.observe(
        [
            Note("claimed", JobId(word), word, {"payload": word, "invalid": True}),
            Note("retry", JobId(word), word, {"operation": word, "reason": word}),
            Note("audit", JobId(word), word, {"verdict": word, "reason": word}),
            Note("ended", JobId(word), word, {"source": word, "missed": word}),
            Note("lost", JobId(word), word, {"cause": word, "charged": True}),
            Note("moved", JobId(word), word, {"state": "queued"}),
            Note(
                "finished", JobId(word), word,
                {"outcome": word, "reason": word, "durations_s": {word: 1.0}, "latency_s": 1.0},
            ),
            Note("dropped", JobId(word), word, {"reason": word}),
            Note("fetched", JobId(word), word, {"outputs": 1, "bytes": 1}),
        ]
    )  # fmt: skip
    metrics.health(word, ok=True)
    device = Device(word, word, number, number, number)
    metrics.system(word, SystemStats(word, None, (device, Device(word, "cuda", 99 + number, 1, 1))))
    metrics.system("a", SystemStats(word, (number, number, number), (device,)))
    metrics.connect(word, word)
    metrics.disconnect(word, word)
    metrics.message(word, word, at=1.0)
    metrics.history_fetch(word, 1.0)
    metrics.retry(word, word)
    metrics.spool_files(word, number)
    metrics.spool_rejected(word)
    metrics.results_removed(word, 1)
    metrics.server_restart(word, word)
    metrics.task_restart(word, type(word or "X", (Exception,), {})())
    view = ServerView(name=word, url=word, state=ServerState.UP)
    metrics.refresh(Snapshot(at=1.0, version=word, servers=(view,), counts={word: 1}))


def test_ten_thousand_hostile_observations_add_no_series(metrics):
    words = [
        'a"} 1\nevil{x="',
        "{}",
        "\\",
        "é\u202e",
        "../../etc/passwd",
        "",
        " a",
        "A",
        "b\n",
        "x" * 999,
    ]
    for number, word in enumerate(words):
        hostile(metrics, word, number)
    few = len(samples_of(metrics))
    for number in range(500):  # of more than twenty observations each
        hostile(metrics, f"{words[number % len(words)]}{number}", number)
    assert len(samples_of(metrics)) == few
    assert few < 1000  # two servers: 4 ms of the loop for each scrape, at worst
    assert "evil" not in text_of(metrics)
    assert "passwd" not in text_of(metrics)


@given(st.text() | st.none(), st.frozensets(st.text()))
def test_a_label_is_allowed_or_other(word, allowed):
    given_label = m.label(word, allowed)
    assert given_label == word if word in allowed else given_label == "other"


def test_a_scrape_of_sixteen_servers_stays_under_1500_series():
    """Whatever happened by then: every label said all that it can."""
    names = [f"server-{number}" for number in range(16)]
    metrics = Metrics(CollectorRegistry(), version="1.2.3")
    metrics.prepare(names)
    at_start = len(samples_of(metrics))
    two = (Device("a", "cuda", 0, 2, 1), Device("b", "cuda", 1, 2, 1))
    for name in names:
        metrics.system(name, SystemStats("0.3.64", (0, 3, 64), two))
        view = ServerView(name=name, url="http://a", state=ServerState.UP, queue_remaining=1)
        metrics.refresh(Snapshot(at=1.0, version="1", servers=(view,), free_bytes=1))
    hostile(metrics, "word", 1)
    for family in metrics.families:
        if family.name == "comfyd_retries_total":
            for operation, reasons in m.RETRIES.items():
                for reason in reasons:
                    metrics.retry(operation, reason)
        else:
            for name in [*names, "other"] if "server" in family.labels else [""]:
                m._zero(family, name)
    everything = len(samples_of(metrics))
    print(f"{at_start} series at the start, {everything} at most")
    assert at_start < everything < 1500


def test_the_declared_labels_are_the_metrics_own(metrics):
    for family in metrics.families:
        name, kind = family.metric._name, family.metric._type
        assert family.name.removesuffix("_total") == name
        assert (family.kind, family.text) == (kind, family.metric._documentation)
        assert family.metric._labelnames == tuple(family.labels)
    assert {family.name for family in metrics.families} == set(CONTRACT) - {"python_info"}


def test_no_series_says_what_is_not_declared(metrics):
    hostile(metrics, "word", 1)
    declared = {family.name.removesuffix("_total"): family for family in metrics.families}
    for family in parse_text(text_of(metrics)):
        for sample in family.samples if family.name.startswith("comfyd_") else []:
            for name, said in sample.labels.items():
                values = {"le": "any"} | dict(declared[family.name].labels)
                assert isinstance(values[name], str) or said in {*values[name], "other"}


def test_each_operation_has_its_own_reasons(metrics):
    metrics.retry("attempt", "stalled")
    metrics.retry("history", "stalled")
    metrics.observe(
        [
            Note("retry", J, "a", {"operation": "attempt", "reason": why})
            for why in ("error", "recalled")
        ]
    )
    for operation, reason, count in (
        ("attempt", "stalled", 1), ("attempt", "error", 1), ("attempt", "recalled", 1),
        ("history", "other", 1), ("history", "status", 0),
    ):  # fmt: skip
        found = value(metrics, "comfyd_retries_total", operation=operation, reason=reason)
        assert found == count, (operation, reason)


def test_a_retry_that_is_told_is_not_counted_again_when_the_job_is_queued(metrics):
    told = Note("retry", J, "a", {"operation": "attempt", "reason": "absent"})
    metrics.observe([NOTES["lost"], told, Note("moved", J, None, {"state": "queued"})])
    assert value(metrics, "comfyd_retries_total", operation="attempt", reason="absent") == 1
    assert value(metrics, "comfyd_retries_total", operation="attempt", reason="restart") == 0


@pytest.mark.parametrize(("charged", "count"), [(True, 1), (False, 0), (3, 3), (0, 0)])
def test_a_lost_attempt_may_be_charged_more_than_once(metrics, charged, count):
    metrics.observe([Note("lost", J, "a", {"cause": "absent", "charged": charged})])
    assert value(metrics, "comfyd_attempts_charged_total", server="a") == count


def test_the_trackers_words_are_the_labels():
    assert set(get_args(listener.Result)) == m.CONNECTS
    assert set(get_args(listener.Cause)) == m.DISCONNECTS


def test_message_types_are_the_decoders(metrics):
    for type_ in MESSAGE_TYPES:
        metrics.message("a", type_, at=1.0)
        assert value(metrics, "comfyd_websocket_messages_total", server="a", type=type_) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ServerRefused("x"), "refused"),
        (ServerUnreachable("x"), "unreachable"),
        (ServerStatus(503), "status"),
        (ServerProtocol("x"), "protocol"),
        (DiskFull("x"), "disk"),
        (TimeoutError(), "timeout"),
        (ValueError("x"), "other"),
    ],
)
def test_an_error_has_a_retry_reason(error, reason):
    assert m.reason_of(error) == reason
    known = m.RETRIES["download"] if reason == "disk" else m.RETRIES["submit"]
    assert reason == "other" or reason in known


# --- Prometheus' naming rules ------------------------------------------------------------------


def lint(name, kind, text):
    """What ``promtool check metrics`` would say; this needs no Prometheus."""
    if not text or text[-1] not in ".":
        yield "help is missing or no sentence"
    if set(name) - set(string.ascii_lowercase + "_" + string.digits):
        yield "not snake_case"
    if (kind == "counter") != name.endswith("_total"):
        yield "_total belongs to counters, and only to them"
    if re.search(
        r"_(ms|milliseconds|minutes|hours|kb|mb|kilobytes|percent|count|sum|bucket)(_|$)", name
    ):
        yield "not a base unit, or a suffix that belongs to histograms"
    if kind == "histogram" and not name.endswith("_seconds"):
        yield "unit is missing"
    if kind in name.split("_"):
        yield "the type is in the name"


def test_the_linter_finds_what_it_should():
    assert len(list(lint("comfyd_wait_ms", "counter", ""))) == 3
    assert list(lint("camelCase", "gauge", "Text.")) == ["not snake_case"]
    assert list(lint("a_histogram", "histogram", "Text.")) == [
        "unit is missing",
        "the type is in the name",
    ]


def test_names_keep_the_rules(metrics):
    for family in parse_text(text_of(metrics)):
        if family.name.startswith("comfyd_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            assert list(lint(name, family.type, family.documentation)) == [], name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(metrics):
    metrics.system("a", STATS)
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text_of(metrics).encode(), capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
