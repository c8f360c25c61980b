"""Every number the core decides by, built from the configuration; tests make their own."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Attributes: all durations are seconds; names and defaults are the configuration's.

    completion_attempts, completion_backoff_s: Fetches after one end signal, and the linear wait
      between them; then the auditor owns the prompt.
    audit_interval_s, stale_after_s, orphan_interval_s, lost_grace_s, abandon_after_s: ``audit``.
    ending_grace_s: How long after ``execution_success`` (or error, or interrupted) the end signal
      may take before we look ourselves. Its normal gap is microseconds; model unloading widens it.
    stop_grace_s: How long a prompt may ignore deletion and interruption before it is abandoned.
    listen_grace_s: How long a server without a live WebSocket is left alone before prompts are sent
      to it all the same (and then polled): a reconnect usually takes less.
    retry_first_s, retry_max_s: Exponential waits where a local or server failure is simply retried.
    turned_away_max_s: The longest of such waits of a server that turned a submission away by an
      answer: it may be the job, so that another is to be tried soon.
    max_crashes: Daemon crashes in a row with the same job at hand before it is held.
    run_timeout_s, stall_timeout_s: For jobs that set none themselves; ``jobs``.
    wedge_after_s: Prompts wait on a server and none runs, for so long: its worker is dead.
    sick_after: Failures in a row, of so many different jobs, that may be a server's fault.
    recall_after_s: A prompt that waits on a server for so long, with another server idle, is
      fetched back.

    """

    completion_attempts: int = 3
    completion_backoff_s: float = 1.0
    audit_interval_s: float = 30.0
    stale_after_s: float = 300.0
    orphan_interval_s: float = 2.0
    lost_grace_s: float = 15.0
    abandon_after_s: float = 600.0
    ending_grace_s: float = 2.0
    listen_grace_s: float = 3.0
    stop_retry_s: float = 1.0
    stop_grace_s: float = 30.0
    retry_first_s: float = 0.5
    retry_max_s: float = 30.0
    turned_away_max_s: float = 5.0
    max_crashes: int = 3
    run_timeout_s: float = 7200.0
    stall_timeout_s: float = 900.0
    wedge_after_s: float = 30.0
    sick_after: int = 5
    recall_after_s: float = 10.0


def has_lasted(since_s: float | None, span_s: float, *, now_s: float) -> bool:
    """Whether what began at *since_s* has gone on for *span_s*; None has not begun.

    True from ``since_s + span_s`` on, to the last bit: looks are planned for that sum, and
    ``now_s - since_s`` may be rounded to just below the span then.
    """
    return since_s is not None and now_s >= since_s + span_s


def linear_s(tries: int, step_s: float, *, u: float) -> float:
    """The wait after the *tries*-th failure (1-based): ``step_s x tries``, at most 10 % more."""
    return step_s * tries * (1 + 0.1 * u)


def exponential_s(tries: int, first_s: float, max_s: float, *, u: float) -> float:
    """The wait after the *tries*-th failure (1-based): doubling, capped, at most 10 % jitter.

    Returns:
      Seconds in (0, max_s], whatever *tries* is.

    """
    doubled = first_s * math.ldexp(1.0, min(tries - 1, 60))
    return min(max_s, doubled * (1 + 0.1 * u))


def window(setting: int | None, run_average_s: float | None) -> int:
    """How many of our prompts a server may hold at once.

    Args:
      setting: The configured number, or None for auto.
      run_average_s: Moving average of recent run times there; None when nothing is known.

    Returns:
      For auto: enough to keep it busy for 500 ms, from 2 (1 running, 1 waiting) to 16.

    """
    if setting is not None:
        return setting
    if run_average_s is None:
        return 2
    return max(2, min(16, 1 + math.ceil(0.5 / max(run_average_s, 0.001))))
