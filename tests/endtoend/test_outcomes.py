"""What becomes of jobs of every kind, in a daemon of their own, over real sockets and files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import urllib.request
from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from comfyd.simulator import Simulator
from tests.contract.graphs import half_failing
from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon, fetch
from tests.endtoend.waiting import counted, until

PATIENCE_S = 60  # for a whole test on a busy machine
DONE = 'comfyd_jobs_finished_total{outcome="done",server="local"}'
FAILED = 'comfyd_jobs_finished_total{outcome="failed",server="local"}'


def by_stem(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """Every manifest, by the name that the file was dropped with."""
    return {job.rpartition(".")[0]: result for job, result in daemon.results().items()}


async def served(simulator: Simulator, source: dict[str, str]) -> bytes:
    return await trio.to_thread.run_sync(fetch, f"{simulator.url}/view?{urlencode(source)}")


def interrupt(url: str) -> None:
    """What anyone may do who can reach the server. Blocking."""
    with urllib.request.urlopen(f"{url}/interrupt", data=b"", timeout=10) as answer:
        answer.read()


async def test_40_jobs_dropped_at_once(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            for number in range(40):
                daemon.drop(f"job-{number}.json", graphs.picture(number))
            await daemon.finish(40, within_s=30)
            metrics = await counted(daemon, DONE, 40)
            results = daemon.results()
            for job, result in results.items():
                (output,) = result["outputs"]
                content = (daemon.spool.done / job / output["file"]).read_bytes()
                assert content == await served(simulator, output["source"])
                assert hashlib.sha256(content).hexdigest() == output["sha256"]
                assert len(content) == output["bytes"]
    assert sorted(by_stem(daemon)) == sorted(f"job-{number}" for number in range(40))
    assert {result["completion"] for result in results.values()} == {"signal"}
    assert {result["attempts"] for result in results.values()} == {1}
    assert set(simulator.executions.values()) == set(simulator.posts.values()) == {1}
    assert metrics[DONE] == 40
    assert metrics['comfyd_completions_total{server="local",source="signal"}'] == 40
    assert metrics["comfyd_completion_latency_seconds_count"] == 40
    assert os.listdir(daemon.spool.claimed) == os.listdir(daemon.spool.stage) == []


async def test_what_is_no_job_is_set_aside_with_a_sentence(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    secret = tmp_path / "secret"
    secret.write_text("not for the spool")
    new = daemon.spool.new
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("ui.json", {"nodes": [{"id": 1}], "links": [], "version": 0.4})
            daemon.drop("broken.json", b'{"1": {"class_type": ')
            (new / "link.json").symlink_to(secret)
            os.mkfifo(new / "fifo.json")
            (new / "folder").mkdir()
            daemon.drop("good.json", graphs.picture(1))
            await daemon.finish(6, within_s=30)
    results = by_stem(daemon)
    assert results.pop("good")["state"] == "done"
    assert sorted(results) == ["broken", "fifo", "folder", "link", "ui"]
    for result in results.values():
        assert (result["state"], result["reason"]) == ("failed", "invalid_job")
        assert result["message"].endswith(".")
        assert result["server"] is None
    assert "API" in results["ui"]["message"]
    assert secret.read_text() == "not for the spool"
    assert os.listdir(new) == []
    assert simulator.posts.total() == 1


async def test_what_the_server_refuses_or_fails(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("unknown.json", {"1": graphs.node("NoSuchNodeAnywhere", value=1)})
            daemon.drop("failing.json", graphs.failing(1))
            daemon.drop("partial.json", graphs.partial(2))
            await daemon.finish(3, within_s=30)
            metrics = await counted(daemon, FAILED, 3)
    results = by_stem(daemon)
    reasons = {stem: result["reason"] for stem, result in results.items()}
    assert reasons == {
        "unknown": "rejected",
        "failing": "execution_error",
        "partial": "partial",
    }
    assert "NoSuchNodeAnywhere" in results["unknown"]["message"]
    for part in ("2", "ImageBlur", "RuntimeError"):
        assert part in results["failing"]["message"]
    for reason in ("rejected", "execution_error", "partial"):
        assert metrics[f'comfyd_job_failures_total{{reason="{reason}"}}'] == 1


async def test_what_was_made_before_a_failure_is_kept(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("half.json", half_failing("half"))
            await daemon.finish(1, within_s=30)
            ((job, result),) = daemon.results().items()
            (output,) = result["outputs"]
            content = (daemon.spool.failed / job / output["file"]).read_bytes()
            assert content == await served(simulator, output["source"])
    assert (result["state"], result["reason"]) == ("failed", "execution_error")
    assert output["node"] == "8"


async def test_interrupted_from_outside(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("stopped.json", graphs.slow(1, 20))
            await until(lambda: simulator.running)
            await trio.to_thread.run_sync(interrupt, simulator.url)
            daemon.drop("after.json", graphs.picture(2))
            await daemon.finish(2, within_s=15)
    results = by_stem(daemon)
    assert (results["stopped"]["state"], results["stopped"]["reason"]) == ("failed", "interrupted")
    assert results["stopped"]["message"].endswith(".")
    assert results["after"]["state"] == "done"


async def test_deleted_from_the_servers_queue_by_someone_else(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("first.json", graphs.slow(1, 1.0))
            await until(lambda: simulator.running)
            daemon.drop("deleted.json", graphs.picture(2))
            await until(lambda: simulator.pending)
            (prompt,) = simulator.pending
            assert simulator.delete_pending(prompt)
            await daemon.finish(2, within_s=20)
            metrics = await counted(daemon, DONE, 2)
    results = by_stem(daemon)
    assert {result["state"] for result in results.values()} == {"done"}
    assert results["deleted"]["attempts"] == 2
    assert results["deleted"]["prompt_id"] != prompt
    assert simulator.executions[prompt] == 0
    assert metrics['comfyd_attempts_lost_total{cause="absent",server="local"}'] == 1
    assert metrics['comfyd_attempts_charged_total{server="local"}'] == 0


async def test_outputs_of_several_kinds(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("mixed.json", graphs.mixed(7))
            await daemon.finish(1, within_s=20)
            ((job, result),) = daemon.results().items()
            for output in result["outputs"]:
                content = (daemon.spool.done / job / output["file"]).read_bytes()
                assert content == await served(simulator, output["source"])
    files = sorted(output["file"] for output in result["outputs"])
    assert files == ["10-0.webp", "9-0.png", "9-1.png"]
    assert result["ui"]["12"] == {"text": ["text 7"]}
    found = {path.name for path in (daemon.spool.done / job).iterdir()}
    assert found == {*files, "result.json", "job.json"}


async def test_the_metrics_are_valid_openmetrics(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    strict = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("good.json", graphs.picture(1))
            daemon.drop("failing.json", graphs.failing(2))
            await daemon.finish(2, within_s=20)
            text = (await daemon.get("/metrics", strict)).decode()
    assert text.endswith("# EOF\n")
    names = {family.name for family in text_string_to_metric_families(text)}  # raises if it is not
    assert {"comfyd_jobs", "comfyd_missed_signals", "comfyd_completion_latency_seconds"} <= names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_accepts_the_metrics_of_a_daemon_that_has_worked(simulator, tmp_path):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("good.json", graphs.picture(1))
            daemon.drop("failing.json", graphs.failing(2))
            await daemon.finish(2, within_s=20)
            text = await daemon.get("/metrics")
        found = await trio.run_process(
            ["promtool", "check", "metrics"],
            stdin=text,
            check=False,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
        )
    assert (found.returncode, found.stdout.decode()) == (0, "")
