"""The composition root: builds every part, opens the nursery, and is the only place that does.

Read `run` top to bottom to see what the daemon is made of, in which order it comes up and goes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import msgspec
import structlog
import trio
from prometheus_client import CollectorRegistry

from comfyd import __version__, sdnotify
from comfyd.config import Config
from comfyd.core.engine import Engine
from comfyd.core.facts import SpaceSeen, Tick
from comfyd.core.model import JobId, State
from comfyd.core.retention import FORGOTTEN
from comfyd.core.snapshot import Snapshot
from comfyd.errors import ConfigError, DiskFull, SpoolBusy
from comfyd.journal.file import prepare_state
from comfyd.journal.lock import StateLock
from comfyd.journal.quarantine import open_or_begin_anew
from comfyd.journal.store import Batch, Update
from comfyd.journal.thread import Journal
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.dispatcher import FULL_DISK_RETRY_S, Auditor, Dispatcher
from comfyd.services.inbox import Inbox
from comfyd.services.link import Link
from comfyd.services.links import Links
from comfyd.services.overview import Overview, Watched, count_files
from comfyd.services.rebuild import rebuild
from comfyd.services.reload import Reload
from comfyd.services.retention import Retention
from comfyd.services.settings import Settings, bounds_of, policy_of, servers_of, stories_of
from comfyd.services.space import Space, disks
from comfyd.services.teller import Teller
from comfyd.services.watchdog import Watchdog
from comfyd.services.workshop import OrderFailed, Workshop
from comfyd.spool import delivery
from comfyd.spool.again import claim_again
from comfyd.spool.intake import Intake
from comfyd.spool.layout import Spool, full_disk_told, job_of
from comfyd.spool.watcher import watch
from comfyd.web import control, serve, site
from comfyd.web.api import Reads
from comfyd.web.desk import Desk
from comfyd.web.door import Door
from comfyd.web.exporter import Readiness
from comfyd.web.serve import Tls
from comfyd.web.upkeep import Upkeep, clear
from comfyd.web.wishes import Wishes

# Files stay in new/ while so many jobs are at hand besides the queue: memory stays bounded.
ACTIVE_MAX: Final = 1024
ADOPT: Final = 256  # files in claimed/ looked up at once
LOCK_PATIENCE_S: Final = 3.0  # a reader holds the lock for a moment
# At the end, together less than 5 s. What is not sent or fetched by then is left to the journal.
FINISH_S: Final = 2.0  # for what is being sent or fetched
FAREWELL_S: Final = 1.0  # for connections to close, and again for the last commit
CONFESSION_S: Final = 4.0  # for whose order it was that brought the daemon down
REFRESH_S: Final = 10.0
STATUS_S: Final = 2.0
START_AGAIN_S: Final = 5.0

T = TypeVar("T")
Reread = Callable[[], tuple[Config | None, list[ConfigError]]]

_log: Any = structlog.get_logger("comfyd")


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon, for those who started it in their own process.

    Attributes:
      stop: Ends `run` in an orderly way, as SIGTERM does.
      stopped: Set once it is ending, whoever asked for it.

    """

    http_url: str
    snapshot: Callable[[], Awaitable[Snapshot]]
    stop: Callable[[], None]
    stopped: trio.Event


def nothing_to_read() -> tuple[Config | None, list[ConfigError]]:
    """What a reload finds where the daemon was started without a file."""
    problem = "there is no configuration file to read again; start the daemon with one"
    return None, [ConfigError("", problem)]


def _told_to_nobody(config: Config) -> None:
    """Nobody else keeps anything of it."""


@contextlib.asynccontextmanager
async def _locked(config: Config) -> AsyncIterator[None]:
    """Own the state folder and the spool, or raise SpoolBusy, or ConfigError if that cannot be."""
    with contextlib.ExitStack() as stack:
        for key, path in (("state", config.state / "lock"), ("spool", config.spool / ".lock")):
            patience = trio.current_time() + LOCK_PATIENCE_S
            while True:
                try:
                    lock = await _when_there_is_space(partial(_taken, key, path))
                    stack.enter_context(lock)
                    break
                except SpoolBusy:
                    if trio.current_time() > patience:
                        raise
                    await trio.sleep(0.1)
        yield


async def _taken(key: str, path: Path) -> StateLock:
    """Args: key: the setting that names the folder of the lock at *path*."""
    try:
        with full_disk_told():
            return StateLock(path).acquire()
    except OSError as error:
        problem = f"{path} cannot be locked: {error.strerror}; make it a file of the daemon's own"
        raise ConfigError(key, problem) from error


async def _when_there_is_space(work: Callable[[], Awaitable[T]]) -> T:
    """*work*, again and again while the disk is too full for it."""
    told = False
    while True:
        try:
            return await work()
        except DiskFull as error:
            if not told:
                _log.warning("waiting_for_space", problem=str(error))
            told = True
            patience_us = f"{10 * START_AGAIN_S * 1e6:.0f}"
            sdnotify.notify(STATUS=f"Waiting for space: {error}", EXTEND_TIMEOUT_USEC=patience_us)
        await trio.sleep(START_AGAIN_S)


async def run(
    config: Config,
    *,
    signals: bool = False,
    reread: Reread = nothing_to_read,
    on_reload: Callable[[Config], None] = _told_to_nobody,
    task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The whole daemon, until it is cancelled or, with *signals*, until SIGTERM or SIGINT.

    Args:
      signals: Whether it is the process's business: SIGHUP reloads, SIGTERM and SIGINT end it.
      reread: Reads the configuration again, for a reload; blocking.
      on_reload: Told of each new configuration that holds.

    Raises:
      ConfigError: A folder or an address cannot be used.
      SpoolBusy: Another daemon owns the spool or the state folder.
      ComfydError, or a group with a bug in it: fail-stop; a restart carries on from the journal.

    """
    with _hangups() if signals else contextlib.nullcontext() as hangups:
        await _started(config, hangups, reread, on_reload, task_status)


async def _started(
    config: Config,
    hangups: AsyncIterator[int] | None,
    reread: Reread,
    on_reload: Callable[[Config], None],
    task_status: trio.TaskStatus[Daemon],
) -> None:
    """From the locks to the end of the journal."""
    spool = Spool(config.spool)
    prepared = partial(prepare_state, config.state)
    await _when_there_is_space(partial(trio.to_thread.run_sync, prepared))
    await _when_there_is_space(partial(trio.to_thread.run_sync, spool.prepare))
    clock = Clock()
    metrics = Metrics(CollectorRegistry(), version=__version__)
    metrics.prepare([server.name for server in config.servers])
    metrics.config_read(ok=True, at=clock.now_s())
    async with _locked(config), contextlib.AsyncExitStack() as stack:
        open_store = partial(open_or_begin_anew, config.state / "comfyd.db")
        unopened = Journal(open_store, on_commit=metrics.journal_commit)
        journal = await _when_there_is_space(partial(stack.enter_async_context, unopened))
        await trio.to_thread.run_sync(clear, config.state)
        await _when_there_is_space(partial(rebuild, config, spool, clock, journal))
        try:
            await _run(
                config, spool, clock, metrics, journal, hangups, reread, on_reload, task_status
            )
        except* OrderFailed as group:
            await _record_crash(journal, _jobs_at_hand(group))
            raise


async def _run(
    config: Config,
    spool: Spool,
    clock: Clock,
    metrics: Metrics,
    journal: Journal,
    hangups: AsyncIterator[int] | None,
    reread: Reread,
    on_reload: Callable[[Config], None],
    task_status: trio.TaskStatus[Daemon],
) -> None:
    """From an open journal to the end of the nursery."""
    settings = Settings(config)
    engine = Engine(servers_of(config), policy_of(config), await journal.counts())
    inbox = Inbox(engine.knows)
    auditor = Auditor(inbox, clock)
    active = await journal.active()
    crashed = not journal.opened_cleanly()
    if crashed and active:
        _log.warning("recovering", jobs=len(active))
    reap = partial(delivery.reap, spool, {row.job for row in active})
    problems = await _when_there_is_space(partial(trio.to_thread.run_sync, reap))
    for problem in problems[:10]:
        _log.warning("not_removed", problem=problem)
    remembered = await journal.remembered()
    engine.load(
        active,
        crashed=crashed,
        now_s=clock.now_s(),
        u=random.random(),
        fences=await journal.fences(),
        settings=remembered,
    )

    asked = trio.Event()  # to stop
    space = Space(disks(config.spool, config.state, config.outputs.min_free_bytes), inbox.put)
    await space.look()
    stopped = trio.Event()
    async with contextlib.AsyncExitStack() as afterwards, trio.open_nursery() as nursery:
        links = Links(nursery, config, inbox, metrics, clock)
        afterwards.push_async_callback(links.aclose)
        if hangups is not None:
            await nursery.start(_stop_on_signal, asked)
        overview = Overview(
            engine,
            journal,
            spool,
            clock,
            version=__version__,
            watched=lambda name, origin: _watched(links.of(name, origin), origin),
            waiting=lambda: (
                "Waiting for space to write the journal; make room, or raise the quota."
                if dispatcher.waits_for_space
                else space.waiting
            ),
            min_free_bytes=lambda: space.min_free_bytes,
        )
        await overview.recall()
        teller = Teller(metrics, overview)
        workshop = Workshop(nursery, links, spool, settings, inbox, metrics, clock, space)
        dispatcher = Dispatcher(
            engine,
            inbox,
            journal,
            clock,
            perform=workshop.perform,
            observe=teller.tell,
            on_deadline=auditor.set_deadline,
            on_refused=space.refused,
            on_absorbed=workshop.absorb,
        )
        keeper = Retention(
            journal,
            spool,
            clock,
            bounds=lambda: bounds_of(settings.now),
            events=lambda: stories_of(settings.now),
            forgotten_until=float(remembered.get(FORGOTTEN, 0.0)),
            tell=inbox.put,
            on_removed=metrics.results_removed,
        )
        intake = Intake(
            spool,
            **_limits(config),
            next_seq=count(await journal.last_seq() + 1).__next__,
            now_s=clock.now_s,
            known=lambda job: (
                keeper.is_forgotten(job) or trio.from_thread.run(journal.get, job) is not None
            ),
        )
        desk = Desk(journal, engine, inbox, dispatcher, overview)
        wishes = Wishes(
            journal,
            engine,
            inbox,
            dispatcher,
            again=lambda row: claim_again(
                intake,
                row,
                max_file_bytes=settings.now.jobs.max_file_bytes,
                now_s=clock.now_s,
            ),
        )

        def hand_over(new: Config) -> None:
            """Everything that keeps values of its own, and is not asked by name."""
            intake.limit(**_limits(new))
            space.disks = disks(new.spool, new.state, new.outputs.min_free_bytes)
            protect(new)
            on_reload(new)

        reload = Reload(
            settings,
            links,
            inbox,
            dispatcher,
            metrics,
            clock,
            reread=reread,
            hand_over=hand_over,
        )
        watched = trio.Event()
        tls, door = Tls(), Door({})

        def protect(new: Config) -> None:
            was, now = settings.now.metrics.web_config, new.metrics.web_config
            if was != now or new is settings.now:
                door.let_in(now.users if now is not None else {})
                tls.change(now.context if now is not None else None)
                if now is not None and now.users and now.tls is None:
                    _log.warning("passwords_in_clear_text", file=str(now.path))

        protect(config)
        listen = config.metrics.listen
        pages = site.build(
            metrics,
            Reads(
                snapshot=overview.snapshot, rows=desk.rows, latest=desk.latest, story=desk.exactly
            ),
            lambda: Readiness(
                journal_open=True, spool_watched=watched.is_set(), listener_bound=True
            ),
            door=door,
            headers=lambda: web.headers if (web := settings.now.metrics.web_config) else {},
        )
        host, port = await nursery.start(
            partial(serve.serve, pages, listen.host, listen.port, stop=trio.Event(), tls=tls)
        )
        # Listed before the watcher starts, and before anybody can ask for a retry: what those claim
        # gets its row from there.
        left = await trio.to_thread.run_sync(lambda: sorted(os.listdir(spool.claimed)))
        upkeep = Upkeep(journal, keeper, config.state)
        verbs = {**desk.verbs(), **wishes.verbs(), **upkeep.verbs(), "reload": reload.verb}
        await nursery.start(control.serve_control, config.state / "control.sock", verbs)
        for link in list(links):
            links.start(link.name, link.origin)
        nursery.start_soon(space.run)
        nursery.start_soon(auditor.run)
        nursery.start_soon(dispatcher.run)
        nursery.start_soon(_adopt, left, journal, intake, inbox)
        nursery.start_soon(keeper.run)
        await nursery.start(
            partial(
                watch,
                intake,
                rescan_s=lambda: settings.now.watch.rescan_s,
                send=inbox.claim,
                paused=lambda: (
                    asked.is_set()
                    or engine.paused
                    or engine.active > ACTIVE_MAX
                    or dispatcher.waits_for_space
                    or bool(space.waiting)
                ),
                on_refused=space.refused,
                on_pickup=metrics.spool_pickup,
                on_unmovable=partial(metrics.spool_rejected, "unmovable"),
            )
        )
        watched.set()
        nursery.start_soon(_refresh, spool, metrics)
        nursery.start_soon(_tell_systemd, overview, asked)
        nursery.start_soon(_finish, asked, inbox, dispatcher, workshop, nursery.cancel_scope)
        scheme = "http" if tls.context is None else "https"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        _log.info("ready", http=url, spool=str(config.spool), servers=len(links))
        sdnotify.notify(READY="1", STATUS=overview.status_line())
        if hangups is not None:
            nursery.start_soon(_reload_on_signal, hangups, reload)
        if (watched_s := sdnotify.watchdog_s()) is not None:
            watchdog = _watchdog(watched_s / 2, inbox, dispatcher, journal, lambda: list(links))
            nursery.start_soon(watchdog.run)
        task_status.started(Daemon(url, overview.snapshot, asked.set, stopped))
    stopped.set()
    with trio.move_on_after(FAREWELL_S, shield=True):
        await dispatcher.flush()
    _log.info("stopped")


@contextlib.contextmanager
def _hangups() -> Iterator[AsyncIterator[int]]:
    """SIGHUP, from now on; those that come before anybody asks are not lost, and none ends us."""
    with trio.open_signal_receiver(signal.SIGHUP) as received:
        yield received


async def _reload_on_signal(hangups: AsyncIterator[int], reload: Reload) -> None:
    """Read the configuration again at each SIGHUP."""
    async for _ in hangups:
        await reload.reload()


async def _stop_on_signal(
    asked: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Set *asked* on the first SIGTERM or SIGINT; a second one kills as usual."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            _log.info("stopping", signal=signal.Signals(number).name)
            break
    asked.set()


async def _finish(
    asked: trio.Event,
    inbox: Inbox,
    dispatcher: Dispatcher,
    workshop: Workshop,
    scope: trio.CancelScope,
) -> None:
    """Once *asked*: begin nothing more, let what is at work end soon, and cancel *scope*."""
    await asked.wait()
    sdnotify.notify(STOPPING="1", STATUS="Stopping")
    # As on a full disk: nothing is sent or downloaded from now on. An order that were cut off would
    # be as good as any to the journal, but a prompt half sent is looked for, for a while.
    inbox.put(SpaceSeen(enough=False))
    with trio.move_on_after(FINISH_S):
        await dispatcher.turned()
        await workshop.idle()
        await dispatcher.settled(inbox.leave(Tick()))  # what was answered is written down
    scope.cancel()


def _watchdog(
    interval_s: float,
    inbox: Inbox,
    dispatcher: Dispatcher,
    journal: Journal,
    links: Callable[[], Iterable[Link]],
) -> Watchdog:
    async def dispatched() -> None:
        if not dispatcher.waits_for_space:  # or it comes round by itself, and takes no mail
            inbox.put(Tick())
        await dispatcher.turned()

    return Watchdog(
        interval_s,
        tokens={"dispatcher": dispatched, "journal": journal.turn},
        late=lambda: [f"tracker of {link.name}" for link in links() if not link.tracker.on_time()],
        alive=partial(sdnotify.notify, WATCHDOG="1"),
    )


async def _adopt(names: list[str], journal: Journal, intake: Intake, inbox: Inbox) -> None:
    """Once, after the start: make rows for claimed files that a crash left without one."""
    for at in range(0, len(names), ADOPT):
        batch = {job_of(name): name for name in names[at : at + ADOPT]}
        missing = await journal.without_rows(batch)
        left = [name for job, name in batch.items() if job in missing]
        while True:
            try:
                taken = await trio.to_thread.run_sync(intake.adopt, left)
                break
            except DiskFull:  # for the workflow that one of them names
                await trio.sleep(FULL_DISK_RETRY_S)
        for sentence in taken.unmovable:
            _log.warning("left_in_claimed", problem=sentence)
        if taken.claims:
            _log.info("adopted", jobs=len(taken.claims))
            await inbox.claim(taken.claims)


async def _refresh(spool: Spool, metrics: Metrics) -> NoReturn:
    """Keep what nobody tells us of: how full the folders are."""
    while True:
        for folder, files in (await trio.to_thread.run_sync(count_files, spool)).items():
            metrics.spool_files(folder, files)
        await trio.sleep(REFRESH_S)


async def _tell_systemd(overview: Overview, asked: trio.Event) -> None:
    """Keep the line in ``systemctl status`` as it is, until *asked* to stop."""
    told = ""
    while not asked.is_set():
        line = overview.status_line()
        if line != told:
            sdnotify.notify(STATUS=line)
        told = line
        with trio.move_on_after(STATUS_S):
            await asked.wait()


def _limits(config: Config) -> dict[str, Any]:
    """The intake's."""
    return {
        "settle_s": config.watch.settle_s,
        "max_file_bytes": config.jobs.max_file_bytes,
        "max_attempts": config.jobs.max_attempts,
        "queue_timeout_s": config.jobs.queue_timeout_s,
        "workflows": config.workflows,
    }


def _watched(link: Link | None, origin: str) -> Watched:
    if link is None:  # it was enlisted in this moment
        return Watched(
            url=origin,
            tracker=lambda: "connecting",
            stats=lambda: None,
            reason=lambda: "not asked yet",
            progress=lambda prompt_id: None,
        )
    return Watched(
        url=link.client.endpoint.base_url,
        tracker=lambda: link.tracker.state,
        stats=lambda: link.health.stats,
        reason=lambda: link.health.reason,
        progress=link.progress.of,
    )


def _jobs_at_hand(group: BaseExceptionGroup[OrderFailed]) -> Iterator[JobId]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _jobs_at_hand(error)
        else:
            yield error.job


async def _record_crash(journal: Journal, jobs: Iterator[JobId]) -> None:
    """Write down whose order brought the daemon down: three times in a row, and the job is held."""
    with trio.move_on_after(CONFESSION_S, shield=True):
        for job in jobs:
            row = await journal.get(job)
            # What was being collected is counted by `Engine.load`, which sees an unclean end.
            if row is not None and not row.state.final and row.state is not State.COLLECTING:
                crashed = msgspec.structs.replace(
                    row, crashes=row.crashes + 1, version=row.version + 1
                )
                await journal.commit(Batch(changes=(Update(row=crashed, expected=row.version),)))
