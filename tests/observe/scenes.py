"""What is made to go wrong: a scene for an alert or two, all played at once, each on its stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from comfyd.simulator.faults import HowOften
from tests.endtoend import graphs
from tests.observe.monitor import SCRAPE_S
from tests.observe.stage import Stage

# Long runs are no trouble of their own here: only `silent_prompts` is about those.
PATIENT: Final = {"audit": {"stale_after": "10m"}}
SMALL_DISK_BYTES: Final = 64 << 20
KEEP_BYTES: Final = 8 << 20
NO_UNIT: Final = "comfyd-observe-none.service"  # tried in vain


@dataclass(frozen=True)
class Scene:
    """Attributes:

    play: What happens on the stage.
    also: Alerts that may fire besides those that the scene waits for: they tell of the same fault.
    settings: Of its daemon.
    module: What is run as comfyd.
    server: What its daemon is told of its server.
    small_disk: The spool lies on a disk of its own of SMALL_DISK_BYTES.
    """

    play: Callable[[Stage], Awaitable[None]]
    also: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    module: str = "comfyd"
    server: Mapping[str, Any] = field(default_factory=dict)
    small_disk: bool = False


def minute(number: int) -> graphs.Graph:
    """Runs for a minute, unless it is stopped."""
    return graphs.slow(number, 60)


def moment(number: int) -> graphs.Graph:
    """Runs for half a second."""
    return graphs.slow(number, 0.5)


async def all_is_well(stage: Stage) -> None:
    """Jobs come and go, some fail by themselves, some files are no jobs: no alert tells of it."""
    async with stage.feeding(1.0), stage.feeding(5.0, graphs.failing), stage.feeding(1.5, moment):
        number = 0
        while True:
            stage.daemon.drop(f"no-job-{number}.json", b"{")
            number += 1
            await trio.sleep(7)


async def daemon_dies(stage: Stage) -> None:
    dead = stage.begins("`kill -9` of the daemon")
    await stage.daemon.kill()
    await dead.fires("ComfydDown")
    dead.ends()
    await stage.start_again()
    await dead.resolves()
    again = stage.begins("killed and started again, three times")
    for _ in range(3):
        await stage.daemon.kill()
        await stage.start_again()
        await trio.sleep(2.5 * SCRAPE_S)  # it is seen in each life
    await again.fires("ComfydRestarting")
    again.ends()
    await again.resolves()


async def broken_configuration(stage: Stage) -> None:
    good = stage.daemon.config.read_text()
    bad = stage.begins("an unknown key in `comfyd.yaml`, and a reload")
    stage.daemon.config.write_text(good.replace('"spool"', '"sploo"', 1))
    os.kill(stage.daemon.pid, signal.SIGHUP)
    await bad.fires("ComfydConfigReloadFailed")
    bad.ends()
    stage.daemon.config.write_text(good)
    os.kill(stage.daemon.pid, signal.SIGHUP)
    await bad.resolves()


async def forgotten_pause(stage: Stage) -> None:
    """Files wait in new/ all the while, and nothing else tells of them."""
    pause = stage.begins("`comfyd pause`, and a job in `new/`")
    await stage.comfyd("pause")
    stage.drop(graphs.picture)
    await pause.fires("ComfydIntakePaused")
    pause.ends()
    await stage.comfyd("resume")
    await pause.resolves()


async def forgotten_drain(stage: Stage) -> None:
    """The server is killed meanwhile, with jobs in the queue, and nothing else tells of it."""
    drain = stage.begins("`comfyd drain`, then the server is killed; jobs wait")
    await stage.comfyd("drain", "local")
    stage.drop(graphs.picture, 3)
    await stage.queued(3)
    hold = stage.begins("`comfyd hold`")
    await stage.comfyd("hold", "--match", "job-0.*")
    stage.simulator.kill()

    async def held() -> None:
        await hold.fires("ComfydJobsHeld")
        hold.ends()
        await stage.comfyd("release", "--match", "job-0.*")
        await hold.resolves()

    async def drained() -> None:
        await drain.fires("ComfydServerDraining")
        drain.ends()
        stage.simulator.revive()
        await trio.sleep(2.5 * SCRAPE_S)  # it is seen to be up
        await stage.comfyd("resume", "local")
        await drain.resolves()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(held)
        nursery.start_soon(drained)


async def server_dies(stage: Stage) -> None:
    dead = stage.begins("the only server is killed; jobs wait")
    stage.simulator.kill()
    stage.drop(graphs.picture, 3)
    await dead.fires("ComfydServerDown", "ComfydNoServerUsable")
    dead.ends()
    stage.simulator.revive()
    await dead.resolves()


async def worker_dies(stage: Stage) -> None:
    stuck = stage.begins("its worker takes no prompt: `stuck-worker`")
    stage.simulator.faults.stuck_worker = True
    stage.drop(graphs.picture, 3)
    await stuck.fires("ComfydServerWedged")
    stuck.ends()
    stage.simulator.faults.stuck_worker = False
    await stuck.resolves()


async def stalled_publisher(stage: Stage) -> None:
    async with stage.feeding(0.7, moment):
        stalled = stage.begins("it publishes no events: `stalled-publisher`")
        stage.simulator.faults.stalled_publisher = True
        await stalled.fires("ComfydSocketDeaf", "ComfydSignalsMissed")
        stalled.ends()
        stage.simulator.faults.stalled_publisher = False
        await stalled.resolves()


async def no_websocket(stage: Stage) -> None:
    refused = stage.begins("403 at the WebSocket handshake: `ws-refuse`")
    stage.simulator.faults.ws_refuse = HowOften()
    stage.simulator.drop_connections()
    await refused.fires("ComfydSocketDeaf")
    refused.ends()
    stage.simulator.faults.ws_refuse = None
    await refused.resolves()


async def lost_end_signals(stage: Stage) -> None:
    async with stage.feeding(0.7):
        lost = stage.begins("end signals are lost: `drop-end`")
        stage.simulator.faults.drop["end"] = HowOften()
        await lost.fires("ComfydSignalsMissed")
        lost.ends()
        stage.simulator.faults.drop.clear()
        await lost.resolves()


async def bad_line(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:

        async def break_it() -> None:
            while True:
                stage.simulator.drop_connections()
                await trio.sleep(2.5)

        flaps = stage.begins("every connection is closed every 2.5 s")
        nursery.start_soon(break_it)
        await flaps.fires("ComfydSocketFlapping")
        flaps.ends()
        nursery.cancel_scope.cancel()
    await flaps.resolves()


async def history_fails(stage: Stage) -> None:
    async with stage.feeding(0.5):
        fails = stage.begins("two of three looks into the history fail: `history-fail=0.67`")
        stage.simulator.faults.history_fail = HowOften(probability=0.67)
        await fails.fires("ComfydHistoryRetriesHigh")
        fails.ends()
        stage.simulator.faults.history_fail = None
        await fails.resolves()


async def slow_server(stage: Stage) -> None:
    async with stage.feeding(0.5):
        slow = stage.begins("every answer takes 3 s: `slow=3s`")
        stage.simulator.faults.slow_s = 3.0
        await slow.fires("ComfydCompletionLatencyHigh")
        slow.ends()
        stage.simulator.faults.slow_s = 0.0
        await slow.resolves()


async def crashing_server(stage: Stage) -> None:
    stage.drop(minute, 6)
    crashes = stage.begins("it loses its memory whenever a prompt runs")
    async with trio.open_nursery() as nursery:

        async def crash() -> None:
            while True:
                while not stage.simulator.running:  # noqa: ASYNC110 - nobody tells
                    await trio.sleep(0.1)
                await trio.sleep(0.5)  # it is heard to run
                stage.simulator.restart()

        nursery.start_soon(crash)
        await crashes.fires("ComfydAttemptsLost", "ComfydJobLost")
        crashes.ends()
        nursery.cancel_scope.cancel()
    await crashes.resolves()


async def outputs_vanish(stage: Stage) -> None:
    gone = stage.begins("404 for every output: `view-missing`")
    stage.simulator.faults.view_missing = HowOften()
    stage.drop(graphs.picture, 25)
    await gone.fires("ComfydFailuresNotTheirOwn")
    gone.ends()
    stage.simulator.faults.view_missing = None
    await gone.resolves()


async def silent_prompts(stage: Stage) -> None:
    silent = stage.begins("a node stands still: `node-stalls`")
    stage.simulator.faults.stalls = HowOften(count=1)
    stage.drop(graphs.picture)
    await silent.fires("ComfydJobsStale")
    silent.ends()
    await stage.comfyd("cancel", "--match", "*")
    await silent.resolves()


async def old_queue(stage: Stage) -> None:
    stage.drop(lambda number: graphs.slow(number, 600), 4)
    await stage.queued(2)
    old = stage.begins("jobs behind long ones are made 2 h older in the journal")
    assert await stage.daemon.stop() == 0
    stage.make_older(7200)
    await stage.start_again()
    await old.fires("ComfydQueueAgeHigh")
    old.ends()
    await stage.comfyd("cancel", "--match", "*")
    await old.resolves()


async def forgotten_case(stage: Stage) -> None:
    part = stage.daemon.spool.new / "half.json.part"
    left = stage.begins("a producer leaves a `.part` behind")
    part.write_text("{")
    fails = stage.begins("a health probe with a bug: [stumbling.py](../tests/observe/stumbling.py)")
    stumble = stage.daemon.config.with_name("stumble")
    stumble.touch()

    async def drained() -> None:
        await left.fires("ComfydSpoolNotDrained")
        left.ends()
        part.unlink()
        await left.resolves()

    async def restarted() -> None:
        await fails.fires("ComfydTaskRestarts")
        fails.ends()
        stumble.unlink()
        await fails.resolves()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drained)
        nursery.start_soon(restarted)


async def full_disk(stage: Stage) -> None:
    ballast = stage.daemon.home / "ballast"
    for left_bytes, what, alert in (
        (KEEP_BYTES * 3 // 2, "1.5 times the reserve is left on a small disk", "ComfydDiskLow"),
        (KEEP_BYTES // 2, "half of the reserve is left on a small disk", "ComfydWaitingForSpace"),
    ):
        full = stage.begins(what)
        found = os.statvfs(stage.daemon.home)
        ballast.write_bytes(bytes(found.f_bavail * found.f_frsize - left_bytes))
        await full.fires(alert)
        full.ends()
        ballast.unlink()
        await full.resolves()


# The first goes on for as long as the others.
SCENES: Final = {
    "well": Scene(all_is_well, settings={"retention": {"done": {"count": 20}}}),
    "daemon": Scene(daemon_dies),
    "config": Scene(broken_configuration),
    "paused": Scene(forgotten_pause),
    "drained": Scene(forgotten_drain),
    "down": Scene(server_dies),
    "wedged": Scene(
        worker_dies, frozenset({"ComfydNoServerUsable"}), PATIENT, server={"restart_unit": NO_UNIT}
    ),
    "deaf": Scene(stalled_publisher, settings=PATIENT),
    "refuses": Scene(no_websocket),
    "silent": Scene(lost_end_signals, settings=PATIENT),
    "flaps": Scene(bad_line),
    "history": Scene(history_fails, frozenset({"ComfydCompletionLatencyHigh"}), PATIENT),
    "slow": Scene(
        slow_server, settings=PATIENT, server={"window": 16}
    ),  # or too few would end to tell
    "crashes": Scene(crashing_server, frozenset({"ComfydSocketFlapping"}), PATIENT),
    "outputs": Scene(
        outputs_vanish, frozenset({"ComfydAttemptsLost", "ComfydCompletionLatencyHigh"})
    ),
    "stale": Scene(silent_prompts),
    "old": Scene(old_queue, frozenset({"ComfydDown"}), PATIENT),
    "bug": Scene(forgotten_case, module="tests.observe.stumbling"),
    "disk": Scene(
        full_disk,
        settings={"outputs": {"min_free_bytes": f"{KEEP_BYTES >> 20}MiB"}},
        small_disk=True,
    ),
}
