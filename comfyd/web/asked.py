"""What a request holds: every value checked, since whoever writes to the socket may write anything.

Each raises UsageError with one sentence for a value that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from comfyd.core.model import Row
from comfyd.core.present import SHOWN_STATES
from comfyd.core.strictjson import quoted
from comfyd.errors import UsageError
from comfyd.journal.thread import Journal

JOBS_MAX: Final = 500
"""Jobs in one request: a few seconds of work at most, so nobody else waits long."""
PATTERN_MAX: Final = 200  # characters; a job id has 91 at most
_SEQ_MAX: Final = 2**63 - 1


def state_in(request: Mapping[str, Any]) -> str | None:
    """The shown state that is asked for, if any."""
    state = request.get("state")
    if state is None or (isinstance(state, str) and state in SHOWN_STATES):
        return state
    raise UsageError(f"there is no state {quoted(str(state))}; there are {', '.join(SHOWN_STATES)}")


def after_in(request: Mapping[str, Any]) -> int | None:
    """The seq after which a page begins; None for the first page."""
    after = request.get("after")
    if after is None or (isinstance(after, int) and 0 <= after <= _SEQ_MAX):
        return after
    raise UsageError("after must be the seq of the last job of the page before")


def pattern_in(request: Mapping[str, Any]) -> str | None:
    """A pattern of job ids, if there is one."""
    pattern = request.get("match")
    if pattern is None or (isinstance(pattern, str) and 0 < len(pattern) <= PATTERN_MAX):
        return pattern
    raise UsageError(f"match must be a pattern of {PATTERN_MAX} characters at most, such as fox*")


def jobs_in(request: Mapping[str, Any]) -> list[str]:
    """What was typed for jobs, each once, JOBS_MAX at most."""
    texts = request.get("jobs")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError("jobs must be a list of job ids, beginnings of them, or prompt ids")
    if not 0 < len(texts) <= JOBS_MAX:
        raise UsageError(f"one request takes 1 to {JOBS_MAX} jobs, not {len(texts)}")
    return list(dict.fromkeys(texts))


def server_in(request: Mapping[str, Any]) -> str:
    """The name of a server, known or not."""
    name = request.get("server")
    if isinstance(name, str) and name:
        return name
    raise UsageError("say which server")


async def found(journal: Journal, text: str) -> Row:
    """The row of the one job that *text* means: an id or its beginning, a prompt id, an alias.

    Raises:
      UsageError: It means none, or several.

    """
    rows = await journal.find(text)
    if not rows:
        raise UsageError(f"no job is known as {quoted(text)}")
    if len(rows) > 1:
        names = ", ".join(row.job for row in rows[:5])
        raise UsageError(f"{quoted(text)} may mean {len(rows)} jobs: {names}; say which")
    return rows[0]
