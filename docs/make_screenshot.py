"""Take the picture of the status page in docs/status-page.png: ``make screenshot``.

A real daemon with two simulated servers and a third one that is down, at work: jobs that run, wait,
are done and have failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import trio

from comfyd.spool.layout import drop
from tests.endtoend.daemon import Daemon
from tests.endtoend.graphs import failing, node, slow
from tests.endtoend.server import Server
from tests.web.browser import chromium

TARGET: Final = Path(__file__).with_name("status-page.png")
NODE_S: Final = 0.3
JOB_S: Final = 6.0
VIEWS: Final[dict[str, dict[str, Any]]] = {
    "desktop-light": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "light"},
    "desktop-dark": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "dark"},
    "phone-light": {"viewport": {"width": 375, "height": 812}, "color_scheme": "light"},
    "phone-dark": {"viewport": {"width": 375, "height": 812}, "color_scheme": "dark"},
}


def picture(name: str, seconds: float) -> dict[str, Any]:
    """A workflow in which most of the time goes into one node that counts its steps."""
    graph = slow(random.randrange(1 << 24), seconds)
    graph["5"] = node("ImageBlur", image=["2", 0], blur_radius=1, sigma=1.0)
    graph["9"]["inputs"] |= {"images": ["5", 0], "filename_prefix": name}
    return graph


async def busy(daemon: Daemon) -> None:
    """Give the daemon a past and a present."""
    names = ["portrait", "harbour-at-dusk", "red-fox", "poster-04", "still-life"]

    def submit(name: str, workflow: dict[str, Any], **more: Any) -> None:
        content = json.dumps({"workflow": workflow, **more}).encode()
        drop(daemon.spool, f"{name}.json", content)

    for name in names:
        submit(name, picture(name, JOB_S))
    submit("night-train", failing(random.randrange(1 << 24)))
    await daemon.finish(6, within_s=60)
    more = ["cover-a", "cover-b", "studio-light", "red-fox-large", "meadow", "tiles", "fjord"]
    for name in [*more, *names]:
        submit(name, picture(name, JOB_S), priority=5 if name == "fjord" else 0)
    while not any(0.5 < done(job) < 0.7 for job in await at_hand(daemon)):  # noqa: ASYNC110
        await trio.sleep(0.1)


async def at_hand(daemon: Daemon) -> list[dict[str, Any]]:
    status = json.loads(await daemon.get("/api/v1/status"))
    return list(status["at_hand"])


def done(job: dict[str, Any]) -> float:
    """The share of its steps that the node at work has done."""
    progress = job["progress"]
    return float(progress["step"] / progress["steps"]) if progress and progress["steps"] else 0.0


async def main(folder: Path | None) -> None:
    home = Path(tempfile.mkdtemp(prefix="comfyd-screenshot-"))
    try:
        async with AsyncExitStack() as stack:
            servers = {
                name: (await stack.enter_async_context(Server.running(node_s=NODE_S))).url
                for name in ("atelier", "garage")
            }
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                servers["attic"] = f"http://127.0.0.1:{free.getsockname()[1]}"
            daemon = Daemon(home, servers, {"audit": {"stale_after": "1m"}})
            async with daemon.running():
                await busy(daemon)
                await trio.to_thread.run_sync(take, daemon.http_url, folder)
    finally:
        shutil.rmtree(home)


def take(url: str, folder: Path | None) -> None:
    """Blocking: the picture for the documentation, or all views into *folder*."""
    with chromium() as browser:
        for name, view in VIEWS.items() if folder else [("desktop-light", VIEWS["desktop-light"])]:
            page = browser.new_page(**view)
            page.goto(url)
            page.locator("#live.on").wait_for()
            path = folder / f"{name}.png" if folder else TARGET
            page.screenshot(path=path, full_page=True)
            page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="every view, into FOLDER")
    trio.run(main, parser.parse_args().all)
