"""Where it is kept how far each prompt on one server has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from comfyd.core import progress
from comfyd.core.model import PromptId
from comfyd.core.progress import Progress

_FEW: Final = 64


class ProgressBoard:
    """Bounded by the prompts at hand; forgotten at a restart, and heard anew from then on.

    Args:
      is_ours: Whether a prompt id is one of ours at hand; of others nothing is kept.

    """

    def __init__(self, is_ours: Callable[[PromptId], bool]) -> None:
        self._is_ours = is_ours
        self._known: dict[PromptId, Progress] = {}
        self._sweep_at = _FEW

    def sent(self, prompt_id: PromptId, graph: Mapping[str, Any]) -> None:
        """A prompt is about to be sent: *graph* is what there will be to do."""
        self._put(prompt_id, progress.beginning(graph))

    def heard(self, prompt_id: PromptId, kind: str, data: bytes) -> None:
        """A message about a prompt, anybody's; see `progress.told`."""
        if self._is_ours(prompt_id):
            before = self._known.get(prompt_id, Progress())
            self._put(prompt_id, progress.told(before, kind, data))

    def of(self, prompt_id: PromptId) -> Progress | None:
        """How far this prompt is, if anything is known."""
        return self._known.get(prompt_id)

    def _put(self, prompt_id: PromptId, now: Progress) -> None:
        self._known[prompt_id] = now
        if len(self._known) > self._sweep_at:
            self._known = {key: each for key, each in self._known.items() if self._is_ours(key)}
            self._sweep_at = max(_FEW, 2 * len(self._known))
