"""Debian's chromium, driven by Playwright, whose own browsers are never downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from playwright.sync_api import Browser, sync_playwright

# As root it runs only without its sandbox; what it shows here is our own.
_ARGS: Final = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


def where() -> str | None:
    """The browser's path, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; to be used from one thread, and not from a task."""
    path = where()
    if path is None:
        raise FileNotFoundError("no chromium; apt-get install chromium")
    os.environ.setdefault("PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD", "1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGS)
        try:
            yield browser
        finally:
            browser.close()
