"""``/metrics`` for Prometheus, ``/-/healthy`` and ``/-/ready`` for whoever watches the process."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from comfyd.core.snapshot import Snapshot
from comfyd.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What must be so before jobs can be taken in. A server that is down is not among it."""

    journal_open: bool = False
    spool_watched: bool = False
    listener_bound: bool = False

    def missing(self) -> tuple[str, ...]:
        """What is not so yet, as sentences; empty once ready."""
        checks = (
            (self.journal_open, "The journal is not open."),
            (self.spool_watched, "The spool is not watched."),
            (self.listener_bound, "The metrics listener is not bound."),
        )
        return tuple(sentence for good, sentence in checks if not good)


# A version that is no number makes choose_encoder raise; who asks so can read the plain format.
_ODD_VERSION: Final = re.compile(r"version=(?!\d{1,4}(\.\d{1,4}){0,2}\s*(?:[;,]|$))", re.ASCII)


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    return choose_encoder("" if _ODD_VERSION.search(accept) else accept)


def routes(
    metrics: Metrics,
    snapshot: Callable[[], Awaitable[Snapshot]],
    readiness: Callable[[], Readiness],
) -> list[Route]:
    """The routes that machines poll."""

    async def exposition(request: Request) -> Response:
        encode, content_type = _encoder(request.headers.get("accept", ""))
        now = await snapshot()
        metrics.refresh(now)  # and render without a wait in between: all gauges are of one moment
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    async def healthy(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def ready(request: Request) -> Response:
        missing = readiness().missing()
        text = "".join(f"{sentence}\n" for sentence in missing) or "OK\n"
        return PlainTextResponse(text, 503 if missing else 200)

    return [
        Route("/metrics", exposition),
        Route("/-/healthy", healthy),
        Route("/-/ready", ready),
    ]
