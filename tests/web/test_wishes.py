"""Wishes through a real engine, dispatcher and journal: what is told is what happened."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from comfyd.core import facts, orders
from comfyd.core.engine import LOOK_AHEAD, Engine
from comfyd.core.facts import Claimed, Presence, Token
from comfyd.core.model import End, JobId, Outcome, Record, Row, ServerName, Shelf, Staged, State
from comfyd.core.policy import Policy
from comfyd.core.server import Server
from comfyd.errors import DiskFull, JobFileError, UsageError
from comfyd.journal.memory import MemoryStore
from comfyd.journal.store import Batch, Insert
from comfyd.journal.thread import Journal
from comfyd.services.clock import Clock
from comfyd.services.dispatcher import Auditor, Dispatcher
from comfyd.services.inbox import Inbox
from comfyd.web import control, wishes
from comfyd.web.asked import JOBS_MAX
from comfyd.web.control_client import ask
from comfyd.web.wishes import PAGE, Wishes

A, B = ServerName("a"), ServerName("b")
FINAL = {State.DONE, State.FAILED, State.CANCELLED}


def job_id(seq: int, stem: str = "fox") -> JobId:
    return JobId(f"{stem}.01K000000000000000{seq:08d}")


class Rig:
    """A daemon's middle, with shells that answer from what the test says a server does.

    Attributes:
      presence: What stopping a prompt finds; by default it is interrupted, and recorded so.
      hung: A server that answers nothing.

    """

    def __init__(self, journal: Journal, store: MemoryStore, rows: Sequence[Row]) -> None:
        self.clock = Clock(1_900_000_000.0)
        self.store = store
        store.commit(Batch(changes=tuple(map(Insert, rows))))
        servers = [Server(name=name, origin=f"http://{name}", window=2) for name in (A, B)]
        self.engine = Engine(servers, Policy(listen_grace_s=0.0), store.counts())
        self.engine.load(store.active(), crashed=False, now_s=self.clock.now_s(), u=0.0)
        self.inbox = Inbox(self.engine.knows)
        self.auditor = Auditor(self.inbox, self.clock)
        self.dispatcher = Dispatcher(
            self.engine,
            self.inbox,
            journal,
            self.clock,
            perform=self.perform,
            observe=lambda notes: None,
            on_deadline=self.auditor.set_deadline,
            on_absorbed=lambda absorbed: None,
            draw=lambda: 0.0,
        )
        self.presence: Callable[[Row], tuple[Presence, End | None]] = lambda row: (
            Presence.FINISHED,
            End.INTERRUPTED,
        )
        self.hung = False
        self.published: Counter[JobId] = Counter()
        self.fresh = itertools.count(1_000_000)
        self.refusal: Exception | None = None
        self.wishes = Wishes(journal, self.engine, self.inbox, self.dispatcher, again=self.again)

    def again(self, row: Row) -> Claimed:
        if self.refusal is not None:
            raise self.refusal
        seq = next(self.fresh)
        return Claimed(row=Row(job=job_id(seq), seq=seq, retry_of=row.job, key=row.key))

    def perform(self, order: orders.Task) -> None:
        assert isinstance(order, orders.JobOrder)
        token = order.token
        match order:
            case orders.Submit() if not self.hung:
                self.inbox.put(facts.Accepted(token=token))
            case orders.Stop() | orders.Probe() if not self.hung:
                self.inbox.put(self.probed(token, order.row))
            case orders.Collect():
                self.inbox.put(facts.Collected(token=token, staged=Staged(manifest_sha256="0")))
            case orders.Publish():
                self.published[order.row.job] += 1
                self.inbox.put(facts.Published(token=token))
            case orders.Retire():
                self.inbox.put(facts.Retired(token=token))
            case _:
                pass  # a server that hangs

    def probed(self, token: Token, row: Row) -> facts.Probed:
        presence, end = self.presence(row)
        record = None if end is None else Record(end=end)
        return facts.Probed(token=token, presence=presence, record=record)

    def up(self, name: ServerName = A) -> None:
        self.inbox.put(facts.Health(server=name, ok=True))
        self.inbox.put(facts.Connected(server=name, client_id=f"c-{name}"))

    async def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        answer = await self.wishes.verbs()[verb](request)
        json.dumps(answer, allow_nan=False)
        return answer

    async def told(self, verb: str, *jobs: str, **more: Any) -> list[tuple[str, bool, str]]:
        results = (await self.ask(verb, jobs=list(jobs), **more))["results"]
        return [(each["job"], each["ok"], each["outcome"]) for each in results]

    def state(self, job: JobId) -> State:
        row = self.store.get(job)
        assert row is not None
        return row.state


def queued(count: int, stem: str = "fox", first: int = 1, **more: Any) -> list[Row]:
    return [Row(job=job_id(n, stem), seq=n, **more) for n in range(first, first + count)]


@asynccontextmanager
async def running(*rows: Row) -> AsyncIterator[Rig]:
    store = MemoryStore()
    async with Journal(lambda: store, inline=True) as journal, trio.open_nursery() as nursery:
        rig = Rig(journal, store, rows)
        nursery.start_soon(rig.dispatcher.run)
        nursery.start_soon(rig.auditor.run)
        await trio.sleep(0.01)
        yield rig
        nursery.cancel_scope.cancel()


J1, J2, J3 = map(job_id, (1, 2, 3))


# --- cancel --------------------------------------------------------------------------------------


async def test_a_queued_job_is_cancelled_and_published_as_such(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        assert await rig.told("cancel", J1) == [(J1, True, "cancelled")]
        assert rig.state(J1) is State.CANCELLED
        assert rig.published == {J1: 1}
        assert await rig.told("cancel", J1) == [(J1, True, "already")]


async def test_a_held_job_is_cancelled(autojump_clock: MockClock):
    async with running(*queued(1, state=State.HELD, held="Why not.")) as rig:
        assert await rig.told("cancel", J1) == [(J1, True, "cancelled")]
        assert rig.state(J1) is State.CANCELLED


async def test_a_job_beyond_what_is_in_memory_is_cancelled(autojump_clock: MockClock):
    async with running(*queued(LOOK_AHEAD + 100)) as rig:
        last = job_id(LOOK_AHEAD + 100)
        assert last not in rig.engine.jobs
        assert await rig.told("cancel", last) == [(last, True, "cancelled")]
        assert rig.state(last) is State.CANCELLED


async def test_a_prompt_is_gone_before_its_job_is_called_cancelled(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        looks: list[State] = []

        def interrupted_at_last(row: Row) -> tuple[Presence, End | None]:
            looks.append(rig.state(J1))
            if len(looks) < 4:
                return Presence.RUNNING, None
            return Presence.FINISHED, End.INTERRUPTED

        rig.presence = interrupted_at_last
        rig.up()
        await trio.sleep(0.1)
        assert rig.state(J1) is State.SUBMITTED
        began_s = trio.current_time()
        assert await rig.told("cancel", J1) == [(J1, True, "cancelled")]
        assert trio.current_time() - began_s > 2
        assert looks == [State.STOPPING] * 4  # the intent was committed before anything was done


async def test_a_deleted_prompt_is_absent_twice_before_its_job_is_cancelled(
    autojump_clock: MockClock,
):
    async with running(*queued(1)) as rig:
        rig.presence = lambda row: (Presence.ABSENT, None)
        rig.up()
        await trio.sleep(0.1)
        began_s = trio.current_time()
        assert await rig.told("cancel", J1) == [(J1, True, "cancelled")]
        assert trio.current_time() - began_s == pytest.approx(15, abs=0.5)  # lost_grace


async def test_a_success_that_came_first_stands(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        rig.presence = lambda row: (Presence.FINISHED, End.SUCCESS)
        rig.up()
        await trio.sleep(0.1)
        assert await rig.told("cancel", J1) == [(J1, False, "too_late")]
        await trio.sleep(0.1)
        assert rig.state(J1) is State.DONE
        assert await rig.told("cancel", J1) == [(J1, False, "already")]
        assert rig.published == {J1: 1}


async def test_what_takes_too_long_is_said_and_goes_on_by_itself(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        rig.up()
        await trio.sleep(0.1)
        rig.hung = True
        began_s = trio.current_time()
        results = (await rig.ask("cancel", jobs=[J1]))["results"]
        assert trio.current_time() - began_s == pytest.approx(wishes.CONFIRM_S, abs=0.1)
        assert results == [
            {
                "job": J1,
                "ok": False,
                "outcome": "stopping",
                "what": "still stopping; it goes on by itself",
                "state": "stopping",
            }
        ]
        (job,) = rig.engine.jobs.values()
        token = Token(J1, job.row.attempt, job.live.seq)
        rig.inbox.put(rig.probed(token, job.row))
        await trio.sleep(0.1)
        assert rig.state(J1) is State.CANCELLED


async def test_a_job_on_its_way_to_a_server_is_stopped_there(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        rig.hung = True
        rig.up()
        await trio.sleep(0.1)
        assert rig.state(J1) is State.SUBMITTING
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def answer() -> None:
                await trio.sleep(3)
                rig.hung = False
                rig.inbox.put(facts.Accepted(token=Token(J1, 1, rig.engine.jobs[J1].live.seq)))

            assert await rig.told("cancel", J1) == [(J1, True, "cancelled")]


async def test_many_at_once_each_with_its_own_truth(autojump_clock: MockClock):
    done = Row(
        job=job_id(900, "old"),
        seq=900,
        state=State.DONE,
        outcome=Outcome(state=State.DONE),
        staged=Staged(manifest_sha256="0"),
        retired=True,
    )
    async with running(*queued(JOBS_MAX - 2), done) as rig:
        rig.up()
        await trio.sleep(0.1)
        jobs = [job_id(n) for n in range(1, JOBS_MAX - 1)]
        told = await rig.told("cancel", *jobs, done.job, "wolf")
        assert told[-2:] == [(done.job, False, "already"), ("wolf", False, "unknown")]
        assert told[:-2] == [(job, True, "cancelled") for job in jobs]
        assert rig.engine.jobs == {}
        assert all(count == 1 for count in rig.published.values())
        assert len(rig.published) == len(jobs)


async def test_jobs_are_found_as_show_finds_them_and_each_is_told_once(autojump_clock: MockClock):
    async with running(*queued(2), *queued(1, "hare", 3)) as rig:
        told = await rig.told("hold", "hare", job_id(3, "hare"), "fox", J1[:-1] + "1")
        assert told == [
            (job_id(3, "hare"), True, "held"),
            ("fox", False, "unknown"),
            (J1, True, "held"),
        ]


async def test_what_was_chosen_for_its_state_is_left_alone_when_that_changed(
    autojump_clock: MockClock,
):
    async with running(*queued(3)) as rig:
        rig.up()
        await trio.sleep(0.1)
        told = await rig.told("cancel", J1, J2, J3, state="queued")
        assert told == [(J1, False, "too_late"), (J2, False, "too_late"), (J3, True, "cancelled")]
        assert rig.state(J1) is rig.state(J2) is State.SUBMITTED


@pytest.mark.parametrize("seed", range(20))
async def test_whenever_it_comes_what_is_told_is_how_it_ends(autojump_clock: MockClock, seed: int):
    """Jobs that are cancelled at any moment of their lives: the words fit the outcome."""
    chance = random.Random(seed)
    async with running(*queued(8)) as rig:
        rig.presence = lambda row: chance.choice(
            [
                (Presence.RUNNING, None),
                (Presence.UNKNOWN, None),
                (Presence.FINISHED, End.SUCCESS),
                (Presence.FINISHED, End.ERROR),
                (Presence.FINISHED, End.INTERRUPTED),
            ]
        )
        rig.up()
        rig.up(B)
        told: dict[str, tuple[bool, str]] = {}

        async def cancel(job: JobId) -> None:
            await trio.sleep(chance.random() * 0.01)
            ((_, ok, outcome),) = await rig.told("cancel", job)
            told[job] = ok, outcome

        async def finish() -> None:
            for _ in range(10):
                await trio.sleep(0.001)
                for job_id_ in list(rig.engine.jobs):
                    rig.inbox.put(facts.CheckAsked(job=job_id_))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            for n in range(1, 9):
                nursery.start_soon(cancel, job_id(n))
        await trio.sleep(200)
        for job, (ok, outcome) in told.items():
            end = rig.state(JobId(job))
            assert end in FINAL
            if outcome != "stopping":
                assert ok is (end is State.CANCELLED), (job, outcome, end)
        assert all(count == 1 for count in rig.published.values())


# --- hold and release ----------------------------------------------------------------------------


async def test_a_held_job_is_not_sent_and_a_released_one_is(autojump_clock: MockClock):
    async with running(*queued(2)) as rig:
        assert await rig.told("hold", J1) == [(J1, True, "held")]
        assert await rig.told("hold", J1) == [(J1, True, "already")]
        rig.up()
        await trio.sleep(1)
        assert rig.state(J1) is State.HELD
        assert rig.state(J2) is State.SUBMITTED
        assert await rig.told("hold", J2) == [(J2, False, "too_late")]
        assert await rig.told("release", J2) == [(J2, False, "already")]
        assert await rig.told("release", J1) == [(J1, True, "released")]
        await trio.sleep(1)
        assert rig.state(J1) is State.SUBMITTED


async def test_a_queue_longer_than_memory_is_held_and_released(autojump_clock: MockClock):
    count = 2 * LOOK_AHEAD
    async with running(*queued(count)) as rig:
        for verb in ("hold", "release", "hold"):
            after, told = None, []
            while True:
                page = await rig.ask("select", **{"for": verb, "after": after})
                for at in range(0, len(page["jobs"]), 100):
                    told += await rig.told(verb, *page["jobs"][at : at + 100])
                after = page["after"]
                if after is None:
                    break
            assert len(told) == count
            assert all(ok for _, ok, _ in told)
            assert len(rig.engine.jobs) <= LOOK_AHEAD + 100
            fresh = rig.engine._ahead._shelves[Shelf.FRESH]
            assert len(fresh.heap) <= 3 * LOOK_AHEAD  # entries that are outdated, too
        assert rig.store.counts()[State.HELD] == count
        assert rig.engine.counts[State.HELD] == count


# --- retry ---------------------------------------------------------------------------------------


def ended(seq: int, state: State = State.FAILED, **more: Any) -> Row:
    outcome = Outcome(state=state)
    staged = Staged(manifest_sha256="0")
    return Row(
        job=job_id(seq), seq=seq, state=state, outcome=outcome, staged=staged, retired=True, **more
    )


async def test_a_retry_is_a_new_job_and_takes_the_key_over(autojump_clock: MockClock):
    async with running(ended(1, key="k"), ended(2, State.DONE), *queued(1, first=3)) as rig:
        results = (await rig.ask("retry", jobs=[J1, J2, J3, "wolf"]))["results"]
        assert [each["outcome"] for each in results] == ["retried", "retried", "refused", "unknown"]
        new = rig.store.get(JobId(results[0]["new"]))
        assert new is not None
        assert (new.retry_of, new.key, new.state) == (J1, "k", State.QUEUED)
        assert rig.store.keyed("k") == new
        assert [event.data for event in rig.store.events(J1)] == [{"new": new.job}]
        assert rig.state(J1) is State.FAILED
        # As long as that one lives, its key makes no third.
        (again,) = (await rig.ask("retry", jobs=[J1]))["results"]
        assert (again["ok"], again["outcome"]) == (False, "refused")
        assert new.job in again["what"]


@pytest.mark.parametrize(
    "refusal", [JobFileError("its folder was taken away"), DiskFull("no space")]
)
async def test_a_retry_that_cannot_be_says_why(autojump_clock: MockClock, refusal: Exception):
    async with running(ended(1)) as rig:
        rig.refusal = refusal
        (told,) = (await rig.ask("retry", jobs=[J1]))["results"]
        assert (told["ok"], told["outcome"]) == (False, "refused")
        assert told["what"] == f"not retried: {refusal}"
        assert list(rig.store.rows_by_job) == [J1]


async def test_a_retry_that_could_not_be_written_down_yet_is_no_success(autojump_clock: MockClock):
    async with running(ended(1)) as rig:
        commit = rig.store.commit

        def full(batch: Batch) -> tuple[bool, ...]:
            raise DiskFull("no space left")

        rig.store.commit = full  # type: ignore[method-assign]
        (told,) = (await rig.ask("retry", jobs=[J1]))["results"]
        assert (told["ok"], told["outcome"]) == (False, "waiting")
        rig.store.commit = commit  # type: ignore[method-assign]
        await trio.sleep(10)
        assert rig.state(JobId(told["new"])) is State.QUEUED


async def test_one_key_is_never_that_of_two_live_jobs(autojump_clock: MockClock):
    rows = [ended(n, key="k") for n in (1, 2, 3)]
    async with running(*rows) as rig:
        replies: list[dict[str, Any]] = []

        async def retry(*jobs: JobId) -> None:
            replies.extend((await rig.ask("retry", jobs=list(jobs)))["results"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(retry, J1, J2)
            nursery.start_soon(retry, J3)
        assert sorted(each["outcome"] for each in replies) == ["refused", "refused", "retried"]
        assert rig.store.counts()[State.QUEUED] == 1


async def test_retrying_all_twice_makes_no_second_job_of_any(autojump_clock: MockClock):
    async with running(*(ended(n) for n in range(1, 6))) as rig:
        first = await chosen(rig, **{"for": "retry", "state": "failed"})
        assert len(first) == 5
        assert all(ok for _, ok, _ in await rig.told("retry", *first, state="failed"))
        assert await chosen(rig, **{"for": "retry", "state": "failed"}) == []
        assert await rig.told("retry", J1) == [(J1, True, "retried")]  # by its name, yes


async def test_what_could_not_be_written_down_is_not_told_as_done(autojump_clock: MockClock):
    async with running(*queued(1)) as rig:
        commit = rig.store.commit

        def full(batch: Batch) -> tuple[bool, ...]:
            raise DiskFull("no space left")

        rig.store.commit = full  # type: ignore[method-assign]
        assert await rig.told("hold", J1) == [(J1, False, "waiting")]
        for verb, more in (("pause", {}), ("resume", {}), ("drain", {"server": "a"})):
            result = (await rig.ask(verb, **more))["result"]
            assert not result["ok"], verb
            assert "could not write it down" in result["what"]
        rig.store.commit = commit  # type: ignore[method-assign]
        await trio.sleep(10)
        assert rig.state(J1) is State.HELD


# --- choosing ------------------------------------------------------------------------------------


async def chosen(rig: Rig, **request: Any) -> list[str]:
    found: list[str] = []
    after = None
    while True:
        page = await rig.ask("select", **request, after=after)
        assert len(page["jobs"]) <= PAGE
        found += page["jobs"]
        after = page["after"]
        if after is None:
            return found


async def test_jobs_are_chosen_by_state_and_by_name_page_by_page(autojump_clock: MockClock):
    rows = [*queued(PAGE), *queued(PAGE, "hare", PAGE + 1), ended(5000), ended(5001, State.DONE)]
    async with running(*rows) as rig:
        hares = [job_id(n, "hare") for n in range(2 * PAGE, PAGE, -1)]
        assert await chosen(rig, **{"for": "cancel", "match": "hare*"}) == hares
        assert len(await chosen(rig, **{"for": "cancel", "state": "queued"})) == 2 * PAGE
        assert await chosen(rig, **{"for": "cancel", "match": "*0000001"}) == [J1]
        assert await chosen(rig, **{"for": "cancel", "match": "HARE*"}) == []
        assert await chosen(rig, **{"for": "release", "match": "*"}) == []
        assert await chosen(rig, **{"for": "retry", "match": "*"}) == [job_id(5000)]
        assert await chosen(rig, **{"for": "retry", "state": "done"}) == [job_id(5001)]
        assert await chosen(rig, **{"for": "hold", "match": "[z-a]["}) == []


async def test_running_and_submitted_are_told_apart(autojump_clock: MockClock):
    async with running(*queued(2)) as rig:
        rig.up()
        await trio.sleep(0.1)
        prompt_id = rig.engine.jobs[J1].row.prompt_id
        assert prompt_id is not None
        rig.inbox.hint(facts.Hint(server=A, prompt_id=prompt_id, sign=facts.Sign.ALIVE))
        await trio.sleep(2)
        assert await chosen(rig, **{"for": "cancel", "state": "running"}) == [J1]
        assert await chosen(rig, **{"for": "cancel", "state": "submitted"}) == [J2]


# --- intake and servers --------------------------------------------------------------------------


async def test_the_intake_is_paused_and_resumed(autojump_clock: MockClock):
    async with running() as rig:
        result = (await rig.ask("pause"))["result"]
        assert (result["ok"], result["paused"]) == (True, True)
        assert rig.engine.paused
        assert "already" in (await rig.ask("pause"))["result"]["what"]
        result = (await rig.ask("resume"))["result"]
        assert (result["ok"], result["paused"]) == (True, False)
        assert not rig.engine.paused


async def test_a_drained_server_finishes_what_it_has_and_gets_nothing_more(
    autojump_clock: MockClock,
):
    async with running(*queued(6)) as rig:
        rig.presence = lambda row: (Presence.FINISHED, End.SUCCESS)
        rig.up()
        await trio.sleep(0.1)
        result = (await rig.ask("drain", server="a"))["result"]
        assert (result["ok"], result["in_flight"]) == (True, 2)
        for job in list(rig.engine.jobs):
            rig.inbox.put(facts.CheckAsked(job=job))
        await trio.sleep(60)
        assert rig.store.counts()[State.DONE] == 2
        assert rig.store.counts()[State.QUEUED] == 4
        assert "nothing of ours is left" in (await rig.ask("drain", server="a"))["result"]["what"]
        assert (await rig.ask("resume", server="a"))["result"]["ok"]
        await trio.sleep(1)
        assert rig.store.counts()[State.SUBMITTED] == 2


async def test_what_a_forgotten_server_had_goes_on_elsewhere(autojump_clock: MockClock):
    async with running(*queued(2)) as rig:
        rig.up()
        await trio.sleep(0.1)
        refused = (await rig.ask("forget", server="a"))["result"]
        assert not refused["ok"]
        assert "drain it instead" in refused["what"]
        assert rig.store.counts()[State.SUBMITTED] == 2
        rig.hung = True
        rig.inbox.put(facts.Health(server=A, ok=False))
        await trio.sleep(0.1)
        result = (await rig.ask("forget", server="a"))["result"]
        assert (result["ok"], result["in_flight"]) == (True, 0)
        for job in (J1, J2):
            row = rig.store.get(job)
            assert row is not None
            assert row.state is State.QUEUED
            assert [server for server, _, _ in row.abandoned] == ["a"]
        rig.hung = False
        rig.up(B)
        await trio.sleep(1)
        assert rig.store.counts()[State.SUBMITTED] == 2
        assert not (await rig.ask("forget", server="b"))["result"]["ok"]


@pytest.mark.parametrize("verb", ["drain", "forget", "resume"])
async def test_an_unknown_server_is_told_the_known_ones(autojump_clock: MockClock, verb: str):
    async with running() as rig:
        with pytest.raises(UsageError, match="there are: a, b"):
            await rig.ask(verb, server="c")


# --- hostile requests ----------------------------------------------------------------------------


BAD: list[dict[str, Any]] = [
    {"verb": "cancel"},
    {"verb": "cancel", "jobs": None},
    {"verb": "cancel", "jobs": "fox"},
    {"verb": "cancel", "jobs": {}},
    {"verb": "cancel", "jobs": []},
    {"verb": "cancel", "jobs": [""]},
    {"verb": "cancel", "jobs": [1, None, ["x"]]},
    {"verb": "cancel", "jobs": ["x"] * 10_000},
    {"verb": "cancel", "jobs": ["x"], "state": "lost"},
    {"verb": "cancel", "jobs": ["x"], "state": ["queued"]},
    {"verb": "cancel", "jobs": ["x"], "state": {}},
    {"verb": "retry", "jobs": [{}]},
    {"verb": "select"},
    {"verb": "select", "for": "pause"},
    {"verb": "select", "for": ["cancel"]},
    {"verb": "select", "for": "cancel", "match": ""},
    {"verb": "select", "for": "cancel", "match": "*" * 10_000},
    {"verb": "select", "for": "cancel", "match": 5},
    {"verb": "select", "for": "cancel", "after": "x"},
    {"verb": "select", "for": "cancel", "after": 1.5},
    {"verb": "select", "for": "cancel", "after": -1},
    {"verb": "select", "for": "cancel", "after": 10**30},
    {"verb": "drain"},
    {"verb": "drain", "server": None},
    {"verb": "drain", "server": ["a"]},
    {"verb": "drain", "server": "x" * 100_000},
    {"verb": "resume", "server": 0},
    {"verb": "forget", "server": ""},
    {"verb": "interrupt"},
]


async def test_whatever_is_written_to_the_socket_is_refused_in_one_sentence(tmp_path: Path):
    path = tmp_path / "control.sock"
    async with running(*queued(3)) as rig, trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, path, rig.wishes.verbs())
        for request in BAD:
            answer = await trio.to_thread.run_sync(ask, path, request, 5.0)
            assert answer["ok"] is False, request
            assert answer["kind"] == "UsageError", request
            assert "\n" not in answer["error"]
            assert len(answer["error"]) < 400
        odd = ["\x00", "'; DROP TABLE jobs; --", "ü" * 10_000, "%", "*", "..", "/etc/passwd"]
        answer = await trio.to_thread.run_sync(ask, path, {"verb": "cancel", "jobs": odd}, 5.0)
        assert [each["outcome"] for each in answer["results"]] == ["unknown"] * len(odd)
        assert rig.store.counts()[State.QUEUED] == 3
        nursery.cancel_scope.cancel()


async def test_the_biggest_request_that_is_allowed_is_answered(tmp_path: Path):
    path = tmp_path / "control.sock"
    async with running(*queued(1)) as rig, trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, path, rig.wishes.verbs())
        texts = [f"{n:03d}" + "x" * 2000 for n in range(JOBS_MAX)]
        request = {"verb": "cancel", "jobs": texts}
        answer = await trio.to_thread.run_sync(ask, path, request, 20.0)
        assert answer["ok"]
        assert [each["job"] for each in answer["results"]] == texts
        nursery.cancel_scope.cancel()
