"""Proof: a disk of 64 MB that is filled, out of inodes or read-only costs time and no job.

Run by ``make prove``, as root: it mounts small file systems, and is skipped where that is not
allowed. While the daemon waits it must say so, send nothing, show nothing partial, and take less
than 2 % of a CPU; when the disk is as before, everything goes on by itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from comfyd.simulator import Simulator
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import picture
from tests.endtoend.prove_scale import cpu_s
from tests.endtoend.waiting import until

JOBS = 40
MORE = 10  # dropped while it waits, where that is possible
KEEP_BYTES = 8 << 20
NODE_S = 0.05
WATCHED_S = 10.0
MORE_CPU = 0.02


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True, timeout=10)


def full() -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC)


@dataclass
class SmallDisk:
    """A file system of 64 MB, mounted on one or more folders of *home*."""

    path: Path

    @classmethod
    @contextmanager
    def mounted(cls, home: Path, places: tuple[str, ...], options: str) -> Iterator[Self]:
        """With each of *places* a folder of *home* that lies on it; unmounted at the end."""
        points = [home / "disk", *(home / place for place in places)]
        for point in points:
            point.mkdir()
        done: list[Path] = []
        try:
            try:
                mount("-t", "tmpfs", "-o", f"size=64m,mode=755{options}", "tmpfs", str(points[0]))
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                pytest.skip(f"may not mount a small disk: {getattr(error, 'stderr', error)}")
            done.append(points[0])
            for point in points[1:]:
                (points[0] / point.name).mkdir()
                mount("--bind", str(points[0] / point.name), str(point))
                done.append(point)
            yield cls(points[0])
        finally:
            for point in reversed(done):
                subprocess.run(["umount", "-l", point], check=False, timeout=10)

    def fill(self) -> None:
        """Until not one byte is left."""
        with open(self.path / "ballast", "ab", buffering=0) as file, full():
            while True:
                file.write(bytes(1 << 16))

    def fill_to_the_reserve(self) -> None:
        """Until only half of what is to stay free is left."""
        found = os.statvfs(self.path)
        left = found.f_bavail * found.f_frsize - KEEP_BYTES // 2
        (self.path / "ballast").write_bytes(bytes(left))

    def use_up_inodes(self) -> None:
        (self.path / "many").mkdir()
        with full():
            for number in range(1_000_000):
                (self.path / "many" / str(number)).touch()

    def make_read_only(self) -> None:
        remount = ["mount", "-o", "remount,ro", str(self.path)]
        while subprocess.run(remount, check=False, capture_output=True, timeout=10).returncode:
            pass  # a file is being written at this moment

    def restore(self) -> None:
        if os.statvfs(self.path).f_flag & os.ST_RDONLY:
            mount("-o", "remount,rw", str(self.path))
        (self.path / "ballast").unlink(missing_ok=True)
        for path in (self.path / "many").glob("*"):
            path.unlink()


class Onlooker:
    """A thread that looks into ``done/`` all the time and checks every folder as it appears."""

    def __init__(self, done: Path) -> None:
        self._done = done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.inodes: dict[str, int] = {}
        self.seen: set[str] = set()
        self.partial: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            for name in os.listdir(self._done):
                if name.startswith("."):  # the daemon trying the folder at its start
                    continue
                inode = (self._done / name).stat().st_ino
                if self.inodes.setdefault(name, inode) != inode:
                    self.partial.append(f"{name} came twice")
                elif name not in self.seen:
                    self.seen.add(name)
                    self.partial += [] if self._checked(name) else [name]

    def _checked(self, name: str) -> bool:
        try:
            folder = self._done / name
            result = json.loads((folder / "result.json").read_bytes())
            files = {each["file"]: each["sha256"] for each in result["outputs"]}
            found = {
                file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files
            }
            payload = json.loads((folder / "job.json").read_bytes())
        except (OSError, ValueError, KeyError):
            return False
        return bool(files) and found == files and bool(payload)


async def waiting_for(daemon: Daemon) -> str:
    return str(json.loads(await daemon.get("/api/v1/status"))["waiting"])


async def said(daemon: Daemon, *, waiting: bool) -> str:
    while True:
        sentence = await waiting_for(daemon)
        if bool(sentence) is waiting:
            return sentence
        await trio.sleep(0.2)


async def proved(
    home: Path, disk: SmallDisk, spoil: Callable[[], None], *, droppable: bool
) -> dict[str, Any]:
    """Jobs, a disk that is spoilt in the middle of them, a wait, a disk that is as before."""
    expected = JOBS + MORE
    async with trio.open_nursery() as nursery:
        simulator = Simulator(run_s=NODE_S, directory=home / "server")
        url = await nursery.start(simulator.serve)
        daemon = Daemon(home, url, {"outputs": {"min_free_bytes": KEEP_BYTES}})
        async with daemon.running():
            with Onlooker(daemon.spool.done) as onlooker:
                for number in range(JOBS):
                    daemon.drop(f"job-{number}.json", picture(number, side_px=256))
                await until(lambda: daemon.finished() >= 5)
                await trio.to_thread.run_sync(spoil)
                sentence = await said(daemon, waiting=True)
                at_stop = daemon.finished()
                assert at_stop < JOBS, "it was too late to prove anything"
                if droppable:
                    for number in range(JOBS, expected):
                        daemon.drop(f"job-{number}.json", picture(number, side_px=256))
                await trio.sleep(3)  # what was on its way is over

                runs, finished = simulator.executions.total(), daemon.finished()
                began_s, began_cpu_s = trio.current_time(), cpu_s(daemon.pid)
                await trio.sleep(WATCHED_S)
                load = (cpu_s(daemon.pid) - began_cpu_s) / (trio.current_time() - began_s)
                daemon.check_alive()
                still = await waiting_for(daemon)
                free_bytes = (await daemon.metrics())["comfyd_spool_free_bytes"]
                more_runs = simulator.executions.total() - runs
                more_finished = daemon.finished() - finished
                left = len(list(daemon.spool.new.iterdir())) if droppable else MORE

                await trio.to_thread.run_sync(disk.restore)
                began_s = trio.current_time()
                await said(daemon, waiting=False)
                if not droppable:
                    for number in range(JOBS, expected):
                        daemon.drop(f"job-{number}.json", picture(number, side_px=256))
                await daemon.finish(expected, within_s=60)
                took_s = trio.current_time() - began_s
                await trio.sleep(1)
            said_in_log = [event["event"] for event in daemon.events()]
        nursery.cancel_scope.cancel()
    print(
        f"\n{at_stop} of {JOBS} done when the disk was spoilt: {sentence}\n"
        f"CPU while waiting {load:.2%}; {more_runs} runs and {more_finished} results meanwhile;"
        f" all {expected} done {took_s:.1f} s after"
    )
    assert load < MORE_CPU
    assert still.startswith("Waiting")
    assert left == MORE, "files were claimed that should have stayed in new/"
    assert more_finished == 0
    begins = {"waiting_for_space", "journal_waits_for_space"} & set(said_in_log)
    ends = {"space_again", "journal_has_space_again"} & set(said_in_log)
    assert len(begins) == len(ends) > 0
    assert onlooker.partial == []
    assert list(daemon.spool.failed.iterdir()) == []
    assert list(daemon.spool.claimed.iterdir()) == list(daemon.spool.stage.iterdir()) == []
    jobs = sorted(path.name.partition(".")[0] for path in daemon.spool.done.iterdir())
    assert jobs == sorted(f"job-{number}" for number in range(expected))
    assert set(simulator.executions.values()) == {1}, "a prompt was executed twice"
    assert simulator.executions.total() == expected
    assert more_runs == 0, "prompts were sent while the disk was full"
    return {"free_bytes": free_bytes, "sentence": sentence}


async def test_the_spools_disk_is_filled(tmp_path):
    with SmallDisk.mounted(tmp_path, ("spool",), "") as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.fill, droppable=False)
    assert told["free_bytes"] < 1 << 20  # what was given up meanwhile is free again
    assert "8 MiB are kept free" in told["sentence"]


async def test_the_spools_disk_is_filled_to_its_reserve(tmp_path):
    with SmallDisk.mounted(tmp_path, ("spool",), "") as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.fill_to_the_reserve, droppable=True)
    assert 0 < told["free_bytes"] < KEEP_BYTES


async def test_the_disk_of_spool_and_journal_is_filled(tmp_path):
    with SmallDisk.mounted(tmp_path, ("spool", "state"), "") as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.fill, droppable=False)
    assert told["free_bytes"] < 1 << 20  # what was given up meanwhile is free again


async def test_the_journals_disk_is_filled(tmp_path):
    with SmallDisk.mounted(tmp_path, ("state",), "") as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.fill, droppable=True)
    assert told["free_bytes"] > KEEP_BYTES


async def test_the_spools_disk_runs_out_of_inodes(tmp_path):
    options = ",nr_inodes=1500"
    with SmallDisk.mounted(tmp_path, ("spool",), options) as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.use_up_inodes, droppable=False)
    assert "inodes" in told["sentence"]


async def test_the_spools_disk_becomes_read_only(tmp_path):
    with SmallDisk.mounted(tmp_path, ("spool",), "") as disk, trio.fail_after(120):
        told = await proved(tmp_path, disk, disk.make_read_only, droppable=False)
    assert "read-only" in told["sentence"]
