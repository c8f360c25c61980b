"""The links to all servers: each is started, replaced and ended by itself, without the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

import structlog
import trio

from comfyd.config import Config, Server
from comfyd.core.model import ServerName
from comfyd.metrics import Metrics
from comfyd.services.clock import Clock
from comfyd.services.inbox import Inbox
from comfyd.services.link import Link, authorities_of
from comfyd.services.supervisor import supervise

FAREWELL_S: Final = 1.0  # for connections to close, in good order or not

_log: Any = structlog.get_logger("comfyd.server")

Key = tuple[ServerName, str]


class Links:
    """Every link by its server's name and URL: a name whose URL changed is another server.

    A link is there as soon as it is configured and talks once the engine enlists its server; it
    goes when the engine dismisses it.

    Args:
      nursery: Its tasks end with it. Close what is left afterwards, with `aclose`.

    """

    def __init__(
        self, nursery: trio.Nursery, config: Config, inbox: Inbox, metrics: Metrics, clock: Clock
    ) -> None:
        self._nursery = nursery
        self._inbox, self._metrics, self._clock = inbox, metrics, clock
        self._config = config
        self._scopes: dict[Link, trio.CancelScope] = {}  # of those that talk
        self._links: dict[Key, Link] = {}
        self._ending: set[Link] = set()
        for link in self.prepare(config):
            self._links[link.name, link.origin] = link
        self._name()

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links.values())

    def __len__(self) -> int:
        return len(self._links)

    def of(self, name: ServerName, origin: str) -> Link | None:
        """The link to a server; None if it is not configured."""
        return self._links.get((name, origin))

    # --- the configuration changes ---------------------------------------------------------------

    def prepare(self, config: Config) -> list[Link]:
        """Links for the servers of *config* that have none, or one with other headers or another CA
        file; nothing is changed and nothing is started.

        Raises:
          ConfigError: One cannot be made.

        """
        return [
            self._made(server, config) for server in config.servers if not self._is_served(server)
        ]

    def _made(self, server: Server, config: Config) -> Link:
        return Link(server, config, self._inbox, self._metrics, self._clock)

    def _is_served(self, server: Server) -> bool:
        link = self.of(ServerName(server.name), server.url)
        if link is None:
            return False
        if (link.server.headers, link.server.ca_file) != (server.headers, server.ca_file):
            return False
        return link.authorities == authorities_of(server)

    def take_up(self, config: Config, prepared: Iterable[Link]) -> None:
        """Let *config* hold: new values for all links, and *prepared* in the place of those that
        were there. Without a wait, so that the engine never knows of a server without a link.
        """
        self._config = config
        for link in self:
            link.configure(config)
        wanted = {(ServerName(server.name), server.url) for server in config.servers}
        for key, idle in list(self._links.items()):
            # Configured by an earlier reload, and removed again before its name was free.
            if key not in wanted and idle not in self._scopes:
                del self._links[key]
                self._end(idle)
        for link in prepared:
            key = link.name, link.origin
            before = self._links.get(key)
            self._links[key] = link
            if before is not None:
                started = before in self._scopes
                self._stop(before, link)
                if started:
                    self.start(*key)
        self._name()

    def _name(self) -> None:
        self._metrics.prepare({link.name for link in self})

    # --- the engine says so ----------------------------------------------------------------------

    def start(self, name: ServerName, origin: str) -> None:
        """Begin to talk to a server.

        What the engine says may be older than the configuration, by a moment: a link may have gone
        that is wanted again, and one that nobody wants any more is about to be dismissed.
        """
        link = self.of(name, origin)
        if link is None:
            servers = {(each.name, each.url): each for each in self._config.servers}
            if (name, origin) not in servers:
                return
            link = self._made(servers[name, origin], self._config)
            self._links[name, origin] = link
            self._name()
        self._scopes[link] = scope = trio.CancelScope()
        link.users.join()  # its own tasks: what is cancelled may still be about to ask something
        self._nursery.start_soon(self._live, link, scope)

    def retire(self, name: ServerName, origin: str) -> None:
        """End a link that nobody needs any more."""
        link = self._links.pop((name, origin), None)
        if link is not None:
            self._stop(link, None)
            self._name()
            _log.info("server_removed", server=name)

    def _stop(self, link: Link, successor: Link | None) -> None:
        if (scope := self._scopes.pop(link, None)) is not None:
            scope.cancel()
        link.succeeded(successor)
        self._end(link)

    async def _live(self, link: Link, scope: trio.CancelScope) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    for task, body in link.tasks():
                        restarted = self._metrics.task_restart
                        nursery.start_soon(partial(supervise, task, body, on_restart=restarted))
        finally:
            link.users.leave()

    def _end(self, link: Link) -> None:
        self._ending.add(link)
        self._nursery.start_soon(self._close, link)

    async def _close(self, link: Link) -> None:
        """Close its connections once no order uses them; what is asked there has its timeout."""
        await link.users.gone()
        with trio.move_on_after(FAREWELL_S, shield=True):
            await link.client.aclose()
        self._ending.discard(link)

    async def aclose(self) -> None:
        """Leave no connection open, however the nursery ended."""
        with trio.move_on_after(FAREWELL_S, shield=True):
            for link in [*self._links.values(), *self._ending]:
                await link.client.aclose()
