"""The workshop: carries out orders, one task each, and leaves the answers in the inbox."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import structlog
import trio

from comfyd.core import orders
from comfyd.core.facts import (
    Answer,
    CollectFailed,
    Fenced,
    Fetched,
    FetchResult,
    NotSent,
    Presence,
    Probed,
    PublishDelayed,
    Retired,
    Uncollected,
)
from comfyd.core.keys import Absorbed
from comfyd.core.model import JobId, Row
from comfyd.errors import DiskFull, ServerError
from comfyd.metrics import Metrics, reason_of
from comfyd.services import fetcher, submitter
from comfyd.services.clock import Clock
from comfyd.services.inbox import Inbox
from comfyd.services.link import Link
from comfyd.services.links import Links
from comfyd.services.settings import Settings
from comfyd.services.space import Space
from comfyd.services.unit import restart_unit
from comfyd.spool.delivery import retire
from comfyd.spool.layout import Spool

# Results put together at once: downloads overlap, and the disk is not asked for more.
COLLECTS: Final = 8
FETCHES: Final = 8
RETIRE_AGAIN_S: Final = 10.0

_log: Any = structlog.get_logger("comfyd.workshop")


class OrderFailed(Exception):
    """A bug while carrying out an order: the job was at hand when the daemon went down."""

    def __init__(self, job: JobId) -> None:
        super().__init__(f"while carrying out an order for job {job}")
        self.job = job


class Workshop:
    """Carries out orders: one task each, bounded by the jobs at hand, limited by kind.

    Args:
      nursery: Its tasks end with it; what they were doing is then as the journal says.

    """

    def __init__(
        self,
        nursery: trio.Nursery,
        links: Links,
        spool: Spool,
        settings: Settings,
        inbox: Inbox,
        metrics: Metrics,
        clock: Clock,
        space: Space,
    ) -> None:
        self._nursery = nursery
        self._links = links
        self._spool = spool
        self._settings = settings
        self._inbox, self._metrics, self._clock = inbox, metrics, clock
        self._space = space
        self._short: dict[JobId, int] = {}
        self._at_work = 0
        self._idle = trio.Event()
        self._fetches = trio.CapacityLimiter(FETCHES)
        self._collects = trio.CapacityLimiter(COLLECTS)

    def perform(self, order: orders.Task) -> None:
        """Start on *order*; its answer goes to the inbox."""
        match order:
            case orders.Enlist():
                self._links.start(order.server, order.origin)
                return
            case orders.Dismiss():
                self._links.retire(order.server, order.origin)
                return
            case orders.Restart():
                self._nursery.start_soon(self._restart, order)
                return
            case orders.Fence(fence=fence):
                link = self._links.of(fence.server, fence.origin)
                if link is None:  # a reload took the server away, which the engine learns next
                    reason = f"server {fence.server} is not configured"
                    unknown = Presence.UNKNOWN
                    self._inbox.put(
                        Fenced(prompt_id=fence.prompt_id, presence=unknown, reason=reason)
                    )
                else:
                    link.prober.ask(order)
                return
            case _:
                pass
        # A name whose URL changed is another server.
        row = order.row
        link = self._links.of(row.server, row.origin) if row.server and row.origin else None
        if isinstance(order, orders.Probe | orders.Stop) and link is not None:
            link.prober.ask(order)
            return
        if link is not None:
            link.users.join()
        self._at_work += 1
        self._nursery.start_soon(self._carry_out, order, link)

    async def idle(self) -> None:
        """Until nothing is being submitted, fetched, collected or published."""
        while self._at_work:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _restart(self, order: orders.Restart) -> None:
        units = {server.name: server.restart_unit for server in self._settings.now.servers}
        unit = units.get(order.server)
        if unit is None:
            return  # a reload has taken it away in the meantime
        result = await restart_unit(order.server, unit, order.why)
        self._metrics.server_restart(order.server, result)

    def absorb(self, absorbed: Absorbed) -> None:
        """Start on clearing away a drop that is another job: no row of its own will do that."""
        self._metrics.spool_rejected("duplicate")
        _log.info("absorbed", job=absorbed.row.job, into=absorbed.into)
        self._nursery.start_soon(self._clear, absorbed.row)

    async def _clear(self, row: Row) -> None:
        """Remove a claimed file, or say what is left of it."""
        while True:  # what it led to is delivered; only a disk that takes nothing keeps it there
            try:
                left = await trio.to_thread.run_sync(retire, self._spool, row)
                break
            except DiskFull:
                self._space.refused()
                await trio.sleep(RETIRE_AGAIN_S)
        if left:
            _log.warning("left_in_claimed", problem=left)

    async def _carry_out(self, order: orders.JobOrder, link: Link | None) -> None:
        try:
            answer = await self._answer(order, link)
        except Exception as error:
            raise OrderFailed(order.row.job) from error
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._idle.set()
            if link is not None:
                link.users.leave()
        match answer:
            case CollectFailed(cause=Uncollected.DISK) | PublishDelayed():
                self._space.refused()
            case _:
                pass
        self._inbox.put(answer)

    async def _answer(self, order: orders.JobOrder, link: Link | None) -> Answer:
        match order:
            case orders.Collect():
                async with self._collects:
                    return await fetcher.collect(
                        order,
                        link.client if link else None,
                        self._spool,
                        self._limits(),
                        now_s=self._clock.now_s,
                        on_retry=partial(self._retried, "download"),
                        short=self._short,
                        waiting=lambda: self._space.waiting,
                    )
            case orders.Publish():
                return await trio.to_thread.run_sync(fetcher.show, order, self._spool)
            case orders.Retire():
                await self._clear(order.row)
                return Retired(token=order.token)
            case _ if link is None:
                return _no_such_server(order)
            case orders.Submit():
                async with link.submits:
                    return await submitter.submit(
                        order,
                        link.client,
                        self._spool,
                        unique_prefix=self._settings.now.outputs.unique_prefix,
                        on_posted=link.tracker.posted,
                        on_graph=link.progress.sent,
                    )
            case orders.Fetch():
                async with self._fetches:
                    return await fetcher.fetch(
                        order,
                        link.client,
                        self._limits(),
                        on_fetch=self._metrics.history_fetch,
                        on_retry=partial(self._retried, "history"),
                    )
            case _:
                raise AssertionError(f"nobody carries out {order}")

    def _limits(self) -> fetcher.Limits:
        config = self._settings.now
        return fetcher.Limits(
            history_attempts=config.history.attempts,
            history_backoff_s=config.history.backoff_s,
            max_bytes=config.outputs.max_bytes,
            min_free_bytes=config.outputs.min_free_bytes,
            include_temp=config.outputs.include_temp,
        )

    def _retried(self, operation: str, error: ServerError) -> None:
        self._metrics.retry(operation, reason_of(error))


def _no_such_server(order: orders.JobOrder) -> Answer:
    """What is known of a prompt on a server that is no longer configured: nothing."""
    reason = f"server {order.row.server} is not configured"
    match order:
        case orders.Submit():
            return NotSent(token=order.token, reason="unreachable")
        case orders.Fetch():
            return Fetched(token=order.token, result=FetchResult.ERROR, reason=reason)
        case _:
            return Probed(token=order.token, presence=Presence.UNKNOWN, reason=reason)
