"""The shells against the simulator: what each answer of a server becomes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from comfyd.comfyui.client import Client
from comfyd.core import facts, orders
from comfyd.core.facts import Answer, FetchResult, Presence, Token, Uncollected
from comfyd.core.model import (
    End,
    FileRef,
    JobId,
    Outcome,
    Reason,
    Record,
    Row,
    ServerName,
    State,
    prompt_id_of,
)
from comfyd.errors import ProtocolViolation
from comfyd.services import fetcher, submitter
from comfyd.services.fetcher import Limits
from comfyd.services.prober import Prober
from comfyd.simulator import Simulator
from comfyd.spool.layout import Spool

J = JobId("fox.01K0000000000000000000000A")
LIMITS = Limits(history_attempts=2, history_backoff_s=0.05, min_free_bytes=0)


def graph(side_px: int = 8, *, seconds: float = 0.0, **inputs: object) -> dict[str, Any]:
    source = {"width": side_px, "height": side_px, "batch_size": 1, "color": 255, **inputs}
    made: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": source},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    if seconds:
        sleep = {"image": ["1", 0], "seconds": seconds}
        made["5"] = {"class_type": "SimSleep", "inputs": sleep}
        made["9"]["inputs"]["images"] = ["5", 0]
    return made


class Rig:
    def __init__(self, simulator: Simulator, client: Client, spool: Spool) -> None:
        self.simulator, self.client, self.spool = simulator, client, spool
        self.posted = 0
        self.retries: list[str] = []
        self.short: dict[JobId, int] = {}
        self.waiting = ""

    def row(self, document: object = None, **fields: Any) -> Row:
        data = json.dumps(graph() if document is None else document).encode()
        (self.spool.claimed / f"{J}.json").write_bytes(data)
        row = Row(
            job=J, seq=1, state=State.SUBMITTING, payload=f"{J}.json", attempt=1,
            sha256=hashlib.sha256(data).hexdigest(), server=ServerName("s"), origin="http://s",
            prompt_id=prompt_id_of(J, 1), client_id="c", claimed_at=1.0, submitted_at=2.0,
        )  # fmt: skip
        return msgspec.structs.replace(row, **fields)

    async def submit(self, row: Row) -> Answer:
        def posted() -> None:
            self.posted += 1

        return await submitter.submit(
            orders.Submit(token=Token(J, 1, 1), row=row),
            self.client,
            self.spool,
            unique_prefix=True,
            on_posted=posted,
        )

    async def look(self, row: Row, *, stop: bool = False) -> facts.Probed:
        kind = orders.Stop if stop else orders.Probe
        (answer,) = await self.probe([kind(token=Token(J, 1, 2), row=row)])
        return answer

    async def probe(self, asked: Sequence[orders.Probe | orders.Stop]) -> list[facts.Probed]:
        send, receive = trio.open_memory_channel[facts.Probed](len(asked))

        def tell(fact: Answer | facts.Fenced | facts.QueueLooked) -> None:
            if isinstance(fact, facts.Probed):
                send.send_nowait(fact)

        prober = Prober(ServerName("s"), self.client, tell)
        for order in asked:
            prober.ask(order)
        answers: list[facts.Probed] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prober.run)
            for _ in asked:
                answers.append(await receive.receive())
            nursery.cancel_scope.cancel()
        return answers

    async def fetch(self, row: Row) -> facts.Fetched:
        answer = await fetcher.fetch(
            orders.Fetch(token=Token(J, 1, 3), row=row),
            self.client,
            LIMITS,
            on_fetch=lambda result, seconds: None,
            on_retry=lambda error: self.retries.append(type(error).__name__),
        )
        assert isinstance(answer, facts.Fetched)
        return answer

    async def finished(self, row: Row) -> Record:
        assert isinstance(await self.submit(row), facts.Accepted)
        for _ in range(200):
            if (answer := await self.look(row)).record is not None:
                return answer.record
            await trio.sleep(0.02)
        raise AssertionError("the prompt did not finish")

    async def collect(self, row: Row, limits: Limits = LIMITS) -> Answer:
        return await fetcher.collect(
            orders.Collect(token=Token(J, 1, 4), row=row),
            self.client,
            self.spool,
            limits,
            now_s=lambda: 9.0,
            on_retry=lambda error: self.retries.append(type(error).__name__),
            short=self.short,
            waiting=lambda: self.waiting,
        )


@asynccontextmanager
async def rigged(tmp_path: Path) -> AsyncIterator[Rig]:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    simulator = Simulator(run_s=0.0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(simulator.serve, 0)
            client = Client(
                url, connect_timeout_s=2, submit_timeout_s=1, history_timeout_s=1,
                health_timeout_s=1, upload_timeout_s=1, download_idle_timeout_s=1,
            )  # fmt: skip
            yield Rig(simulator, client, spool)
            await client.aclose()
            nursery.cancel_scope.cancel()


def collecting(row: Row, record: Record, outcome: Outcome | None = None) -> Row:
    done = Outcome(state=State.DONE)
    return msgspec.structs.replace(
        row, state=State.COLLECTING, record=record, outcome=outcome or done, ended_at=3.0
    )


# --- submitting ----------------------------------------------------------------------------------


async def test_a_post_that_is_taken(tmp_path):
    async with rigged(tmp_path) as rig:
        answer = await rig.submit(rig.row())
        assert isinstance(answer, facts.Accepted)
        assert (answer.node_errors, rig.posted) == ({}, 1)
        assert rig.simulator.posts[prompt_id_of(J, 1)] == 1


@pytest.mark.parametrize(
    ("fault", "kind", "executed"),
    [
        ("post-refuse", facts.SubmitUnknown, False),
        ("post-fail=500", facts.SubmitUnknown, False),
        ("post-fail=503", facts.SubmitUnknown, False),
        ("post-fail=403", facts.NotSent, False),
        ("post-fail=429", facts.NotSent, False),
        ("post-fail=413", facts.Rejected, False),
        ("post-ambiguous", facts.SubmitUnknown, True),
        ("post-hang", facts.SubmitUnknown, True),
    ],
)
async def test_what_each_failure_of_a_post_proves(tmp_path, fault, kind, executed):
    async with rigged(tmp_path) as rig:
        rig.simulator.faults.set(fault)
        assert type(await rig.submit(rig.row())) is kind
        assert rig.posted == 0
        await trio.sleep(0.1)
        assert bool(rig.simulator.executions) is executed


async def test_a_refused_connection_sent_nothing(tmp_path):
    async with rigged(tmp_path) as rig:
        rig.simulator.kill()
        answer = await rig.submit(rig.row())
        assert answer == facts.NotSent(token=Token(J, 1, 1), reason="refused")


async def test_a_bad_value_is_rejected_with_its_node(tmp_path):
    async with rigged(tmp_path) as rig:
        answer = await rig.submit(rig.row(graph(width=-5)))
        assert isinstance(answer, facts.Rejected)
        assert "node 1 (EmptyImage), input width" in answer.message


async def test_a_claimed_file_that_changed_or_vanished_cannot_be_sent(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        (rig.spool.claimed / row.payload).write_text("{}")
        changed = await rig.submit(row)
        (rig.spool.claimed / row.payload).unlink()
        gone = await rig.submit(row)
        assert isinstance(changed, facts.Unsendable)
        assert isinstance(gone, facts.Unsendable)
        assert not rig.simulator.posts


async def test_a_post_without_a_committed_intent_is_a_bug(tmp_path):
    async with rigged(tmp_path) as rig:
        with pytest.raises(ProtocolViolation, match="post_without_intent"):
            await rig.submit(rig.row(state=State.QUEUED))


async def test_drawn_numbers_are_sent_as_they_were_recorded(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row({"workflow": graph(), "set": {"1.color": "random"}}, drawn={"1.color": 4711})
        body = json.loads(submitter.read_job(rig.spool, row).body(unique_prefix=True))
        assert body["prompt"]["1"]["inputs"]["color"] == 4711
        assert body["prompt"]["9"]["inputs"]["filename_prefix"] == f"comfyd/{J}-1/x"
        assert body["extra_data"]["comfyd"] == {"job": J, "attempt": 1}
        assert "number" not in body


# --- looking -------------------------------------------------------------------------------------


async def test_what_the_prober_sees(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row(graph(seconds=5.0))
        assert (await rig.look(row)).presence is Presence.ABSENT
        await rig.submit(row)
        while (seen := await rig.look(row)).presence is not Presence.RUNNING:
            assert seen.presence is Presence.PENDING
        stopped = await rig.look(row, stop=True)
        assert stopped.presence is Presence.FINISHED
        assert stopped.record is not None
        assert stopped.record.end is End.INTERRUPTED
        rig.simulator.restart()
        assert (await rig.look(row)).presence is Presence.ABSENT
        rig.simulator.kill()
        assert (await rig.look(row)).presence is Presence.REFUSED


@pytest.mark.parametrize(
    ("fault", "presence"),
    [("queue-fail", Presence.UNKNOWN), ("history-fail", Presence.UNREADABLE)],
)
async def test_an_error_is_never_an_absence(tmp_path, fault, presence):
    async with rigged(tmp_path) as rig:
        rig.simulator.faults.set(fault)
        assert (await rig.look(rig.row())).presence is presence


async def test_one_look_at_the_queue_serves_all_who_ask(tmp_path):
    async with rigged(tmp_path) as rig:
        rows = [rig.row(attempt=n, prompt_id=prompt_id_of(J, n)) for n in range(1, 9)]
        asked = [orders.Probe(token=Token(J, n, 1), row=row) for n, row in enumerate(rows)]
        rig.simulator.faults.set("queue-fail=1")
        answers = await rig.probe(asked)
        assert {answer.presence for answer in answers} == {Presence.UNKNOWN}


async def test_a_failing_history_is_tried_again_and_an_empty_one_is_an_answer(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        assert (await rig.fetch(row)).result is FetchResult.EMPTY
        await rig.finished(row)
        rig.simulator.faults.set("history-fail=1")
        found = await rig.fetch(row)
        assert found.result is FetchResult.FOUND
        assert rig.retries == ["ServerStatus"]
        rig.simulator.faults.set("history-fail")
        assert (await rig.fetch(row)).result is FetchResult.ERROR


# --- collecting and publishing -------------------------------------------------------------------


async def test_a_result_is_staged_whole_and_shown_once(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        row = collecting(row, await rig.finished(row))
        answer = await rig.collect(row)
        assert isinstance(answer, facts.Collected)
        stage = rig.spool.stage / J
        assert sorted(path.name for path in stage.iterdir()) == [
            "9-0.png", "job.json", "result.json",
        ]  # fmt: skip
        result = json.loads((stage / "result.json").read_bytes())
        (output,) = result["outputs"]
        data = (stage / "9-0.png").read_bytes()
        assert output["sha256"] == hashlib.sha256(data).hexdigest()
        assert (result["state"], result["durations_s"]["total"]) == ("done", 8.0)
        row = msgspec.structs.replace(row, state=State.PUBLISHING, staged=answer.staged)
        publish = orders.Publish(token=Token(J, 1, 5), row=row)
        for _ in range(2):  # again after a crash
            assert fetcher.show(publish, rig.spool) == facts.Published(token=publish.token)
        assert (rig.spool.done / J / "9-0.png").read_bytes() == data


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("view-missing", Uncollected.MISSING),
        ("view-wrong", Uncollected.INVALID),
        ("view-truncate", Uncollected.SERVER),
    ],
)
async def test_an_output_that_cannot_be_had_is_never_left_out(tmp_path, monkeypatch, fault, cause):
    monkeypatch.setattr(fetcher, "_TRY_AGAIN_S", 0.01)
    async with rigged(tmp_path) as rig:
        row = rig.row()
        row = collecting(row, await rig.finished(row))
        rig.simulator.faults.set(fault)
        answer = await rig.collect(row)
        assert isinstance(answer, facts.CollectFailed)
        assert answer.cause is cause
        rig.simulator.faults.clear()
        assert isinstance(await rig.collect(row), facts.Collected)


async def test_of_a_failed_job_what_can_be_had_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(fetcher, "_TRY_AGAIN_S", 0.01)
    failed = Outcome(state=State.FAILED, reason=Reason.INTERRUPTED, message="Stopped.")
    async with rigged(tmp_path) as rig:
        row = rig.row()
        record = await rig.finished(row)
        gone = FileRef(node="8", key="images", filename="gone.png")
        row = collecting(row, msgspec.structs.replace(record, files=(*record.files, gone)), failed)
        assert isinstance(await rig.collect(row), facts.Collected)
        error = json.loads((rig.spool.stage / J / "error.json").read_bytes())
        assert [output["node"] for output in error["outputs"]] == ["9"]
        assert "gone.png" in error["warnings"][0]
        assert (error["reason"], error["message"]) == ("interrupted", "Stopped.")


async def test_a_file_that_does_not_fit_waits_for_space_and_is_not_blamed(tmp_path, monkeypatch):
    async with rigged(tmp_path) as rig:
        row = rig.row(graph(512))
        row = collecting(row, await rig.finished(row))
        free = [1 << 20, 100]  # enough to begin, too little for the file
        monkeypatch.setattr(fetcher, "free_bytes", lambda found: free.pop(0))
        answer = await rig.collect(row)
        assert isinstance(answer, facts.CollectFailed)
        assert answer.cause is Uncollected.DISK
        assert list((rig.spool.stage / J).iterdir()) == []  # others may need the space


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "chmod", "mkdir"])
async def test_whatever_the_disk_refuses_is_a_pause(tmp_path, monkeypatch, call, number):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        row = collecting(row, await rig.finished(row))
        with monkeypatch.context() as patch:
            refusing(patch, call, number)
            answer = await rig.collect(row)
        assert isinstance(answer, facts.CollectFailed)
        assert answer.cause is Uncollected.DISK
        assert os.strerror(number) in answer.message
        assert isinstance(await rig.collect(row), facts.Collected)


def refusing(patch, call, number):
    """Make the disk refuse one kind of write."""
    real = getattr(os, call)

    def refuse(*args, **fds):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **fds)
        raise OSError(number, "refused")

    patch.setattr(os, call, refuse)


async def test_what_was_too_large_is_not_fetched_again_before_there_is_more_room(
    tmp_path, monkeypatch
):
    async with rigged(tmp_path) as rig:
        row = rig.row(graph(512))
        row = collecting(row, await rig.finished(row))
        views = 0
        real = rig.client.view

        async def view(*args, **limits):
            nonlocal views
            views += 1
            return await real(*args, **limits)

        monkeypatch.setattr(rig.client, "view", view)
        free = [1 << 20]
        monkeypatch.setattr(fetcher, "free_bytes", lambda found: free[0])
        with monkeypatch.context() as patch:
            refusing(patch, "fsync", errno.ENOSPC)  # all of it was written by then
            assert isinstance(await rig.collect(row), facts.CollectFailed)
        assert views == 1
        (short,) = rig.short.values()
        assert short > 500
        free[0] = short
        for _ in range(3):
            assert isinstance(await rig.collect(row), facts.CollectFailed)
        assert views == 1
        free[0] = 1 << 20
        assert isinstance(await rig.collect(row), facts.Collected)
        assert rig.short == {}


async def test_while_everything_waits_nothing_is_even_looked_at(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        row = collecting(row, await rig.finished(row))
        rig.waiting = "Waiting for space."
        answer = await rig.collect(row)
        assert isinstance(answer, facts.CollectFailed)
        assert answer.message == "Waiting for space."
        assert not (rig.spool.stage / J).exists()


async def test_below_the_reserve_nothing_is_downloaded(tmp_path):
    async with rigged(tmp_path) as rig:
        row = rig.row()
        row = collecting(row, await rig.finished(row))
        answer = await rig.collect(row, Limits(min_free_bytes=1 << 60))
        assert isinstance(answer, facts.CollectFailed)
        assert answer.cause is Uncollected.DISK
