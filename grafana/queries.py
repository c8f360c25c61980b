"""The pieces of PromQL that the panels share.

The boards ask for the metrics of ``comfyd/metrics.py`` alone, not for recorded ones, so they work
with any Prometheus that scrapes comfyd. Every selector follows the boards' variables.
"""

from __future__ import annotations

from typing import Final

# What Grafana makes of the range and resolution of a panel: long enough for four scrapes.
LATELY: Final = "$__rate_interval"


def daemon(metric: str, *matchers: str) -> str:
    """The series of *metric* of the chosen daemons."""
    everything = ", ".join(('job=~"$job"', 'instance=~"$instance"', *matchers))
    return f"{metric}{{{everything}}}"


def of_comfyd(expr: str) -> str:
    """*expr* about metrics that other programs have, too: of what was comfyd within a day."""
    known = f"last_over_time({daemon('comfyd_build_info')}[1d])"
    return f"({expr} and on (job, instance) {known})"


def server(metric: str, *matchers: str) -> str:
    """The series of *metric* of the chosen servers of the chosen daemons."""
    return daemon(metric, 'server=~"$server"', *matchers)


def total(selector: str, by: str = "") -> str:
    """The sum, for each value of the labels *by*."""
    return f"sum by ({by}) ({selector})" if by else f"sum({selector})"


def largest(selector: str, by: str = "") -> str:
    """The largest, for each value of the labels *by*."""
    return f"max by ({by}) ({selector})" if by else f"max({selector})"


def smallest(selector: str) -> str:
    """The smallest."""
    return f"min({selector})"


def per_second(counter: str, by: str = "") -> str:
    """How fast *counter* grows."""
    return total(f"rate({counter}[{LATELY}])", by)


def per_minute(counter: str, by: str = "") -> str:
    """How fast *counter* grows."""
    return f"60 * {per_second(counter, by)}"


def events(counter: str, by: str) -> str:
    """How often it happened around each point of the graph; nothing where it did not happen.

    So a graph of rare events shows them and no lines along zero.
    """
    return f"{total(f'increase({counter}[{LATELY}])', by)} > 0"


def within(counter: str, span: str, by: str = "") -> str:
    """How often it happened in the last *span*, whatever the graph shows."""
    return total(f"increase({counter}[{span}])", by)


def quantile(share: float, histogram: str, by: str = "", *matchers: str) -> str:
    """The value of *histogram* that *share* (0 to 1) of the observations do not exceed."""
    buckets = per_second(daemon(f"{histogram}_bucket", *matchers), f"{by}, le" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


def mean(histogram: str, by: str = "", *matchers: str) -> str:
    """The mean of the observations; nothing where there are none."""
    sums = per_second(daemon(f"{histogram}_sum", *matchers), by)
    counts = per_second(daemon(f"{histogram}_count", *matchers), by)
    return f"{sums} / ({counts} > 0)"
