"""Commit, then act: the dispatcher, its inbox and the auditor, with a clock that jumps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import MockClock

from comfyd.core import facts, orders
from comfyd.core.engine import Engine
from comfyd.core.facts import Claimed, Hint, QueueSeen, Sign, Token
from comfyd.core.keys import Absorbed
from comfyd.core.model import JobId, PromptId, Reason, Row, ServerName, State
from comfyd.core.notes import Note
from comfyd.core.policy import Policy
from comfyd.core.server import Server
from comfyd.errors import DiskFull, JournalError
from comfyd.journal.memory import MemoryStore
from comfyd.journal.store import Batch
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.services.dispatcher import Auditor, Dispatcher
from comfyd.services.inbox import BATCH, CLAIMS, Inbox

A = ServerName("a")
J = JobId("fox")
WALL_S = 1_700_000_000.0


class Disk(MemoryStore):
    """A store whose next commits can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.full = 0
        self.refuse = False
        self.batches: list[Batch] = []

    def commit(self, batch: Batch) -> tuple[bool, ...]:
        if self.full:
            self.full -= 1
            raise DiskFull("no space left")
        self.batches.append(batch)
        done = super().commit(batch)
        return tuple(False for _ in done) if self.refuse else done


class Rig:
    def __init__(self, journal: Journal, disk: Disk) -> None:
        self.clock = Clock(WALL_S)
        server = Server(name=A, origin="http://a", window=2)
        self.engine = Engine([server], Policy(), Counter())
        self.engine.load([], crashed=False, now_s=self.clock.now_s(), u=0.0)
        self.disk = disk
        self.inbox = Inbox(self.engine.knows)
        self.auditor = Auditor(self.inbox, self.clock)
        self.performed: list[tuple[float, orders.JobOrder, State]] = []
        self.notes: list[Note] = []
        self.refused = 0
        self.absorbed: list[Absorbed] = []
        self.dispatcher = Dispatcher(
            self.engine,
            self.inbox,
            journal,
            self.clock,
            perform=self.perform,
            observe=self.notes.extend,
            on_deadline=self.auditor.set_deadline,
            on_refused=self.refuse,
            on_absorbed=self.absorbed.append,
            draw=lambda: 0.0,
        )

    def refuse(self) -> None:
        self.refused += 1

    def perform(self, order: orders.Task) -> None:
        assert isinstance(order, orders.JobOrder)
        stored = self.disk.get(order.row.job)
        assert stored is not None, "an order before its commit"
        self.performed.append((self.clock.now_s() - WALL_S, order, stored.state))

    def claim(self, *names: str) -> list[Claimed]:
        return [
            Claimed(row=Row(job=JobId(name), seq=seq, claimed_at=self.clock.now_s()))
            for seq, name in enumerate(names)
        ]

    def ready(self) -> None:
        self.inbox.put(facts.Health(server=A, ok=True))
        self.inbox.put(facts.Connected(server=A, client_id="c"))

    def token(self) -> Token:
        job = self.engine.jobs[J]
        return Token(J, job.row.attempt, job.live.seq)


def waiting(rig: Rig) -> bool:
    return rig.dispatcher.waits_for_space


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    disk = Disk()
    async with Journal(lambda: disk, inline=True) as journal, trio.open_nursery() as nursery:
        rig = Rig(journal, disk)
        nursery.start_soon(rig.dispatcher.run)
        nursery.start_soon(rig.auditor.run)
        yield rig
        nursery.cancel_scope.cancel()


async def test_an_order_is_given_only_after_its_row_is_committed(
    autojump_clock: MockClock,
) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim(rig.claim("fox"))
        await trio.sleep(0.1)
        ((_, order, state),) = rig.performed
        assert isinstance(order, orders.Submit)
        assert state is State.SUBMITTING
        assert order.row == rig.disk.get(J)


async def test_facts_that_come_together_share_one_commit(autojump_clock: MockClock) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim(rig.claim(*(f"j{i}" for i in range(100))))
        await trio.sleep(0.1)
        assert len(rig.disk.batches) == 1
        assert rig.disk.counts()[State.QUEUED] == 98


async def test_what_nothing_waits_for_rides_with_the_next_commit_or_goes_after_a_second(
    autojump_clock: MockClock,
) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim(rig.claim("fox"))
        await trio.sleep(0.1)
        rig.inbox.put(facts.Accepted(token=rig.token()))
        await trio.sleep(0.1)
        commits = len(rig.disk.batches)
        prompt_id = rig.engine.jobs[J].row.prompt_id
        assert prompt_id is not None
        assert rig.inbox.hint(Hint(server=A, prompt_id=prompt_id, sign=Sign.ALIVE))
        await trio.sleep(0.5)
        assert len(rig.disk.batches) == commits
        await trio.sleep(1)
        assert len(rig.disk.batches) == commits + 1
        stored = rig.disk.get(J)
        assert stored is not None
        assert stored.started_at is not None


async def test_a_full_disk_is_a_pause(autojump_clock: MockClock) -> None:
    async with running() as rig:
        rig.ready()
        rig.disk.full = 3
        await rig.inbox.claim(rig.claim("fox"))
        await trio.sleep(5)
        assert waiting(rig)
        assert rig.refused > 1
        assert rig.performed == []
        await trio.sleep(2)
        assert not waiting(rig)
        assert [type(order) for _, order, _ in rig.performed] == [orders.Submit]
        assert len(rig.disk.batches) == 1


async def test_a_change_that_does_not_apply_ends_the_daemon(autojump_clock: MockClock) -> None:
    with pytest.RaisesGroup(JournalError, flatten_subgroups=True):
        async with running() as rig:
            rig.disk.refuse = True
            await rig.inbox.claim(rig.claim("fox"))
            await trio.sleep(1)


async def test_the_auditor_wakes_the_engine_exactly_when_due(autojump_clock: MockClock) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim(rig.claim("fox"))
        await trio.sleep(1)
        rig.inbox.put(facts.Accepted(token=rig.token()))
        await trio.sleep(400)
        looks = [at for at, order, _ in rig.performed if isinstance(order, orders.Probe)]
        assert looks == pytest.approx([301])  # stale_after from its acceptance; no answer yet


async def test_the_story_is_committed_with_the_rows(autojump_clock: MockClock) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim(rig.claim("fox"))
        await trio.sleep(0.1)
        told = [(event.kind, event.data.get("state")) for event in rig.disk.events(J)]
        assert told == [("claimed", None), ("moved", "submitting")]
        assert rig.disk.events(J)[0].at == pytest.approx(WALL_S, abs=1)


async def test_who_left_a_fact_waits_until_that_one_has_been_dealt_with(
    autojump_clock: MockClock,
) -> None:
    async with running() as rig:
        await trio.sleep(0.1)
        claims = rig.claim(*(f"j{i}" for i in range(2 * BATCH + 1)))
        for claim in claims[:-1]:
            rig.inbox.put(claim)
        number = rig.inbox.leave(claims[-1])
        await rig.dispatcher.settled()
        assert rig.disk.get(claims[-1].row.job) is None  # only the next batch was waited for
        await rig.dispatcher.settled(number)
        assert rig.disk.get(claims[-1].row.job) == claims[-1].row
        with trio.fail_after(1):
            await rig.dispatcher.settled(number)  # at once
        with trio.move_on_after(60) as waited:
            await rig.dispatcher.settled(number + 1000)
        assert waited.cancelled_caught


async def test_a_fact_that_a_full_disk_keeps_from_the_journal_has_not_been_dealt_with(
    autojump_clock: MockClock,
) -> None:
    async with running() as rig:
        await trio.sleep(0.1)
        rig.disk.full = 3
        (claim,) = rig.claim("fox")
        began_s = trio.current_time()
        await rig.dispatcher.settled(rig.inbox.leave(claim))
        assert trio.current_time() - began_s == pytest.approx(6)
        assert rig.disk.get(J) == claim.row


async def test_it_comes_round_for_who_asks_also_on_a_full_disk(autojump_clock: MockClock) -> None:
    async with running() as rig:
        await trio.sleep(0.1)
        began_s = trio.current_time()
        rig.inbox.put(facts.Tick())
        await rig.dispatcher.turned()
        assert trio.current_time() == began_s
        rig.disk.full = 1000
        rig.inbox.put(rig.claim("fox")[0])
        for _ in range(3):
            with trio.fail_after(10):
                await rig.dispatcher.turned()
        assert waiting(rig)
        rig.disk.full = 0


# --- keys ----------------------------------------------------------------------------------------


def keyed(seq: int, name: str, sha256: str = "1", *, key: str = "k") -> Claimed:
    payload = f"{name}.json"
    return Claimed(row=Row(job=JobId(name), seq=seq, key=key, sha256=sha256, payload=payload))


@pytest.mark.parametrize("together", [True, False])
async def test_the_same_again_is_absorbed_and_its_name_leads_to_the_job(
    autojump_clock: MockClock, together: bool
) -> None:
    async with running() as rig:
        rig.ready()
        for claims in (
            [[keyed(1, "fox"), keyed(2, "fox2"), keyed(3, "cat", key="c"), keyed(4, "fox3")]]
            if together
            else [[keyed(1, "fox")], [keyed(2, "fox2")], [keyed(3, "cat", key="c")],
                  [keyed(4, "fox3")]]
        ):  # fmt: skip
            await rig.inbox.claim(claims)
            await trio.sleep(0.1)
        assert [(each.row.job, each.into) for each in rig.absorbed] == [("fox2", J), ("fox3", J)]
        assert rig.disk.rows_by_job.keys() == {"fox", "cat"}
        assert [row.job for row in rig.disk.find("fox3")] == [J]
        told = [event.data for event in rig.disk.events(J) if event.kind == "absorbed"]
        assert told == [{"name": "fox2"}, {"name": "fox3"}]
        assert {order.row.job for _, order, _ in rig.performed} == {"fox", "cat"}


async def test_an_alias_that_is_known_already_is_no_error(autojump_clock: MockClock) -> None:
    """As after a crash between the alias and the removal of the file."""
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim([keyed(1, "fox")])
        await trio.sleep(0.1)
        for seq in (2, 3):
            await rig.inbox.claim([keyed(seq, "fox2")])
            await trio.sleep(0.1)
        assert [each.row.job for each in rig.absorbed] == ["fox2", "fox2"]


async def test_what_a_forgotten_job_was_to_absorb_is_not_cleared_away(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as rig:
        ghost = keyed(1, "ghost").row
        monkeypatch.setattr(rig.disk, "keyed", lambda key: ghost)
        await rig.inbox.claim([keyed(2, "fox2")])
        await trio.sleep(0.1)
        assert rig.disk.batches
        assert rig.absorbed == []


async def test_absorbed_is_told_only_after_the_commit(autojump_clock: MockClock) -> None:
    async with running() as rig:
        rig.ready()
        await rig.inbox.claim([keyed(1, "fox")])
        await trio.sleep(0.1)
        rig.disk.full = 3
        await rig.inbox.claim([keyed(2, "fox2")])
        await trio.sleep(5)
        assert rig.absorbed == []
        await trio.sleep(2)
        assert [each.row.job for each in rig.absorbed] == ["fox2"]


@pytest.mark.parametrize("together", [True, False])
async def test_the_same_key_with_other_content_fails_and_leaves_the_first_alone(
    autojump_clock: MockClock, together: bool
) -> None:
    async with running() as rig:
        await rig.inbox.claim([keyed(1, "fox")])
        if not together:
            await trio.sleep(0.1)
        await rig.inbox.claim([keyed(2, "fox2", "2"), keyed(3, "fox3"), keyed(4, "fox4", "2")])
        await trio.sleep(0.1)
        for name in ("fox2", "fox4"):
            row = rig.disk.get(JobId(name))
            assert row is not None
            assert (row.state, row.key) == (State.COLLECTING, None)
            assert row.outcome is not None
            assert row.outcome.reason is Reason.CONFLICT
        assert [each.row.job for each in rig.absorbed] == ["fox3"]
        holder = rig.disk.keyed("k")
        assert holder is not None
        assert holder.job == J


async def test_a_retry_takes_the_key_over(autojump_clock: MockClock) -> None:
    async with running() as rig:
        retry = msgspec.structs.replace(keyed(2, "again").row, retry_of=J)
        await rig.inbox.claim([keyed(1, "fox"), Claimed(row=retry), keyed(3, "fox3")])
        await trio.sleep(0.1)
        assert rig.disk.rows_by_job.keys() == {"fox", "again"}
        assert [each.into for each in rig.absorbed] == ["again"]


async def test_who_is_stopped_before_the_commit_clears_nothing_away(
    autojump_clock: MockClock,
) -> None:
    disk = Disk()
    async with Journal(lambda: disk, inline=True) as journal:
        rig = Rig(journal, disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.dispatcher.run)
            await rig.inbox.claim([keyed(1, "fox")])
            await trio.sleep(0.1)
            disk.full = 1000
            await rig.inbox.claim([keyed(2, "fox2")])
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        disk.full = 0
        await rig.dispatcher.flush()
    assert rig.absorbed == []
    assert disk.find("fox2") == ()


# --- the inbox -----------------------------------------------------------------------------------


async def test_floods_of_hints_collapse_and_an_end_is_never_hidden() -> None:
    inbox = Inbox(lambda prompt_id: prompt_id == "ours")
    for sign in [Sign.ALIVE] * 1000 + [Sign.ENDED] + [Sign.ALIVE] * 1000 + [Sign.ENDING]:
        assert inbox.hint(Hint(server=A, prompt_id=PromptId("ours"), sign=sign))
        assert not inbox.hint(Hint(server=A, prompt_id=PromptId("other"), sign=sign))
    assert inbox.take() == [Hint(server=A, prompt_id=PromptId("ours"), sign=Sign.ENDED)]
    assert inbox.take() == []


async def test_hints_come_before_the_queues_length_and_only_its_last_counts() -> None:
    inbox = Inbox(lambda prompt_id: True)
    for remaining in (3, 2, 0):
        inbox.put(QueueSeen(server=A, remaining=remaining))
        inbox.put(facts.Health(server=A, ok=not remaining))
        inbox.put(facts.QueueLooked(server=A, running=1, pending=remaining))
    inbox.hint(Hint(server=A, prompt_id=PromptId("p"), sign=Sign.ENDED))
    assert [type(fact) for fact in inbox.take()] == [
        Hint,
        QueueSeen,
        facts.Health,
        facts.QueueLooked,
    ]


async def test_claims_wait_for_room(autojump_clock: MockClock) -> None:
    inbox = Inbox(lambda prompt_id: True)
    claim = Claimed(row=Row(job=J, seq=0))
    await inbox.claim([claim] * CLAIMS)
    with trio.move_on_after(10) as waited:
        await inbox.claim([claim])
    assert waited.cancelled_caught
    assert len(inbox.take()) == BATCH
    with trio.fail_after(10):
        await inbox.claim([claim])
    await inbox.wait()
    left = 0
    while taken := inbox.take():
        left += len(taken)
    assert left == CLAIMS - BATCH + 1


async def test_an_auditor_without_a_deadline_sleeps(autojump_clock: MockClock) -> None:
    inbox = Inbox(lambda prompt_id: True)
    auditor = Auditor(inbox, clock := Clock(0.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(auditor.run)
        await trio.sleep(1000)
        assert inbox.take() == []
        auditor.set_deadline(clock.now_s() + 5)
        auditor.set_deadline(clock.now_s() + 2)
        await trio.sleep(2.1)
        assert inbox.take() == [facts.Tick()]
        auditor.set_deadline(math.inf)
        await trio.sleep(1000)
        assert inbox.take() == []
        nursery.cancel_scope.cancel()
