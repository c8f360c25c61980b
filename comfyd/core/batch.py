"""What comes of a batch of facts: rows to commit, orders to release after that, notes to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfyd.core.facts import LateSuccess, Wish
from comfyd.core.model import Fence, JobId, PromptId, Row
from comfyd.core.notes import Note
from comfyd.core.orders import Order


@dataclass(frozen=True, slots=True)
class Change:
    """One row to commit. *expected* is the version it replaces, or None for a new row."""

    row: Row
    expected: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What came of a batch of facts. Commit the rest and the story of *notes*, then give *orders*.

    Attributes:
      raised, lifted: Fences that are new, and the prompt ids of those that are over.
      settings: What persons asked for, to be remembered by name.
      urgent: False when nothing waits for the commit: it may come together with a later one.

    """

    changes: tuple[Change, ...] = ()
    raised: tuple[Fence, ...] = ()
    lifted: tuple[PromptId, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    orders: tuple[Order, ...] = ()
    notes: tuple[Note, ...] = ()
    urgent: bool = False


@dataclass
class Pending:
    """The same while it is being gathered. *dirty*: the committed version of each changed job."""

    dirty: dict[JobId, int | None] = field(default_factory=dict)
    raised: list[Fence] = field(default_factory=list)
    lifted: list[PromptId] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    purposes: list[Wish | LateSuccess] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    urgent: bool = False
