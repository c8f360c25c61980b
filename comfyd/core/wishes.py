"""What became of people's wishes, told as it really is: replies are read off rows and servers.

A wish is a fact like any other and may come too late; so nothing here is told from what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from comfyd.core import keys
from comfyd.core.facts import CancelAsked, HoldAsked, ReleaseAsked
from comfyd.core.model import JobId, Outcome, Row, ServerName, State
from comfyd.core.present import LIVE_STATES, shown_state
from comfyd.core.server import Server

HELD_BY_PERSON: Final = "A person holds it; comfyd release lets it go on."

CONCERNED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "cancel": LIVE_STATES,
        "hold": ("queued",),
        "release": ("held",),
        "retry": ("failed", "cancelled"),
    }
)
"""The shown states of jobs that a pattern alone chooses, by verb."""

ALLOWED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {**CONCERNED, "retry": ("done", "failed", "cancelled")}
)
"""The shown states that may be asked for, by verb: there is nothing to do for jobs in others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of a wish about one job.

    Attributes:
      job: Its id, or what was typed if that means no job.
      ok: It is now as was asked.
      outcome: A word for scripts: the verb's past tense, already, too_late, stopping (under way, it
        goes on by itself), waiting (not written down yet), unknown, refused.
      what: The same for people: the end of a sentence that begins with the job.
      state: As shown; "" of an unknown job.
      new: The job that a retry made.

    """

    job: str
    ok: bool
    outcome: str
    what: str
    state: str = ""
    new: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; what is "" is left out."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value != ""}


def unknown(text: str, why: str) -> Reply:
    """*text* means no job, or several."""
    return Reply(job=text, ok=False, outcome="unknown", what=why)


def moved_on(row: Row, asked: str) -> Reply:
    """It was chosen for being *asked*, and is not any more."""
    return _reply(row, "too_late", f"left alone: no longer {asked}, but {shown_state(row)}")


# --- cancel, hold, release -----------------------------------------------------------------------


def is_ending(row: Row) -> bool:
    """Whether it is on its way to its end as cancelled, and not there."""
    verdict = row.outcome or row.why
    return not row.state.final and verdict is not None and verdict.state is State.CANCELLED


def cancelled(before: Row, after: Row) -> Reply:
    """What became of a `CancelAsked`."""
    if before.state.final:
        return _already(after, ok=before.state is State.CANCELLED)
    match after.state:
        case State.CANCELLED:
            return _reply(after, "cancelled", "cancelled", ok=True)
        case State.DONE:
            return _reply(after, "too_late", "too late: it is done and was delivered")
        case State.FAILED:
            return _reply(after, "too_late", f"too late: it failed first{_because(after.outcome)}")
        case State.COLLECTING | State.PUBLISHING if is_ending(after):
            return _reply(
                after, "stopping", "stopped; failed/ gets it as soon as it can be written"
            )
        case State.COLLECTING | State.PUBLISHING:
            return _reply(after, "too_late", "too late: it has ended and is being delivered")
        case State.STOPPING | State.SUBMITTING if is_ending(after):
            return _reply(after, "stopping", "still stopping; it goes on by itself")
        case State.STOPPING:
            why = _because(after.why)
            return _reply(after, "stopping", f"is being stopped already{why}; it goes on by itself")
        case _:
            return _not_yet(after, "cancelled")


def held(before: Row, after: Row) -> Reply:
    """What became of a `HoldAsked`."""
    if before.state.final:
        return _already(after, ok=False)
    if after.state is State.HELD:
        was = before.state is State.HELD
        return _reply(
            after, "already" if was else "held", "already held" if was else "held", ok=True
        )
    if after.state is State.QUEUED:
        return _not_yet(after, "held")
    return _reply(after, "too_late", f"too late: {_is(after)}")


def released(before: Row, after: Row) -> Reply:
    """What became of a `ReleaseAsked`."""
    if before.state.final:
        return _already(after, ok=False)
    if before.state is not State.HELD:
        queued = before.state is State.QUEUED
        return _reply(after, "already", f"was not held: {_is(after)}", ok=queued)
    if after.state is State.HELD:
        return _not_yet(after, "released")
    return _reply(after, "released", "released", ok=True)


_Wish = CancelAsked | HoldAsked | ReleaseAsked
VERBS: Final[Mapping[str, tuple[Callable[[JobId], _Wish], Callable[[Row, Row], Reply]]]] = (
    MappingProxyType(
        {
            "cancel": (lambda job: CancelAsked(job=job), cancelled),
            "hold": (lambda job: HoldAsked(job=job, reason=HELD_BY_PERSON), held),
            "release": (lambda job: ReleaseAsked(job=job), released),
        }
    )
)
"""For each verb, the fact to tell the core, and what came of it from the rows before and after."""


# --- retry ---------------------------------------------------------------------------------------


def why_no_retry(row: Row, keyed: Row | None) -> str:
    """Why no new job is made of *row*; "" if one may be.

    Args:
      keyed: The newest job with its key.

    """
    if not row.state.final:
        return f"not retried: {_is(row)}; a retry is for jobs that have ended"
    holder = keys.holder_told(row)
    if holder:  # what is kept has no key any more: it would run without one
        return (
            f"not retried: {holder} has its key and other content; submit it with a key of its own"
        )
    if keyed is not None and keyed.job != row.job and not keyed.state.final:
        return f"not retried: {keyed.job} has its key and {_is(keyed)}"
    return ""


def not_retried(row: Row, why: str) -> Reply:
    return _reply(row, "refused", why)


def retried(row: Row, new: Row, committed: Row | None) -> Reply:
    """A retry was made: *committed* is its row in the journal."""
    if committed is None:
        what = f"not retried yet: the daemon could not write down {new.job}; it goes on by itself"
        return Reply(
            job=row.job, ok=False, outcome="waiting", what=what, state=shown_state(row), new=new.job
        )
    return Reply(
        job=row.job,
        ok=True,
        outcome="retried",
        what=f"retried as {new.job}",
        state=shown_state(row),
        new=new.job,
    )


# --- intake and servers --------------------------------------------------------------------------

UNWRITTEN: Final = (False, "Not yet: the daemon could not write it down; look at its status.")


def paused(before: bool, after: bool) -> tuple[bool, str]:
    """Whether the intake is stopped as asked, and a sentence."""
    if not after:
        return UNWRITTEN
    was = " already" if before else ""
    return True, f"The intake is paused{was}: files stay in new/ until comfyd resume."


def resumed(before: bool, after: bool, servers: Iterable[Server]) -> tuple[bool, str]:
    """Whether the intake goes on as asked, and a sentence: servers are resumed by name."""
    if after:
        return UNWRITTEN
    told = "The intake goes on." if before else "The intake was not paused."
    draining = [server.name for server in servers if server.draining]
    if draining:
        told += f" Still drained: {', '.join(draining)}; resume servers by name."
    return True, told


def drained(before: Server, after: Server, in_flight: int) -> tuple[bool, str]:
    """Whether nothing more is sent there, and a sentence."""
    if not after.draining:
        return UNWRITTEN
    was = " was drained already" if before.draining else " gets nothing more"
    return True, f"{after.name}{was}; {_finishing(in_flight)}."


def server_resumed(
    before: Server, was: str, after: Server, trouble: str, in_flight: int = 0
) -> tuple[bool, str]:
    """Whether it may be used again, and a sentence.

    Args:
      was, trouble: Why it got nothing by itself, before and now; "" if it did.
      in_flight: Prompts of ours that may be there.

    """
    if after.draining:
        return UNWRITTEN
    if after.leaving:
        return False, f"{after.name} {leaving_words(after, in_flight)}."
    if trouble:
        return False, f"{after.name} is still not used: {trouble}"
    if not before.draining and not was:
        return True, f"{after.name} was neither drained nor wedged."
    when = "" if after.up else " as soon as it answers"
    return True, f"{after.name} may be used again{when}."


def why_not_forget(name: ServerName, server: Server | None) -> str:
    """Why a server's prompts are not given up; "" if they may be. None: it is not configured."""
    if server is None or server.up is False:
        return ""
    if server.up:
        return f"{name} answers, so its prompts are alive; drain it instead."
    return f"{name} was not looked at yet; try again in a moment."


def forgotten(name: ServerName, before: int, after: int) -> tuple[bool, str]:
    """Whether nothing of ours is left there, and a sentence. Args: prompts of ours that were."""
    if after:
        return False, f"{name} still has {prompts(after)}; they were not given up yet."
    if not before:
        return True, f"{name} had nothing of ours."
    return True, f"{name} is given up: {prompts(before)} written off, their jobs go on without it."


def draining_words(in_flight: int) -> str:
    """What a drained server does, as a sentence."""
    return f"gets nothing more; {_finishing(in_flight)}"


def departed(name: ServerName) -> tuple[bool, str]:
    """A reload has taken the server away in the meantime."""
    return False, f"{name} is configured no more."


def leaving_words(server: Server, in_flight: int) -> str:
    """What a server does that is configured no more, or at another URL, as a sentence."""
    moved = server.successor is not None
    gone = "has another URL in the configuration" if moved else "is configured no more"
    return f"{gone}; {_finishing(in_flight)}"


def _finishing(in_flight: int) -> str:
    return f"{prompts(in_flight)} to finish" if in_flight else "nothing of ours is left there"


def prompts(count: int) -> str:
    """*count* prompts, in words."""
    return f"{count} prompt{'s' * (count != 1)}"


def _reply(row: Row, outcome: str, what: str, *, ok: bool = False) -> Reply:
    return Reply(job=row.job, ok=ok, outcome=outcome, what=what, state=shown_state(row))


def _already(row: Row, *, ok: bool) -> Reply:
    return _reply(row, "already", f"already {row.state.value}", ok=ok)


def _not_yet(row: Row, what: str) -> Reply:
    told = f"not {what} yet, still {shown_state(row)}: the daemon could not write it down"
    return _reply(row, "waiting", told)


def _is(row: Row) -> str:
    return f"it is {shown_state(row)}"


def _because(outcome: Outcome | None) -> str:
    return f" ({outcome.reason.value})" if outcome is not None and outcome.reason else ""
