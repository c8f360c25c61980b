"""The switches that make the simulator misbehave: their names, arguments and present setting.

A switch is set by text (`history-fail=0.3`, as on the command line) or by attribute at run time.
All chance comes from one seeded generator, so a run can be repeated.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import trio

MESSAGE_TYPES: Final = frozenset(
    {
        "status",
        "execution_start",
        "execution_cached",
        "executing",
        "end",
        "progress",
        "progress_state",
        "executed",
        "execution_success",
        "execution_error",
        "execution_interrupted",
        "feature_flags",
        "binary",
        "all",
    }
)
CARD_FAILURES: Final = ("cuda", "memory", "other")
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNITS_BYTES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(slots=True)
class HowOften:
    """When a fault strikes: the next *count* times, or each time with *probability*.

    Written `3` (the next three), `0.25` (one in four); nothing means always.
    """

    probability: float = 1.0
    count: int | None = None

    def strikes(self, chance: random.Random) -> bool:
        if self.count is None:
            return chance.random() < self.probability
        if self.count == 0:
            return False
        self.count -= 1
        return True


def _how_often(text: str) -> HowOften:
    if text == "":
        return HowOften()
    if text.isdecimal():
        return HowOften(count=int(text))
    probability = float(text)
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability is 0 to 1, not {text}")
    return HowOften(probability=probability)


def _duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if match is None:
        raise ValueError(f"a duration is written 500ms, 15s, 5m or 2h, not {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(B|KiB|MiB|GiB)", text)
    if match is None:
        raise ValueError(f"a size is written 512B, 64KiB or 16MiB, not {text!r}")
    return int(match[1]) * _UNITS_BYTES[match[2]]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"a whole number is wanted, not {text!r}")
    return int(text)


def _status(text: str) -> StatusFail:
    status, _, how_often = text.partition(":")
    if not (status.isdecimal() and 400 <= int(status) <= 599):
        raise ValueError(f"an HTTP status from 400 to 599 is wanted, not {status!r}")
    return StatusFail(int(status), _how_often(how_often))


def _status_of_class(text: str) -> ClassFail:
    status, _, class_type = text.partition(":")
    if not class_type:
        raise ValueError(f"a status and a node class are wanted, as in 500:KSampler, not {text!r}")
    return ClassFail(_status(status).status, class_type)


def _card(text: str) -> CardFail:
    kind, _, how_often = text.partition(":")
    if kind not in CARD_FAILURES:
        raise ValueError(f"{', '.join(CARD_FAILURES[:-1])} or other is wanted, not {kind!r}")
    return CardFail(kind, _how_often(how_often))


def _names(text: str) -> frozenset[str]:
    names = frozenset(text.split(","))
    if "" in names:
        raise ValueError("a name is wanted, or several with commas between them")
    return names


def _half_open(text: str) -> str:
    if text not in ("", "ws", "http", "all"):
        raise ValueError(f"ws, http or all is wanted, not {text!r}")
    return text or "all"


def _nothing(text: str) -> bool:
    if text:
        raise ValueError("it takes no argument")
    return True


@dataclass(frozen=True, slots=True)
class StatusFail:
    """The HTTP status with which a request fails, and when."""

    status: int
    how_often: HowOften


@dataclass(frozen=True, slots=True)
class ClassFail:
    """The HTTP status with which graphs that hold a node class are answered."""

    status: int
    class_type: str


@dataclass(frozen=True, slots=True)
class CardFail:
    """What a broken card makes nodes raise (one of CARD_FAILURES), and when."""

    kind: str
    how_often: HowOften


@dataclass(frozen=True, slots=True)
class Switch:
    """One fault that can be switched on.

    Attributes:
      name: As written on the command line; a trailing `-` is followed by a message type.
      argument: How its argument is written; in brackets if it may be left out.
      about: What it does, in one line.
      attribute: Its name on `Faults`.
      parse: Turns the argument into the attribute's value; raises ValueError.

    """

    name: str
    argument: str
    about: str
    attribute: str
    parse: Callable[[str], Any]


_OFTEN: Final = "[HOW-OFTEN]"
SWITCHES: Final = (
    Switch("drop-", _OFTEN, "lose messages of that type (end: executing null)", "drop", _how_often),
    Switch("delay-", "DURATION", "hold the stream before such a message", "delay_s", _duration_s),
    Switch("deaf", _OFTEN, "a socket gets nothing after its first status", "deaf", _how_often),
    Switch("half-open", "[ws|http|all]", "connections go silent for ever", "half_open", _half_open),
    Switch("stalled-publisher", "", "no socket gets anything", "stalled_publisher", _nothing),
    Switch("ws-refuse", _OFTEN, "403 at the WebSocket handshake", "ws_refuse", _how_often),
    Switch(
        "teardown", "DURATION", "a gap between execution_* and record", "teardown_s", _duration_s
    ),
    Switch("history-delay", "DURATION", "records appear late", "history_delay_s", _duration_s),
    Switch("history-fail", _OFTEN, "500 for GET /history", "history_fail", _how_often),
    Switch("queue-fail", _OFTEN, "500 for GET /queue", "queue_fail", _how_often),
    Switch("evict-history", "N", "keep the newest N records only", "evict_history", _number),
    Switch("post-refuse", _OFTEN, "POST /prompt closed unread", "post_refuse", _how_often),
    Switch("post-fail", "STATUS[:HOW-OFTEN]", "POST /prompt fails", "post_fail", _status),
    Switch(
        "post-fail-class",
        "STATUS:CLASS",
        "POST /prompt fails for a graph with that node class",
        "post_fail_class",
        _status_of_class,
    ),
    Switch(
        "post-ambiguous", _OFTEN, "POST /prompt queued, then closed", "post_ambiguous", _how_often
    ),
    Switch("post-hang", _OFTEN, "POST /prompt queued, never answered", "post_hang", _how_often),
    Switch(
        "post-delay",
        "DURATION",
        "POST /prompt queued and answered late",
        "post_delay_s",
        _duration_s,
    ),
    Switch(
        "missing-node", "CLASS[,CLASS]", "node classes are not installed", "missing_nodes", _names
    ),
    Switch("missing-model", "NAME[,NAME]", "no list of choices holds it", "missing_models", _names),
    Switch(
        "max-upload",
        "SIZE",
        "413 for a request body that is larger",
        "max_upload_bytes",
        _size_bytes,
    ),
    Switch("upload-fail", "STATUS[:HOW-OFTEN]", "POST /upload/* fails", "upload_fail", _status),
    Switch("view-fail", "STATUS[:HOW-OFTEN]", "GET /view fails", "view_fail", _status),
    Switch("view-truncate", _OFTEN, "/view ends half way", "view_truncate", _how_often),
    Switch("view-wrong", _OFTEN, "/view answers 200 with HTML", "view_wrong", _how_often),
    Switch("view-missing", _OFTEN, "404 for /view", "view_missing", _how_often),
    Switch(
        "interrupt-ignored", _OFTEN, "/interrupt has no effect", "interrupt_ignored", _how_often
    ),
    Switch(
        "card-fails",
        "KIND[:HOW-OFTEN]",
        "a node raises at once, as on a broken card (cuda, memory, other)",
        "card_fails",
        _card,
    ),
    Switch("node-stalls", _OFTEN, "a node stands still until interrupted", "stalls", _how_often),
    Switch("node-hangs", _OFTEN, "a node stands still, interrupted or not", "hangs", _how_often),
    Switch(
        "crash-down", "DURATION", "after a crash its port refuses that long", "down_s", _duration_s
    ),
    Switch(
        "restart-after", "N", "memory is lost as each N+1st prompt starts", "restart_after", _number
    ),
    Switch(
        "zombie-worker", _OFTEN, "the worker takes a prompt and dies", "zombie_worker", _how_often
    ),
    Switch("stuck-worker", "", "the worker takes no prompt: all wait", "stuck_worker", _nothing),
    Switch("slow", "DURATION", "every HTTP answer takes that long", "slow_s", _duration_s),
)
_BY_NAME: Final = {switch.name: switch for switch in SWITCHES}


@dataclass(frozen=True, slots=True)
class Fault:
    """One switch with its argument, as parsed from text."""

    switch: Switch
    message_type: str
    value: Any


def parse_fault(text: str) -> Fault:
    """Parse `NAME` or `NAME=ARG`.

    Raises:
      ValueError: with a sentence that names what is wrong and what would be right.

    """
    name, _, argument = text.partition("=")
    switch = _BY_NAME.get(name)
    message_type = ""
    if switch is None:
        prefix, dash, message_type = name.partition("-")
        switch = _BY_NAME.get(prefix + dash)
        if switch is None or not message_type:
            names = ", ".join(_BY_NAME)
            raise ValueError(f"there is no fault {name!r}; there are {names}")
        if message_type not in MESSAGE_TYPES:
            known = ", ".join(sorted(MESSAGE_TYPES))
            raise ValueError(
                f"{name}: there is no message type {message_type!r}; there are {known}"
            )
    elif switch.name.endswith("-"):
        raise ValueError(f"{name} needs a message type, as in {name}executed")
    try:
        return Fault(switch, message_type, switch.parse(argument))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@dataclass(kw_only=True)
class Faults:
    """The present setting of every switch; None, 0 and False mean off.

    Attributes whose name ends in `_s` are seconds. They may be changed at any time.
    """

    chance: random.Random = field(default_factory=lambda: random.Random(0))
    drop: dict[str, HowOften] = field(default_factory=dict)
    delay_s: dict[str, float] = field(default_factory=dict)
    deaf: HowOften | None = None
    half_open: str | None = None
    stalled_publisher: bool = False
    ws_refuse: HowOften | None = None
    teardown_s: float = 0.0
    history_delay_s: float = 0.0
    history_fail: HowOften | None = None
    queue_fail: HowOften | None = None
    evict_history: int | None = None
    post_refuse: HowOften | None = None
    post_fail: StatusFail | None = None
    post_fail_class: ClassFail | None = None
    post_ambiguous: HowOften | None = None
    post_hang: HowOften | None = None
    post_delay_s: float = 0.0
    missing_nodes: frozenset[str] = frozenset()
    missing_models: frozenset[str] = frozenset()
    max_upload_bytes: int | None = None
    upload_fail: StatusFail | None = None
    view_fail: StatusFail | None = None
    view_truncate: HowOften | None = None
    view_wrong: HowOften | None = None
    view_missing: HowOften | None = None
    interrupt_ignored: HowOften | None = None
    card_fails: CardFail | None = None
    stalls: HowOften | None = None
    hangs: HowOften | None = None
    down_s: float = 0.0
    restart_after: int | None = None
    zombie_worker: HowOften | None = None
    stuck_worker: bool = False
    slow_s: float = 0.0
    _changed: trio.Event = field(default_factory=trio.Event, repr=False, compare=False)

    @classmethod
    def parse(cls, texts: Iterable[str], *, seed: int = 0) -> Faults:
        """The setting that *texts* describe.

        Raises:
          ValueError: as `parse_fault`.

        """
        faults = cls(chance=random.Random(seed))
        for text in texts:
            faults.set(text)
        return faults

    def set(self, text: str) -> None:
        """Switch one fault on, written as for `parse_fault`.

        Raises:
          ValueError: as `parse_fault`; nothing was changed.

        """
        fault = parse_fault(text)
        if fault.message_type:
            getattr(self, fault.switch.attribute)[fault.message_type] = fault.value
        else:
            setattr(self, fault.switch.attribute, fault.value)

    def clear(self) -> None:
        """Switch everything off."""
        for name, value in vars(Faults(chance=self.chance)).items():
            if name != "_changed":
                setattr(self, name, value)

    def strikes(self, fault: HowOften | StatusFail | CardFail | None) -> bool:
        """Whether that fault strikes now."""
        if fault is None:
            return False
        how_often = fault if isinstance(fault, HowOften) else fault.how_often
        return how_often.strikes(self.chance)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        changed: trio.Event | None = vars(self).get("_changed")
        if name != "_changed" and changed is not None:
            changed.set()
            self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Return when an attribute has been set."""
        await self._changed.wait()
