"""The rules of Grafana's dashboard-linter, and ours: each function yields what is wrong.

Its rules for LogQL are left out (there is none); its name for each of the others stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any, Final

import promql_parser as promql
from grafana_foundation_sdk.models import units
from prometheus_client import CollectorRegistry

from comfyd.metrics import OTHER, Family, Metrics

Json = dict[str, Any]
Rule = Callable[[Json], Iterator[str]]

COLUMNS: Final = 24
UNITS: Final = {value for name, value in vars(units).items() if name[0].isupper()}
RATE_INTERVAL: Final = "4321s"  # in place of the variable: a range that nobody would write
DATASOURCES: Final = {"$datasource", "${datasource}"}
# Labels that Prometheus adds by itself, or that a histogram's buckets have.
SCRAPED: Final = {"job", "instance"}
SUFFIXES: Final = {"counter": {""}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}


def panels(board: Json) -> list[Json]:
    """The panels of *board* that show something: rows are none."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def variables(board: Json) -> dict[str, Json]:
    return {each["name"]: each for each in board["templating"]["list"]}


def queries(board: Json) -> list[tuple[str, str]]:
    """Where each query stands, and the query, of panels, annotations and variables."""
    asked = [
        (panel["title"], target["expr"]) for panel in panels(board) for target in panel["targets"]
    ]
    asked += [(mark["name"], mark["target"]["expr"]) for mark in board["annotations"]["list"]]
    for name, each in variables(board).items():
        if each["type"] == "query":
            asked.append((name, re.sub(r"label_values\((.*), \w+\)", r"\1", each["query"])))
    return asked


def nodes(query: str) -> list[promql.Expr]:
    """Every part of *query*."""
    found: list[promql.Expr] = []
    promql.walk(promql.parse(query.replace("$__rate_interval", RATE_INTERVAL)), found.append)
    return found


def selectors(query: str) -> list[promql.VectorSelector]:
    return [node for node in nodes(query) if isinstance(node, promql.VectorSelector)]


def matchers(selector: promql.VectorSelector) -> list[promql.Matcher]:
    return selector.matchers.matchers


def said(matcher: promql.Matcher) -> set[str]:
    """The values that *matcher* names; none, if it is a variable."""
    return set() if matcher.value.startswith("$") else set(matcher.value.split("|"))


def groups(aggregate: promql.AggregateExpr) -> set[str]:
    """The labels that *aggregate* keeps."""
    return set(aggregate.modifier.labels) if aggregate.modifier is not None else set()


# --- dashboard-linter ----------------------------------------------------------------------------


def template_datasource(board: Json) -> Iterator[str]:
    """template-datasource-rule."""
    sources = [each for each in variables(board).values() if each["type"] == "datasource"]
    if [(each["name"], each["label"], each["query"]) for each in sources] != [
        ("datasource", "Data source", "prometheus")
    ]:
        yield "there must be one data source variable, and of its usual name"


def template_job_and_instance(board: Json) -> Iterator[str]:
    """template-job-rule, template-instance-rule; asked of every other variable too."""
    choices = {n: each for n, each in variables(board).items() if each["type"] != "datasource"}
    for name in {"job", "instance"} - choices.keys():
        yield f"${name} is missing"
    for name, each in choices.items():
        if each["type"] != "query" or each["datasource"]["uid"] not in DATASOURCES:
            yield f"${name} must be a query to the chosen data source"
        if (each["label"], each["multi"], each["allValue"]) != (name.capitalize(), True, ".+"):
            yield f"${name} must have its name for a label, take several, and .+ for all"


def template_label_promql(board: Json) -> Iterator[str]:
    """template-label-promql-rule."""
    for name, each in variables(board).items():
        if each["type"] == "query" and not re.fullmatch(r"label_values\(.*, \w+\)", each["query"]):
            yield f"${name} is no label_values(SELECTOR, LABEL)"


def template_reload(board: Json) -> Iterator[str]:
    """template-on-time-change-reload-rule."""
    for name, each in variables(board).items():
        if each["type"] == "query" and each["refresh"] != 2:
            yield f"${name} is not asked again when the time range changes"


def uneditable(board: Json) -> Iterator[str]:
    """uneditable-dashboard."""
    if board["editable"]:
        yield "it can be edited, and the next update would undo that"


def panel_datasource(board: Json) -> Iterator[str]:
    """panel-datasource-rule; asked of queries and annotations too."""
    for panel in panels(board):
        for each in [panel, *panel["targets"]]:
            if each["datasource"]["uid"] not in DATASOURCES:
                yield f"{panel['title']}: does not ask the chosen data source"
    for mark in board["annotations"]["list"]:
        if mark["datasource"]["uid"] not in DATASOURCES:
            yield f"{mark['name']}: does not ask the chosen data source"


def panel_title_and_description(board: Json) -> Iterator[str]:
    """panel-title-description-rule."""
    for panel in panels(board):
        if not panel.get("title") or not panel.get("description"):
            yield f"panel {panel['id']} has no title or no description"


def panel_units(board: Json) -> Iterator[str]:
    """panel-units-rule."""
    for panel in panels(board):
        defaults = panel["fieldConfig"]["defaults"]
        meanings = {each["type"] for each in defaults.get("mappings") or []}
        if "value" not in meanings and defaults.get("unit") not in UNITS:
            yield f"{panel['title']}: has no unit that Grafana knows"


def panel_targets(board: Json) -> Iterator[str]:
    """panel-no-targets-rule."""
    for panel in panels(board):
        if not panel["targets"]:
            yield f"{panel['title']}: asks for nothing"


def target_promql(board: Json) -> Iterator[str]:
    """target-promql-rule."""
    for where, query in queries(board):
        try:
            nodes(query)
        except (ValueError, KeyError) as error:
            yield f"{where}: {error}"


def target_rate_interval(board: Json) -> Iterator[str]:
    """target-rate-interval-rule."""
    usual = promql.parse_duration(RATE_INTERVAL)
    for where, query in queries(board):
        for node in nodes(query):
            if isinstance(node, promql.Call) and node.func.name in {"rate", "irate"}:
                ranges: list[timedelta] = [each.range for each in node.args]
                if ranges != [usual]:
                    yield f"{where}: {node.func.name}() must be over $__rate_interval"


def target_job_and_instance(board: Json) -> Iterator[str]:
    """target-job-rule, target-instance-rule; variables choose them, so they are not asked."""
    for where, query in queries(board):
        if where in variables(board):
            continue
        for selector in selectors(query):
            for name in ("job", "instance"):
                if f'{name}=~"${name}"' not in map(str, matchers(selector)):
                    yield f'{where}: {selector.name} is not matched by {name}=~"${name}"'


def target_counter_agg(board: Json) -> Iterator[str]:
    """target-counter-agg-rule."""
    for where, query in queries(board):
        growing = [
            each.vector_selector.name
            for node in nodes(query)
            if isinstance(node, promql.Call) and node.func.name in {"rate", "irate", "increase"}
            for each in node.args
        ]
        for selector in selectors(query):
            if str(selector.name).endswith("_total"):
                if selector.name not in growing:
                    yield f"{where}: {selector.name} is a counter and wants rate or increase"
                else:
                    growing.remove(selector.name)


# --- ours ----------------------------------------------------------------------------------------


def families() -> dict[str, Family]:
    """What comfyd declares, by the names that a scrape has."""
    declared = Metrics(CollectorRegistry()).families
    return {each.name + suffix: each for each in declared for suffix in SUFFIXES[each.kind]}


def foreign() -> dict[str, Family]:
    """What a scrape has besides: the client library's, and Prometheus' own."""
    registry = CollectorRegistry()
    Metrics(registry)
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    process = {name for name in names if name.startswith("process_")}
    return {name: Family(name, "", "", {}, None) for name in {*process, "up"}}  # type: ignore[arg-type]


def known_metrics(board: Json) -> Iterator[str]:
    """Every metric is one of comfyd's, with labels and values that it has."""
    known = families() | foreign()
    for where, query in queries(board):
        for selector in selectors(query):
            name = str(selector.name)
            if name not in known:
                yield f"{where}: there is no metric {name}"
                continue
            labels = known[name].labels
            for matcher in matchers(selector):
                label = matcher.name
                if label in SCRAPED or (label == "le" and name.endswith("_bucket")):
                    continue
                if label not in labels:
                    yield f"{where}: {name} has no label {label}"
                    continue
                values = labels[label]
                if not isinstance(values, str) and not said(matcher) <= {*values, OTHER}:
                    yield f"{where}: {name} has no {label} {matcher.value}"


def known_groups(board: Json) -> Iterator[str]:
    """Every label that is summed by is one that the metrics have."""
    known = families() | foreign()
    for where, query in queries(board):
        for node in nodes(query):
            if isinstance(node, promql.AggregateExpr):
                for selector in selectors(str(node)):
                    name = str(selector.name)
                    there = {*known[name].labels, *SCRAPED, "le"}
                    for label in groups(node) - there:
                        yield f"{where}: {name} has no label {label}"


def known_legends(board: Json) -> Iterator[str]:
    """Every label in a legend is one that the answers have."""
    known = families() | foreign()
    for panel in panels(board):
        for target in panel["targets"]:
            parts = nodes(target["expr"])
            sums = [groups(part) for part in parts if isinstance(part, promql.AggregateExpr)]
            series = [
                {*known[str(part.name)].labels, *SCRAPED}
                for part in parts
                if isinstance(part, promql.VectorSelector)
            ]
            there = [*sums, *series][0]
            for label in set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - there:
                yield f"{panel['title']}: no answer has a label {label}"


def follows_the_server(board: Json) -> Iterator[str]:
    """Where one chooses servers, all that is told of servers follows the choice."""
    known = families() | foreign()
    chosen = "server" in variables(board)
    for where, query in queries(board):
        for selector in selectors(query):
            can = "server" in known[str(selector.name)].labels and where not in variables(board)
            follows = 'server=~"$server"' in map(str, matchers(selector))
            if follows != (can and chosen):
                yield f"{where}: {selector.name} follows $server where it cannot, or does not"


def layout(board: Json) -> Iterator[str]:
    """Lines of 24 columns without holes or overlaps; each panel's number is its own."""
    ids = [panel["id"] for panel in board["panels"]]
    if sorted(ids) != list(range(1, len(ids) + 1)):
        yield "panels share a number"
    lines: dict[int, list[Json]] = {}
    for panel in board["panels"]:
        lines.setdefault(panel["gridPos"]["y"], []).append(panel)
    for y, line in lines.items():
        places = [panel["gridPos"] for panel in line]
        if places[0]["x"] != 0 or places[-1]["x"] + places[-1]["w"] != COLUMNS:
            yield f"the line at {y} has not {COLUMNS} columns"
        if any(a["x"] + a["w"] != b["x"] for a, b in pairwise(places)):
            yield f"the line at {y} has holes or overlaps"
        if len({place["h"] for place in places}) > 1:
            yield f"the line at {y} has panels of several heights"
    for (y, line), (below, _) in pairwise(lines.items()):
        if y + line[0]["gridPos"]["h"] != below:
            yield f"the lines at {y} and {below} do not meet"


LINTER: Final[tuple[Rule, ...]] = (
    template_datasource, template_job_and_instance, template_label_promql, template_reload,
    uneditable, panel_datasource, panel_title_and_description, panel_units, panel_targets,
    target_promql, target_rate_interval, target_job_and_instance, target_counter_agg,
)  # fmt: skip
OURS: Final[tuple[Rule, ...]] = (
    known_metrics, known_groups, known_legends, follows_the_server, layout,
)  # fmt: skip
