"""What systemd sees of the daemon: its notifications, and how it ends."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest
import trio

from tests.endtoend import graphs
from tests.endtoend.daemon import Daemon
from tests.endtoend.waiting import until

PATIENCE_S = 60
WATCHDOG_S = 2.0
ORDERLY_S = 5.0


class Manager:
    """A socket in systemd's place."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver
        self.told: list[dict[str, str]] = []

    def of(self, key: str) -> list[str]:
        """What was said so far of *key*."""
        while True:
            try:
                datagram = self._receiver.recv(4096).decode()
            except BlockingIOError:
                return [told[key] for told in self.told if key in told]
            self.told.append(dict(line.split("=", 1) for line in datagram.splitlines()))


@pytest.fixture
def manager(tmp_path, monkeypatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield Manager(receiver)


async def test_its_life_as_systemd_is_told_it(simulator, tmp_path, manager):
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            await until(lambda: manager.of("READY"))
            assert await daemon.get("/-/ready") == b"OK\n"
            daemon.drop("slow.json", graphs.slow(1, 3.0))
            await until(lambda: manager.of("STATUS")[-1].startswith("1 on servers, 0 waiting, 1/1"))
            await daemon.finish(1, within_s=20)
            await until(lambda: manager.of("STATUS")[-1].startswith("0 on servers, 0 waiting, 1/1"))
            beats = len(manager.of("WATCHDOG"))
            began_s = trio.current_time()
            await until(lambda: len(manager.of("WATCHDOG")) >= beats + 3)
            assert trio.current_time() - began_s < 3 * WATCHDOG_S
            assert manager.of("STOPPING") == []
            assert await daemon.stop() == 0
    assert manager.of("READY") == ["1"]
    assert manager.of("STOPPING") == ["1"]
    assert "STOPPING" in manager.told[-1], "something was said after it"


async def test_a_prompt_on_its_way_arrives_before_the_end(simulator, tmp_path, manager):
    simulator.faults.post_delay_s = 1.0
    daemon = Daemon(tmp_path, simulator.url, {"audit": {"lost_grace": "30s"}})
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("one.json", graphs.slow(1, 0.5))
            await until(lambda: list(daemon.spool.claimed.iterdir()))
            await trio.sleep(0.3)
            began_s = trio.current_time()
            assert await daemon.stop() == 0
            assert trio.current_time() - began_s < ORDERLY_S
        assert len(simulator.executions) == 1 or simulator.running
        simulator.faults.post_delay_s = 0.0
        async with daemon.running():
            await daemon.finish(1, within_s=10)  # not looked for first, for `lost_grace`
    [result] = daemon.results().values()
    assert (result["state"], result["attempts"]) == ("done", 1)


async def test_what_does_not_end_soon_is_left_to_the_journal(simulator, tmp_path, manager):
    simulator.faults.post_delay_s = 30.0
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        async with daemon.running():
            daemon.drop("one.json", graphs.picture(1))
            await until(lambda: list(daemon.spool.claimed.iterdir()))
            await trio.sleep(0.3)
            daemon.drop("two.json", graphs.picture(2))
            await until(lambda: len(list(daemon.spool.claimed.iterdir())) == 2)
            began_s = trio.current_time()
            assert await daemon.stop() == 0
            assert trio.current_time() - began_s < ORDERLY_S
        simulator.faults.post_delay_s = 0.0
        async with daemon.running():
            await daemon.finish(2, within_s=20)
            metrics = await daemon.metrics()
    assert {result["state"] for result in daemon.results().values()} == {"done"}
    assert metrics['comfyd_attempts_charged_total{server="local"}'] == 0


async def test_a_second_sigterm_ends_it_at_once(simulator, tmp_path, manager):
    simulator.faults.post_delay_s = 30.0
    daemon = Daemon(tmp_path, simulator.url)
    with trio.fail_after(PATIENCE_S):
        await daemon.start()
        try:
            await daemon.ready()
            daemon.drop("one.json", graphs.picture(1))
            await until(lambda: list(daemon.spool.claimed.iterdir()))
            await trio.sleep(0.3)
            process = daemon._process
            assert process is not None
            process.terminate()
            await until(lambda: manager.of("STOPPING"))
            daemon.drop("late.json", graphs.picture(2))
            await trio.sleep(0.5)
            assert (daemon.spool.new / "late.json").exists(), "taken by a daemon that is ending"
            assert manager.of("STATUS")[-1] == "Stopping"
            process.terminate()
            with trio.fail_after(1):
                assert await process.wait() == -signal.SIGTERM
        finally:
            await daemon.bury()
        simulator.faults.post_delay_s = 0.0
        async with daemon.running():
            await daemon.finish(2, within_s=20)
            metrics = await daemon.metrics()
    assert {result["state"] for result in daemon.results().values()} == {"done"}
    assert metrics['comfyd_attempts_charged_total{server="local"}'] == 0
