"""``make observe``: every alert is seen to fire and to resolve, and every board to answer.

A Prometheus and an Alertmanager watch comfyd daemons while simulated servers, disks and people do
to them what the alerts tell of. The rules are the shipped ones in fast motion (`compress`). Exits
with 1 if an alert did not come, did not go, or came where nothing was wrong; or if a query of a
board had no data for no reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import trio
import yaml

from comfyd.simulator import Simulator
from tests.endtoend.daemon import QUICK, ROOT, Daemon
from tests.observe import boards
from tests.observe.compress import compressed
from tests.observe.monitor import LOOK_S, SCRAPE_S, Missing, Monitor, free_port, program
from tests.observe.report import Report
from tests.observe.scenes import SCENES, SMALL_DISK_BYTES, Scene
from tests.observe.stage import Stage

RULES: Final = ROOT / "grafana" / "rules" / "comfyd.rules.yaml"
PAGE: Final = ROOT / "docs" / "observed-alerts.md"
FACTOR: Final = 20
SETTLES_S: Final = 60.0
QUIET_S: Final = 15.0
MOST_S: Final = 900.0
STARTS_AT_ONCE: Final = 3
EXEMPLARS: Final = "comfyd_completion_latency_seconds_bucket"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make observe", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument(
        "--only", metavar="STAGE", nargs="+", choices=SCENES, help="play only these"
    )
    args = parser.parse_args()
    try:
        for name in ("prometheus", "alertmanager"):
            program(name)
    except Missing as error:
        print(f"observe: {error}", file=sys.stderr)
        return 2
    names = ["well", *(name for name in args.only or SCENES if name != "well")]
    with tempfile.TemporaryDirectory(prefix="comfyd-observe-") as home:
        report = trio.run(observe, Path(home), names)
    problems = report.problems(set() if args.only else alerts())
    print("\n".join(["", *report.table(), ""]))
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{len(report.seen)} observed, {len(problems)} problems, {report.took_s:.0f} s")
    if args.write:
        if problems or args.only:
            print("not written: that takes a whole run without problems", file=sys.stderr)
        else:
            PAGE.write_text(report.page(), encoding="utf-8")
    return 1 if problems else 0


def rules() -> dict[str, Any]:
    shipped: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return shipped


def alerts() -> set[str]:
    """Every alert that is shipped."""
    every = [rule for group in rules()["groups"] for rule in group["rules"]]
    return {rule["alert"] for rule in every if "alert" in rule}


async def observe(home: Path, names: list[str]) -> Report:
    """Play the scenes of *names*, all at once, and look."""
    began_s, began_at = trio.current_time(), time.time()
    with contextlib.ExitStack() as disks:
        async with contextlib.AsyncExitStack() as daemons, trio.open_nursery() as nursery:
            nursery.start_soon(until_told)
            simulators: dict[str, Simulator] = {}
            started: dict[str, Daemon] = {}
            targets = {name: f"127.0.0.1:{free_port()}" for name in names}
            gate = trio.CapacityLimiter(STARTS_AT_ONCE)

            async def start(name: str) -> None:
                async with gate:
                    daemons.push_async_callback(started[name].bury)
                    await started[name].start()
                    await started[name].ready()

            for name in names:
                simulators[name] = Simulator(run_s=0.01)
                url = await nursery.start(simulators[name].serve)
                folder = home / name
                folder.mkdir()
                if SCENES[name].small_disk:
                    disks.enter_context(small_disk(folder))
                started[name] = daemon(SCENES[name], folder, url, targets[name])
            async with trio.open_nursery() as starting:
                for name in names:
                    starting.start_soon(start, name)
            tell(f"{len(names)} daemons run")
            fast = compressed(rules(), FACTOR)
            async with Monitor.running(home / "monitor", fast, targets) as monitor:
                stages = {n: Stage(n, started[n], simulators[n], monitor) for n in names}
                stray = await quiet(monitor, len(names))
                await play(stages)
                stray += strays(stages, monitor) + broken(stages)
                empty, answered = await look_at_boards(monitor, began_at)
                exemplars = await monitor.exemplars(EXEMPLARS, began_at, time.time())
            nursery.cancel_scope.cancel()
    return Report(
        seen=[one for stage in stages.values() for one in stage.seen],
        stray=stray,
        empty=empty,
        answered=answered,
        exemplars=sum("job_id" in each["labels"] for each in exemplars),
        took_s=trio.current_time() - began_s,
        versions=[version("prometheus"), version("alertmanager")],
        daemons=len(names),
        factor=FACTOR,
        scrape_s=SCRAPE_S,
    )


def daemon(scene: Scene, home: Path, url: str, address: str) -> Daemon:
    settings: dict[str, Any] = {"metrics": {"listen": address}, "health": {"interval": "2s"}}
    for section, values in scene.settings.items():
        settings[section] = {**QUICK.get(section, {}), **values}
    made = Daemon(home, url, settings, module=scene.module)
    document = json.loads(made.config.read_text())
    document["servers"][0].update(scene.server)
    made.config.write_text(json.dumps(document, indent=1))
    return made


async def until_told() -> NoReturn:
    """SIGTERM ends it as Ctrl-C does: whatever runs is ended."""
    with trio.open_signal_receiver(signal.SIGTERM) as received:
        async for _ in received:
            raise KeyboardInterrupt
    raise AssertionError


async def quiet(monitor: Monitor, daemons: int) -> list[str]:
    """Before anything is done, nothing fires."""
    settled = False
    with trio.move_on_after(SETTLES_S):
        while not settled:
            up = sum(int(one["value"][1]) for one in await monitor.now("up"))
            settled = up == daemons and not monitor.active
            await trio.sleep(LOOK_S)
    if not settled:
        return ["Prometheus does not reach every daemon"]
    monitor.ever.clear()  # before its first scrape, Prometheus missed all of them
    await trio.sleep(QUIET_S)
    tell("all is quiet" if not monitor.ever else "it is NOT quiet")
    return [f"{alert.name} fired at {alert.instance} before any fault" for alert in monitor.ever]


async def play(stages: dict[str, Stage]) -> None:
    with trio.move_on_after(MOST_S):
        async with trio.open_nursery() as background:
            background.start_soon(SCENES["well"].play, stages["well"])
            async with trio.open_nursery() as nursery:
                for name, stage in stages.items():
                    if name != "well":
                        nursery.start_soon(scene, name, stage)
            background.cancel_scope.cancel()


async def scene(name: str, stage: Stage) -> None:
    try:
        await SCENES[name].play(stage)
    except* (AssertionError, trio.TooSlowError) as group:  # the others go on; it is told at the end
        log = stage.daemon.log()[-1500:]
        stage.broken = f"the scene of {name} broke off: {group.exceptions[0]!r}; {log}"
    told = ", ".join(
        f"{one.alert} after {-1 if one.fired_s is None else one.fired_s:.0f} s,"
        f" gone after {-1 if one.resolved_s is None else one.resolved_s:.0f} s"
        for one in stage.seen
    )
    tell(f"{name}: {told}")


def strays(stages: dict[str, Stage], monitor: Monitor) -> list[str]:
    """Alerts that fired on a stage where nothing of the kind was done."""
    expected = {
        name: {one.alert for one in stage.seen} | SCENES[name].also
        for name, stage in stages.items()
    }
    return [
        f"{alert.name} fired at {alert.instance or 'no daemon'}, where nothing of the kind was done"
        for alert in sorted(monitor.ever)
        if alert.name not in expected.get(alert.instance, set())
    ]


def broken(stages: dict[str, Stage]) -> list[str]:
    """Scenes that broke off, and daemons that ended by themselves, with what they said last."""
    found = [stage.broken for stage in stages.values() if stage.broken]
    for name, stage in stages.items():
        try:
            stage.daemon.check_alive()
        except AssertionError as error:
            found.append(f"{name}: {str(error).splitlines()[0]} {stage.daemon.log()[-600:]}")
    return found


async def look_at_boards(monitor: Monitor, began_at: float) -> tuple[list[boards.Query], int]:
    """The queries of all boards that had no data in the whole run, and how many had some."""
    every = [query for board in boards.boards() for query in boards.queries(board)]
    empty = [
        query
        for query in every
        if not boards.is_data(
            await monitor.between(boards.asked(query.expr), began_at, time.time())
        )
    ]
    tell(f"{len(every)} queries of boards asked, {len(empty)} without data")
    return empty, len(every) - len(empty)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own for *folder*; takes root."""
    if os.geteuid() != 0:
        raise SystemExit("observe: a small disk is mounted for one of the scenes; run it as root")
    options = f"size={SMALL_DISK_BYTES},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def version(name: str) -> str:
    """Such as ``prometheus 2.42.0``."""
    told = subprocess.run(
        [program(name), "--version"], capture_output=True, text=True, check=True, timeout=20
    )
    program_name, _, number, *_ = (told.stdout or told.stderr).replace(",", "").split()
    return f"{program_name.capitalize()} {number.partition('+')[0]}"


def tell(what: str) -> None:
    print(f"{time.monotonic() - _BEGAN_S:6.0f} s  {what}", flush=True)


_BEGAN_S: Final = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
