"""A listener that remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio

Told = tuple[float, str, Any]


class Log:
    """A listener that writes down what it is told, and when."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self._news = trio.Event()

    def _note(self, what: str, value: Any) -> None:
        self.told.append((round(trio.current_time(), 3), what, value))
        self._news.set()
        self._news = trio.Event()

    def on_connected(self, client_id: str) -> None:
        self._note("connected", client_id)

    def on_disconnected(self, cause: str) -> None:
        self._note("disconnected", cause)

    def on_hint(self, prompt_id: str, sign: Any) -> None:
        self._note("hint", (prompt_id, sign.value))

    def on_progress(self, prompt_id: str, kind: str, data: bytes) -> None:
        self._note("progress", (prompt_id, kind, json.loads(data)))

    def on_remaining(self, remaining: int) -> None:
        self._note("remaining", remaining)

    def on_message(self, label: str) -> None:
        self._note("message", label)

    def on_connect_result(self, result: str) -> None:
        self._note("result", result)

    def on_stalled(self, stalled: bool) -> None:
        self._note("stalled", stalled)

    def on_invalid(self, label: str, problem: str) -> None:
        self._note("invalid", (label, bool(problem)))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until *holds*, which is asked whenever something was told."""
        while not holds():
            await self._news.wait()

    async def results(self, count: int) -> None:
        await self.until(lambda: len(self.values("result")) >= count)

    def of(self, *whats: str) -> list[Told]:
        return [told for told in self.told if told[1] in whats]

    def values(self, what: str) -> list[Any]:
        return [value for _, told, value in self.told if told == what]
