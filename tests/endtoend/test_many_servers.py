"""Several servers and one daemon. What takes longer is in prove_many_servers.py."""

from __future__ import annotations

from tests.endtoend.prove_many_servers import farm


async def test_work_is_spread_and_each_job_is_run_once(tmp_path):
    async with farm(tmp_path, within_s=60) as three:
        three.drop(30)
        await three.daemon.finish(30, within_s=30)
    results = three.check()
    assert {result["server"] for result in results.values()} == {"a", "b", "c"}
    assert set(three.runs().values()) == {1}
    for simulator in three.simulators:
        assert simulator.executions.total() >= 5


async def test_one_that_is_killed_and_does_not_come_back(tmp_path):
    async with farm(tmp_path, within_s=60) as three:
        three.drop(30)
        await three.daemon.finish(6, within_s=20)
        three.simulators[0].kill()
        await three.daemon.finish(30, within_s=30)
    three.check()
    assert max(three.runs().values()) <= 2
