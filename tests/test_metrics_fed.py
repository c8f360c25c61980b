"""Every metric of the contract is moved by what really happens: a daemon, a server, a scrape."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from comfyd import app, metrics
from comfyd.config import Config
from comfyd.errors import ServerUnreachable
from comfyd.services import space
from comfyd.services.clock import Clock
from comfyd.services.health import HealthProbe
from comfyd.services.inbox import Inbox
from comfyd.services.link import Link
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool, drop
from comfyd.web.control_client import ask
from tests.endtoend.daemon import fetch, samples
from tests.endtoend.graphs import failing, picture, slow
from tests.test_app import settings
from tests.test_metrics import CONTRACT

WITHIN_S = 30.0

QUICK = {
    "audit": "{interval: 200ms, stale_after: 300ms, orphan_interval: 100ms, lost_grace: 300ms}",
    "tracker": "{deaf_after: 300ms, ping_interval: 1s, reconnect_first: 500ms}",
    "history": "{backoff: 50ms}",
    "completion": "{backoff: 50ms}",
    "health": "{interval: 200ms}",
    "retention": "{done: {count: 0}}",
}


@dataclass
class World:
    """A daemon and its server; what it shows is asked for again and again."""

    simulator: Simulator
    spool: Spool
    http_url: str
    control: Path

    async def drop(self, document: object) -> str:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        return await trio.to_thread.run_sync(drop, self.spool, "job.json", data)

    async def scrape(self) -> dict[str, float]:
        # At the end of a test the daemon goes while this may still ask: that is not its failure.
        url = f"{self.http_url}/metrics"
        text = await trio.to_thread.run_sync(fetch, url, abandon_on_cancel=True)
        return samples(text.decode())

    async def shows(self, series: str) -> None:
        while True:
            if (await self.scrape()).get(series):
                return
            await trio.sleep(0.02)


Act = Callable[[World], Awaitable[object]]


async def a_job(world: World) -> None:
    await world.drop(picture(1))


async def a_file_that_is_no_job(world: World) -> None:
    await world.drop(b"{")


async def a_node_that_fails(world: World) -> None:
    await world.drop(failing(2))


async def prompts_that_take_long(world: World) -> None:
    world.simulator.faults.set("node-stalls")  # and say nothing
    for number in range(4):
        await world.drop(slow(number, 60))


async def a_connection_that_breaks_before_the_end(world: World) -> None:
    await world.drop(slow(3, 0.6))
    await world.shows('comfyd_jobs{state="running"}')
    world.simulator.drop_connections()


async def an_end_that_is_not_told(world: World) -> None:
    world.simulator.faults.set("drop-end")  # all else is told: the socket is not deaf
    await world.drop(picture(4))


async def a_server_that_forgets(world: World) -> None:
    await world.drop(slow(5, 1))
    await world.shows('comfyd_jobs{state="running"}')
    world.simulator.restart()


async def a_history_that_fails(world: World) -> None:
    world.simulator.faults.set("history-fail=4")
    await world.drop(picture(6))


async def an_output_that_is_gone(world: World) -> None:
    world.simulator.faults.set("view-missing")
    await world.drop(picture(7))


async def a_server_too_busy_for_a_post(world: World) -> None:
    world.simulator.faults.set("post-fail=503:1")
    await world.drop(picture(8))


async def a_server_that_goes(world: World) -> None:
    await world.shows('comfyd_server_up{server="s"}')
    world.simulator.kill()


async def a_server_that_refuses_a_websocket(world: World) -> None:
    await world.shows('comfyd_websocket_connected{server="s"}')
    world.simulator.faults.set("ws-refuse")
    world.simulator.drop_connections()


async def a_socket_that_grows_deaf(world: World) -> None:
    world.simulator.faults.set("stalled-publisher")
    await world.drop(slow(9, 0.6))
    await world.shows(f'comfyd_websocket_disconnects_total{{cause="deaf",{S}}}')
    await world.shows(f"comfyd_websocket_connected{{{S}}}")
    await world.drop(slow(10, 0.6))  # the second time in a row it is the server's fault


async def a_prompt_of_somebody_else(world: World) -> None:
    await world.shows('comfyd_websocket_connected{server="s"}')
    data = {"node": "1", "prompt_id": "theirs"}
    world.simulator._memory.hub.send("executing", data, None)


async def a_person_that_pauses_and_drains(world: World) -> None:
    for request in ({"verb": "pause"}, {"verb": "drain", "server": "s"}):
        answer = await trio.to_thread.run_sync(ask, world.control, request, 5.0)
        assert answer["ok"], answer


async def a_disk_without_space(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "free_bytes", lambda found: 0)
        await world.shows("comfyd_waiting_for_space")


async def a_result_too_many(world: World) -> None:
    job = await world.drop(picture(8))
    done, claimed = world.spool.done / job, world.spool.claimed
    while not done.exists() or any(claimed.iterdir()):  # noqa: ASYNC110 - folders tell nobody
        await trio.sleep(0.02)
    await trio.to_thread.run_sync(ask, world.control, {"verb": "gc"}, WITHIN_S)


async def a_server_that_fails_everything(world: World) -> None:
    world.simulator.faults.set("card-fails=cuda")
    for number in range(5):
        await world.drop(picture(number))


async def nothing(world: World) -> None:
    """What is to be seen is there from the start."""


S = 'server="s"'
SEEN: list[tuple[Act, tuple[str, ...]]] = [
    (
        a_job,
        (
            "comfyd_config_last_reload_successful",
            "comfyd_config_last_reload_success_timestamp_seconds",
            f"comfyd_server_up{{{S}}}",
            f'comfyd_server_state{{{S},state="up"}}',
            f'comfyd_jobs_finished_total{{outcome="done",{S}}}',
            'comfyd_job_duration_seconds_count{phase="run"}',
            'comfyd_job_duration_seconds_count{phase="total"}',
            "comfyd_completion_latency_seconds_count",
            f'comfyd_completions_total{{{S},source="signal"}}',
            'comfyd_history_fetch_seconds_count{result="found"}',
            f"comfyd_websocket_connected{{{S}}}",
            f'comfyd_websocket_connects_total{{result="ok",{S}}}',
            f'comfyd_websocket_messages_total{{{S},type="executing"}}',
            f'comfyd_websocket_messages_total{{{S},type="status"}}',
            f"comfyd_websocket_last_message_timestamp_seconds{{{S}}}",
            "comfyd_spool_pickup_seconds_count",
            "comfyd_spool_free_bytes",
            f"comfyd_outputs_total{{{S}}}",
            f"comfyd_output_bytes_total{{{S}}}",
            "comfyd_journal_commit_seconds_count",
        ),
    ),
    (
        a_file_that_is_no_job,
        (
            'comfyd_spool_rejected_total{reason="invalid_job"}',
            'comfyd_job_failures_total{reason="invalid_job"}',
            'comfyd_jobs_finished_total{outcome="failed",server="none"}',
        ),
    ),
    (a_node_that_fails, ('comfyd_job_failures_total{reason="execution_error"}',)),
    (
        prompts_that_take_long,
        (
            'comfyd_jobs{state="queued"}',
            'comfyd_jobs{state="running"}',
            'comfyd_jobs{state="submitted"}',
            'comfyd_oldest_job_age_seconds{state="queued"}',
            'comfyd_oldest_job_age_seconds{state="submitted"}',
            f"comfyd_stale_jobs{{{S}}}",
            f"comfyd_server_queue_remaining{{{S}}}",
            f'comfyd_audits_total{{{S},verdict="running"}}',
            f'comfyd_audits_total{{{S},verdict="pending"}}',
            'comfyd_spool_files{directory="claimed"}',
        ),
    ),
    (
        a_connection_that_breaks_before_the_end,
        (
            f'comfyd_websocket_disconnects_total{{cause="closed",{S}}}',
            f'comfyd_missed_signals_total{{cause="disconnected",{S}}}',
            f'comfyd_completions_total{{{S},source="reconnect"}}',
        ),
    ),
    (
        an_end_that_is_not_told,
        (
            f'comfyd_missed_signals_total{{cause="silent",{S}}}',
            f'comfyd_completions_total{{{S},source="audit"}}',
            f'comfyd_audits_total{{{S},verdict="finished"}}',
        ),
    ),
    (
        a_server_that_forgets,
        (
            f'comfyd_audits_total{{{S},verdict="absent"}}',
            f'comfyd_attempts_lost_total{{cause="restart",{S}}}',
            f"comfyd_attempts_charged_total{{{S}}}",
            'comfyd_retries_total{operation="attempt",reason="restart"}',
        ),
    ),
    (
        a_history_that_fails,
        (
            'comfyd_retries_total{operation="history",reason="status"}',
            'comfyd_retries_total{operation="completion",reason="error"}',
            'comfyd_history_fetch_seconds_count{result="error"}',
        ),
    ),
    (
        an_output_that_is_gone,
        (
            'comfyd_retries_total{operation="download",reason="status"}',
            'comfyd_retries_total{operation="download",reason="missing"}',
            'comfyd_retries_total{operation="attempt",reason="outputs"}',
            f'comfyd_attempts_lost_total{{cause="outputs",{S}}}',
        ),
    ),
    (
        a_server_too_busy_for_a_post,
        ('comfyd_retries_total{operation="submit",reason="status"}',),
    ),
    (
        a_server_that_goes,
        (
            f'comfyd_server_state{{{S},state="down"}}',
            f'comfyd_websocket_connects_total{{result="refused",{S}}}',
        ),
    ),
    (
        a_server_that_refuses_a_websocket,
        (f'comfyd_websocket_connects_total{{result="rejected",{S}}}',),
    ),
    (
        a_socket_that_grows_deaf,
        (
            f'comfyd_websocket_disconnects_total{{cause="deaf",{S}}}',
            f'comfyd_missed_signals_total{{cause="deaf",{S}}}',
            f'comfyd_server_state{{{S},state="deaf"}}',
        ),
    ),
    (a_prompt_of_somebody_else, ('comfyd_facts_dropped_total{reason="foreign_hint"}',)),
    (a_result_too_many, ('comfyd_results_removed_total{directory="done"}',)),
    (
        a_server_that_fails_everything,
        (
            f'comfyd_server_state{{{S},state="wedged"}}',
            f'comfyd_server_restarts_total{{result="failed",{S}}}',
        ),
    ),
    (
        a_person_that_pauses_and_drains,
        (
            "comfyd_intake_paused",
            f"comfyd_server_draining{{{S}}}",
            f'comfyd_server_state{{{S},state="draining"}}',
        ),
    ),
    (a_disk_without_space, ("comfyd_waiting_for_space",)),
    (
        nothing,
        (
            "comfyd_build_info",
            "comfyd_server_info",
            "comfyd_server_vram_free_bytes",
            "comfyd_server_vram_total_bytes",
            "comfyd_spool_min_free_bytes",
            "comfyd_task_restarts_total",
            "python_info",
        ),
    ),
]


def family(series: str) -> str:
    return series.partition("{")[0].removesuffix("_count")


def test_every_metric_of_the_contract_is_seen_to_move():
    assert {family(series) for _, moved in SEEN for series in moved} == set(CONTRACT)


@pytest.mark.parametrize(("act", "moved"), SEEN, ids=[act.__name__ for act, _ in SEEN])
async def test_what_happens_is_counted(tmp_path, monkeypatch, act, moved):
    monkeypatch.setattr(app, "REFRESH_S", 0.1)
    one_failure(monkeypatch)
    simulator = Simulator(run_s=0.01)
    missing = set(moved)
    with trio.move_on_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(simulator.serve, 0)
            configured = restartable(settings(tmp_path, url, **QUICK))
            daemon = await nursery.start(partial(app.run, configured))
            control = configured.state / "control.sock"
            world = World(simulator, Spool(configured.spool), daemon.http_url, control)
            nursery.start_soon(act, world)
            while missing:
                for series, number in (await world.scrape()).items():
                    if number > 0:  # everything starts at 0: see test_metrics
                        missing -= {series, series.partition("{")[0]}
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    assert missing == set()


def restartable(configured: Config) -> Config:
    """With a unit that there is not, or no systemd at all."""
    servers = tuple(
        replace(server, restart_unit="no-such-comfyd-test.service") for server in configured.servers
    )
    return replace(configured, servers=servers)


def one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the health probe fail as its server might, past what it deals with itself."""
    real = HealthProbe._ask
    failures = [ServerUnreachable("once")]

    async def ask(probe: HealthProbe) -> None:
        if failures:
            raise failures.pop()
        await real(probe)

    monkeypatch.setattr(HealthProbe, "_ask", ask)


async def test_the_supervised_tasks_are_the_labels(tmp_path):
    """`task` says which; a name that is not listed would be counted as other."""
    configured = settings(tmp_path, "http://127.0.0.1:9")
    (server,) = configured.servers
    made = metrics.Metrics(CollectorRegistry())
    link = Link(server, configured, Inbox(lambda prompt_id: False), made, Clock())
    assert {name for name, _ in link.tasks()} == metrics.TASKS
    await link.client.aclose()
