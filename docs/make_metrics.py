"""Makes docs/metrics.md from the code: ``python docs/make_metrics.py``.

Names, types, labels and their values are those declared in ``comfyd/metrics.py``. A test holds the
committed page to this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from comfyd.metrics import OTHER, RETRIES, SERVER, Family, Metrics

PAGE: Final = Path(__file__).with_name("metrics.md")


def _values(values: frozenset[str] | str) -> str:
    return values if isinstance(values, str) else ", ".join(sorted(values))


def _labels(family: Family) -> str:
    return "; ".join(
        f"`{name}`" if values == SERVER else f"`{name}`: {_values(values)}"
        for name, values in family.labels.items()
    )


def _table(heads: str, rows: list[tuple[str, ...]]) -> list[str]:
    names = heads.split()
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def page() -> str:
    """The whole page."""
    families = Metrics(CollectorRegistry()).families
    about = [(f"`{each.name}`", each.kind, each.text, _labels(each)) for each in families]
    retries = [(operation, ", ".join(sorted(reasons))) for operation, reasons in RETRIES.items()]
    lines = [
        "# The metrics of comfyd",
        "",
        "Made from the code by `python docs/make_metrics.py`; do not edit.",
        "",
        f"Names and meanings stay. `server` is {SERVER}. No label holds a job, a prompt, a file or"
        f" a URL. Where values are listed, whatever else might come is counted as `{OTHER}`, and"
        " every listed series exists at 0 from the start, so that it can be alerted on. A histogram"
        " has the usual `_bucket`, `_sum` and `_count`; seconds and bytes are the only units."
        " `process_*` and `python_info` are those of every Python program.",
        "",
        "A scraper that asks for OpenMetrics gets exemplars too: `comfyd_job_duration_seconds` and"
        " `comfyd_completion_latency_seconds` name, for each bucket, the last job that fell into it"
        " as `job_id`, for `comfyd show`. Prometheus keeps them with"
        " `--enable-feature=exemplar-storage`.",
        "",
        *_table("metric type meaning labels", about),
        "",
        "Of `comfyd_retries_total`, these pairs:",
        "",
        *_table("operation reason", retries),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
