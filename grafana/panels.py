"""How things are drawn: a few kinds of panels, so that all boards look and read alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, prometheus, stat, statetimeline, table
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# The runbooks of the alerts, one page each: <RUNBOOKS>/<alert>.md. Whoever keeps them elsewhere
# changes this line and runs `make boards`.
RUNBOOKS: Final = "https://github.com/comfyd/comfyd/blob/main/docs/runbooks"

DATASOURCE: Final = look.DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN, YELLOW, ORANGE, RED, GREY, BLUE = "green", "yellow", "orange", "red", "#808080", "blue"

# Bars stand for what happened since the bar before, so no bar is shorter than this.
BAR: Final = "1m"

STAT_HEIGHT: Final = 4
GRAPH_HEIGHT: Final = 8

# From which value on a thing has which colour; None is where values begin, green if it is not said.
Steps = Sequence[tuple[float | None, str]]
Drawn = stat.Panel | lines.Panel | statetimeline.Panel | table.Panel
Panel = TypeVar("Panel", stat.Panel, lines.Panel, statetimeline.Panel, table.Panel)


class Query(NamedTuple):
    """A question to Prometheus, and the name of each answer, e.g. ``{{server}}``."""

    expr: str
    legend: str = ""


class About(NamedTuple):
    """What stands around a panel.

    Attributes:
      title: What is shown.
      text: What it means, and what to look for.
      width: Columns, of 24.
      runbooks: Alerts that fire on what is shown.

    """

    title: str
    text: str
    width: int
    runbooks: tuple[str, ...] = ()


def number(
    about: About, query: Query, unit: str, *, steps: Steps = (), empty: str = "no data"
) -> stat.Panel:
    """One large number as of now.

    Args:
      about: What stands around it.
      query: Asked once, for the end of the time range.
      unit: How Grafana writes it.
      steps: Its background; without any it has none.
      empty: What to write when there is no answer.

    """
    panel = _framed(stat.Panel(), about, [query], instant=True)
    if unit == "short":
        panel.decimals(0)  # increase() is seldom a whole number
    return (
        panel.unit(unit)
        .mappings([_nothing(empty)])
        .height(STAT_HEIGHT)
        .no_value(empty)
        .thresholds(_thresholds(steps))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .color_mode(look.BigValueColorMode.BACKGROUND if steps else look.BigValueColorMode.VALUE)
        .graph_mode(look.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def words(about: About, query: Query, meanings: Mapping[int, tuple[str, str]]) -> stat.Panel:
    """One word as of now: what each value means, and its colour."""
    panel = number(about, query, "none").mappings([_nothing("no data"), _meaning(meanings)])
    return panel.color_mode(look.BigValueColorMode.BACKGROUND)


def graph(
    about: About, queries: Sequence[Query], unit: str, *, steps: Steps = (), empty: str = ""
) -> lines.Panel:
    """Lines over time; *steps* are drawn as dashed lines, *empty* is said if there are none."""
    panel = _framed(lines.Panel(), about, queries)
    panel = (
        panel.unit(unit)
        .min(0)
        .height(GRAPH_HEIGHT)
        .line_width(1)
        .fill_opacity(8)
        .show_points(look.VisibilityMode.NEVER)
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(_legend())
        .tooltip(
            common.VizTooltipOptions()
            .mode(look.TooltipDisplayMode.MULTI)
            .sort(look.SortOrder.DESCENDING)
        )
    )
    if empty:
        panel.no_value(empty)
    if steps:
        mode = look.GraphThresholdsStyleMode.DASHED
        panel.thresholds(_thresholds(steps))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(mode))
    return panel


def stacked(about: About, queries: Sequence[Query], unit: str) -> lines.Panel:
    """Areas on top of each other: parts of a whole."""
    return _stack(graph(about, queries, unit).fill_opacity(60).line_width(0))


def bars(about: About, query: Query, *, empty: str = "None in this time range") -> lines.Panel:
    """Events, as many as the bars are high; an empty graph is good news."""
    panel = graph(about, [query], "short", empty=empty).interval(BAR).fill_opacity(80).line_width(0)
    return _stack(panel.draw_style(look.GraphDrawStyle.BARS))


def timeline(
    about: About, query: Query, meanings: Mapping[int, tuple[str, str]]
) -> statetimeline.Panel:
    """A band for each answer, in the colour of its state."""
    panel = _framed(statetimeline.Panel(), about, [query])
    return (
        panel.height(GRAPH_HEIGHT).mappings([_meaning(meanings)]).fill_opacity(80).legend(_legend())
    )


def listing(about: About, query: Query, columns: Mapping[str, str]) -> table.Panel:
    """A row for each series, as of now: the labels *columns*, under these heads."""
    panel = _framed(table.Panel(), about, [query], instant=True)
    how = {
        "excludeByName": dict.fromkeys(("Time", "Value", "__name__", "job"), True),
        "renameByName": dict(columns),
        "indexByName": {name: place for place, name in enumerate(columns)},
    }
    panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=how))
    return panel.unit("none").height(GRAPH_HEIGHT)


def coloured(panel: lines.Panel, colours: Mapping[str, str]) -> lines.Panel:
    """The same, but answers of these names always have these colours."""
    for name, colour in colours.items():
        fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel.override_by_name(name, [fixed])
    return panel


def row(title: str) -> build.Row:
    """A heading, as a question that the panels below answer."""
    return build.Row(title)


# --- pieces --------------------------------------------------------------------------------------


def _framed(
    panel: Panel, about: About, queries: Sequence[Query], *, instant: bool = False
) -> Panel:
    panel.title(about.title).description(about.text).span(about.width).datasource(DATASOURCE)
    if about.runbooks:
        panel.links([_runbook(alert) for alert in about.runbooks])
    for place, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id("ABCDEFGH"[place])
        target.datasource(DATASOURCE).legend_format(query.legend or "__auto")
        if instant:
            target.instant()
        else:
            target.range()
        if isinstance(panel, table.Panel):
            target.format(PromQueryFormat.TABLE)
        panel.with_target(target)
    return panel


def _runbook(alert: str) -> build.DashboardLink:
    link = build.DashboardLink(f"Runbook: {alert}").type(model.DashboardLinkType.LINK)
    return link.url(f"{RUNBOOKS}/{alert}.md").target_blank(True)


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(look.LegendDisplayMode.LIST)
        .placement(look.LegendPlacement.BOTTOM)
    )


def _stack(panel: lines.Panel) -> lines.Panel:
    return panel.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL).group("A"))


def _thresholds(steps: Steps) -> build.ThresholdsConfig:
    marks = [model.Threshold(value, colour) for value, colour in steps]
    if not marks or marks[0].value is not None:
        marks.insert(0, model.Threshold(None, GREEN))
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(marks)


def _nothing(text: str) -> model.SpecialValueMap:
    """Grey, or no answer would have the colour of the best one."""
    return model.SpecialValueMap(
        model.DashboardSpecialValueMapOptions(
            model.SpecialValueMatch.NULL_AND_NAN, model.ValueMappingResult(text=text, color=GREY)
        )
    )


def _meaning(meanings: Mapping[int, tuple[str, str]]) -> model.ValueMap:
    results = {
        str(value): model.ValueMappingResult(text=text, color=colour, index=place)
        for place, (value, (text, colour)) in enumerate(meanings.items())
    }
    return model.ValueMap(results)
