"""A lost journal, rebuilt: against a real spool and the real simulator."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from comfyd import config
from comfyd.core.model import JobId, Outcome, Reason, Row, State, prompt_id_of
from comfyd.core.rebuild import UNASKED_ATTEMPTS
from comfyd.core.result import manifest
from comfyd.core.workflow import body
from comfyd.journal.memory import MemoryStore
from comfyd.journal.schema import WHOLE
from comfyd.journal.store import Batch, Insert
from comfyd.journal.thread import Journal
from comfyd.services import rebuild as service
from comfyd.services.clock import Clock
from comfyd.services.link import client_of
from comfyd.services.rebuild import rebuild
from comfyd.simulator import Simulator
from comfyd.simulator.faults import HowOften
from comfyd.spool.layout import Spool
from tests.endtoend.graphs import picture, slow
from tests.endtoend.waiting import until

GRACE_S = 0.2
FAILED = Outcome(state=State.FAILED, reason=Reason.REJECTED, message="no")


def job(number: int, stem: str = "fox") -> JobId:
    return JobId(f"{stem}.01K{number:023}")


class Rig:
    def __init__(self, home: Path, simulator: Simulator, url: str, more: str = "") -> None:
        lines = [
            f"servers: [{{name: s, url: '{url}'}}{more}]",
            f"audit: {{lost_grace: {GRACE_S * 1000:g}ms}}",
            "history: {timeout: 100ms}",
        ]
        self.config = config.parse("\n".join(lines), file=home / "comfyd.yaml", base=home)
        self.spool = Spool(self.config.spool)
        self.spool.prepare()
        self.simulator = simulator
        self.store = MemoryStore()
        self.client = client_of(self.config.servers[0], self.config)

    def claim(self, job: JobId, document: object = None) -> None:
        data = json.dumps(picture(1) if document is None else document).encode()
        (self.spool.claimed / f"{job}.json").write_bytes(data)

    def publish(self, job: JobId, place: Path, *, state: State = State.DONE) -> None:
        row = Row(job=job, seq=1, attempt=1, outcome=Outcome(state=state))
        if state is not State.DONE:
            row = msgspec.structs.replace(row, outcome=FAILED)
        (place / job).mkdir()
        name = "result.json" if state is State.DONE else "error.json"
        document = manifest(row, [], published_at=5.0)
        (place / job / name).write_text(json.dumps(document))

    async def post(self, job: JobId, attempt: int, graph: dict[str, Any]) -> None:
        prompt_id = prompt_id_of(job, attempt)
        await self.client.submit(body(graph, {}, prompt_id, "c", job, attempt))

    async def rebuilt(self) -> dict[JobId, Row]:
        async with Journal(lambda: self.store, inline=True) as journal:
            await rebuild(self.config, self.spool, Clock(), journal)
        assert self.store.remembered() == {WHOLE: True}
        return self.store.rows_by_job


@asynccontextmanager
async def rigged(home: Path, *, run_s: float = 0.0, more: str = "") -> AsyncIterator[Rig]:
    simulator = Simulator(run_s=run_s)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            rig = Rig(home, simulator, await nursery.start(simulator.serve, 0), more)
            try:
                yield rig
            finally:
                with trio.move_on_after(1, shield=True):
                    await rig.client.aclose()
            nursery.cancel_scope.cancel()


async def test_each_job_is_taken_up_where_it_was(tmp_path):
    never, pending, running, ended, delivered, failed, ready = jobs = [job(n) for n in range(7)]
    async with rigged(tmp_path) as rig:
        for each in jobs:
            rig.claim(each, slow(int(each[-1]), 0.0))
        await rig.post(ended, 2, picture(1))
        await until(lambda: rig.simulator.history == [prompt_id_of(ended, 2)])
        await rig.post(running, 1, slow(2, 20))
        await rig.post(pending, 3, slow(3, 20))
        rig.publish(delivered, rig.spool.done)
        rig.publish(failed, rig.spool.failed, state=State.FAILED)
        rig.publish(ready, rig.spool.stage)
        rows = await rig.rebuilt()
        states = {
            never: (State.QUEUED, 0, None),
            pending: (State.SUBMITTED, 3, prompt_id_of(pending, 3)),
            running: (State.SUBMITTED, 1, prompt_id_of(running, 1)),
            ended: (State.SUBMITTED, 2, prompt_id_of(ended, 2)),
            delivered: (State.DONE, 1, None),
            failed: (State.FAILED, 1, None),
            ready: (State.PUBLISHING, 1, None),
        }
        assert {key: (row.state, row.attempt, row.prompt_id) for key, row in rows.items()} == states
        assert [row.seq for row in rows.values()] == [1, 2, 3, 4, 5, 6, 7]
        assert [each for each, row in rows.items() if row.started_at is not None] == [running]
        assert not any(row.retired for row in rows.values())
        assert {row.origin for row in rows.values()} == {None, rig.config.servers[0].url}
        assert rig.store.fences() == ()
        assert rig.store.counts()[State.SUBMITTED] == 3
        assert [event.kind for event in rig.store.events(never)] == ["rebuilt"]


async def test_seeds_are_drawn_as_they_were(tmp_path):
    fox = job(1)
    document = {
        "workflow": picture(1),
        "set": {"1.color": "random", "1.width": 16, "1.height": "random"},
    }
    async with rigged(tmp_path) as rig:
        rig.claim(fox, document)
        first = (await rig.rebuilt())[fox]
        rig.store = MemoryStore()
        again = (await rig.rebuilt())[fox]
        rig.claim(job(2), document)
        rig.store = MemoryStore()
        other = (await rig.rebuilt())[job(2)]
    assert len(set(first.drawn.values())) == 2
    assert again.drawn == first.drawn != other.drawn


async def test_a_post_that_arrives_late_is_found(tmp_path):
    fox = job(1)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)

        async def ghost() -> None:
            await trio.sleep(GRACE_S * 0.7)
            await rig.post(fox, 1, slow(1, 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ghost)
            rows = await rig.rebuilt()
    assert (rows[fox].state, rows[fox].attempt) == (State.SUBMITTED, 1)


async def test_a_server_that_does_not_say_may_hold_any_attempt(tmp_path):
    fox, wolf = job(1), job(2)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)
        rig.claim(wolf)
        await rig.post(wolf, 1, slow(1, 20))
        rig.simulator.faults.history_fail = HowOften()
        rows = await rig.rebuilt()
    assert (rows[fox].state, rows[fox].attempt) == (State.QUEUED, UNASKED_ATTEMPTS)
    assert (rows[wolf].state, rows[wolf].attempt) == (State.SUBMITTED, 1)


async def test_a_server_that_is_gone_holds_nothing(tmp_path):
    fox = job(1)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)
        rig.config = config.parse(
            "servers: [{name: s, url: 'http://127.0.0.1:9'}]\naudit: {lost_grace: 100ms}",
            file=tmp_path / "comfyd.yaml",
            base=tmp_path,
        )
        rows = await rig.rebuilt()
    assert (rows[fox].state, rows[fox].attempt) == (State.QUEUED, 0)


async def test_a_server_that_answers_at_last_is_believed(tmp_path):
    fox = job(1)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)
        await rig.post(fox, 4, slow(1, 20))
        rig.simulator.faults.queue_fail = HowOften(count=2)
        rows = await rig.rebuilt()
    assert (rows[fox].state, rows[fox].attempt) == (State.SUBMITTED, 4)


async def test_a_long_history_is_read_to_its_end(tmp_path):
    jobs = [job(number) for number in range(40)]
    async with rigged(tmp_path) as rig:
        for number, each in enumerate(jobs):
            rig.claim(each)
            await rig.post(each, 1, picture(number))
        await until(lambda: len(rig.simulator.history) == len(jobs))
        rows = await rig.rebuilt()
    assert {row.state for row in rows.values()} == {State.SUBMITTED}
    assert len(rows) == len(jobs)


async def test_the_newest_results_come_back_and_ask_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "RESULTS", 2)
    async with rigged(tmp_path) as rig:
        for number in (1, 3, 2):
            rig.publish(job(number), rig.spool.done)
        (rig.spool.done / "not-a-job").mkdir()
        rig.config = config.parse("{}", file=tmp_path / "comfyd.yaml", base=tmp_path)
        began_s = trio.current_time()
        rows = await rig.rebuilt()
        assert trio.current_time() - began_s < 5
    assert list(rows) == [job(2), job(3)]
    assert all(row.retired for row in rows.values())


async def test_a_rebuild_that_was_cut_short_goes_on_and_a_whole_journal_is_left_alone(tmp_path):
    fox, wolf = job(1), job(2)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)
        rig.claim(wolf)
        held = Row(job=wolf, seq=5, state=State.HELD, payload=f"{wolf}.json")
        rig.store.commit(Batch(changes=(Insert(row=held),)))
        rows = await rig.rebuilt()
        assert rows[wolf] == held
        assert (rows[fox].state, rows[fox].seq) == (State.QUEUED, 6)
        rig.claim(job(3))
        assert job(3) not in await rig.rebuilt()


async def test_a_first_start_has_nothing_to_rebuild(tmp_path):
    async with rigged(tmp_path) as rig:
        assert await rig.rebuilt() == {}


@pytest.mark.parametrize("what", ["no file", "a folder", "a link", "text"])
async def test_what_stands_in_the_place_of_a_result_ends_the_job(tmp_path, what):
    fox = job(1)
    async with rigged(tmp_path) as rig:
        rig.claim(fox)
        manifest_path = rig.spool.done / fox / "result.json"
        manifest_path.parent.mkdir()
        match what:
            case "a folder":
                manifest_path.mkdir()
            case "a link":
                manifest_path.symlink_to("/etc/hostname")
            case "text":
                manifest_path.write_text("no")
            case _:
                pass
        rows = await rig.rebuilt()
    assert (rows[fox].state, rows[fox].retired) == (State.DONE, False)
    outcome = rows[fox].outcome
    assert outcome is not None
    assert "manifest" in outcome.message
