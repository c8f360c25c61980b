"""What every dashboard has: its variables, its annotations, and links to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.models import dashboard as model

from grafana.panels import BLUE, DATASOURCE, ORANGE, RED, RUNBOOKS, Drawn
from grafana.queries import LATELY, daemon, largest, of_comfyd, server

TAG: Final = "comfyd"

Content = build.Row | Drawn


def board(name: str, text: str, contents: Sequence[Content], *, servers: bool) -> build.Dashboard:
    """A dashboard with *contents*, which are laid out line by line in 24 columns.

    Args:
      name: The part of its title and uid that is its own.
      text: The question it answers.
      contents: Rows and the panels below them; the panels of a line have 24 columns together.
      servers: Whether one chooses servers; a board without tells of all.

    """
    made = build.Dashboard(f"comfyd / {name}").uid(f"comfyd-{name.lower()}").description(text)
    made.tags([TAG]).readonly().timezone("browser").refresh("30s").time("now-6h", "now")
    made.tooltip(model.DashboardCursorSync.CROSSHAIR)
    made.with_variable(
        build.DatasourceVariable("datasource").label("Data source").type("prometheus")
    )
    made.with_variable(_choice("job", "label_values(comfyd_build_info, job)"))
    made.with_variable(
        _choice("instance", 'label_values(comfyd_build_info{job=~"$job"}, instance)')
    )
    if servers:
        names = f"label_values({daemon('comfyd_server_up')}, server)"
        made.with_variable(_choice("server", names))
    for mark in _annotations(servers=servers):
        made.annotation(mark)
    made.link(
        build.DashboardLink("comfyd boards")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
    )
    made.link(
        build.DashboardLink("Runbooks")
        .type(model.DashboardLinkType.LINK)
        .url(RUNBOOKS)
        .icon("doc")
        .tooltip("What each alert means, and what to do")
        .target_blank(True)
    )
    for number, each in enumerate(contents, start=1):
        each.id(number)
        if isinstance(each, build.Row):
            made.with_row(each)
        else:
            made.with_panel(each)
    return made


def _choice(name: str, query: str) -> build.QueryVariable:
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return (
        build.QueryVariable(name)
        .label(name.capitalize())
        .query(query)
        .datasource(DATASOURCE)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(everything)
    )


def _annotations(*, servers: bool) -> list[build.AnnotationQuery]:
    started = daemon("process_start_time_seconds")
    read = daemon("comfyd_config_last_reload_success_timestamp_seconds")
    health = server("comfyd_server_up") if servers else daemon("comfyd_server_up")
    return [
        # After a long stop nothing is left of the old process to compare the new one with.
        _mark(
            "comfyd started",
            BLUE,
            largest(
                of_comfyd(
                    f"(changes({started}[{LATELY}]) > 0"
                    f" or {started} unless {started} offset {LATELY})"
                ),
                "instance",
            ),
            "{{instance}}",
        ),
        _mark(
            "Configuration read again",
            ORANGE,
            f"(changes({read}[{LATELY}]) > 0) unless (changes({started}[{LATELY}]) > 0)",
            "{{instance}}",
        ),
        _mark("Server does not answer", RED, f"1 - {health} > 0", "{{server}} of {{instance}}"),
    ]


def _mark(title: str, colour: str, expr: str, text: str) -> build.AnnotationQuery:
    target = prometheus.Dataquery().expr(expr).ref_id("Anno").datasource(DATASOURCE).range()
    return (
        build.AnnotationQuery()
        .name(title)
        .datasource(DATASOURCE)
        .icon_color(colour)
        .target(target)
        .expr(expr)
        .title_format(title)
        .text_format(text)
    )
