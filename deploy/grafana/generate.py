"""Writes the Grafana dashboards: `python deploy/grafana/generate.py`, after a change in here.

`service` shows what Prometheus scrapes, `runs` what the SQL views of docs/views.md say. With
`--check` nothing is written: the exit status is 1 where a file is not what it would be.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder, variants
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import Row, Show
from runs import RUNS, WORKSPACES
from service import SERVICE

FOLDER: Final = Path(__file__).parent / "dashboards"
PROMETHEUS: Final = "prometheus"
POSTGRES: Final = "grafana-postgresql-datasource"
GREEN, AMBER, RED = "green", "orange", "red"
SOURCE: Final = "${datasource}"

Query = builder.Builder[variants.Dataquery]
Panel = stat.Panel | timeseries.Panel | table.Panel


class SqlQuery(variants.Dataquery):
    """A query to PostgreSQL, for which the SDK has no type of its own."""

    def __init__(self, sql: str, ref_id: str, *, over_time: bool) -> None:
        self.sql = sql
        self.ref_id = ref_id
        self.over_time = over_time

    def to_json(self) -> dict[str, object]:
        """The JSON that Grafana stores."""
        return {
            "datasource": {"type": POSTGRES, "uid": SOURCE},
            "editorMode": "code",
            "format": "time_series" if self.over_time else "table",
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": self.ref_id,
        }


class Made(builder.Builder[variants.Dataquery]):
    """A finished query, as a builder."""

    def __init__(self, query: variants.Dataquery) -> None:
        self._query = query

    def build(self) -> variants.Dataquery:
        """The query."""
        return self._query


def sql_queries(show: Show) -> Iterator[Query]:
    """The queries of a panel to PostgreSQL."""
    for ref_id, (sql, _) in zip("ABCD", show.queries, strict=False):
        yield Made(SqlQuery(sql, ref_id, over_time=show.kind in ("lines", "bars")))


def prometheus_queries(show: Show) -> Iterator[Query]:
    """The queries of a panel to Prometheus."""
    for ref_id, (expression, legend) in zip("ABCD", show.queries, strict=False):
        query = (
            prometheus.Dataquery()
            .expr(expression)
            .ref_id(ref_id)
            .datasource(source(PROMETHEUS))
            .format(PromQueryFormat.TIME_SERIES)
        )
        yield query.instant() if show.kind == "stat" else query.range().legend_format(legend)


def source(kind: str) -> model.DataSourceRef:
    """The data source chosen in the dashboard."""
    return model.DataSourceRef(type_val=kind, uid=SOURCE)


def panel(show: Show, kind: str, queries: Callable[[Show], Iterator[Query]]) -> Panel:
    """One panel with its queries."""
    made = _MAKERS[show.kind](show)
    made.title(show.title).description(show.about).unit(show.unit)
    made.datasource(source(kind)).span(show.width).height(4 if show.kind == "stat" else 8)
    if show.decimals is not None:
        made.decimals(show.decimals)
    for query in queries(show):
        made.with_target(query)
    return made


def _stat(show: Show) -> stat.Panel:
    made = (
        stat.Panel()
        .graph_mode(looks.BigValueGraphMode.NONE)
        .color_mode(looks.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("–")
    )
    steps = [model.Threshold(color=GREEN, value=None)]
    for colour, value in zip((AMBER, RED), show.limits, strict=True):
        if value is not None:
            steps.append(model.Threshold(color=colour, value=value))
    made.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    if show.words:
        named = {
            number: model.ValueMappingResult(text=word, color=colour)
            for number, (word, colour) in show.words.items()
        }
        made.mappings([model.ValueMap(options=named)])
    return made


def _lines(show: Show) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(8)
        .show_points(looks.VisibilityMode.AUTO)
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.LIST)
            .placement(looks.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    return made if show.most is None else made.max(show.most)


def _bars(show: Show) -> timeseries.Panel:
    return (
        _lines(show)
        .draw_style(looks.GraphDrawStyle.BARS)
        .fill_opacity(70)
        .stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL))
    )


LINKS: Final = {"run_id": "runs", "delivery_id": "deliveries", "technique_id": "techniques"}
"""The tracker's page of each value in a column of this name."""


def _table(show: Show) -> table.Panel:
    made = table.Panel().show_header(True).cell_height(looks.TableCellHeight.SM)
    for column, page in LINKS.items():
        if any(re.search(rf"\b{column}\b", sql) for sql, _ in show.queries):
            url = f"${{tracker}}/{page}/${{__value.raw:percentencode}}"
            link = {"title": "Open in the tracker", "url": url, "targetBlank": True}
            made.override_by_name(column, [model.DynamicConfigValue("links", [link])])
    return made


_MAKERS: Final[dict[str, Callable[[Show], Panel]]] = {
    "stat": _stat,
    "lines": _lines,
    "bars": _bars,
    "table": _table,
}


def page(
    *,
    uid: str,
    title: str,
    about: str,
    kind: str,
    rows: tuple[Row, ...],
    queries: Callable[[Show], Iterator[Query]],
    workspaces: str,
    every_workspace: str | None = None,
    every: str,
    span: str,
) -> dashboard.Dashboard:
    """One dashboard."""
    chosen = (
        dashboard.QueryVariable("workspace")
        .label("Workspace")
        .datasource(source(kind))
        .query(workspaces)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )
    if every_workspace is not None:
        chosen.all_value(every_workspace)
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["flora-run-tracker"])
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .refresh(every)
        .time(span, "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Source").type(kind))
        .with_variable(chosen)
        .link(
            dashboard.DashboardLink("FLORA run tracker")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["flora-run-tracker"])
            .as_dropdown(False)
            .include_vars(False)
            .keep_time(True)
        )
    )
    if kind == POSTGRES:
        made.with_variable(
            dashboard.TextBoxVariable("tracker")
            .label("Tracker")
            .description("Address of the tracker's pages, to which ids in tables are linked.")
            .default_value("http://localhost:8080")
        )
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for show in row.panels:
            made.with_panel(panel(show, kind, queries))
    return made


def dashboards() -> dict[str, str]:
    """The files by name."""
    service = page(
        uid="flora-tracker-service",
        title="FLORA run tracker: service",
        about="The tracker's processes, from Prometheus: docs/metrics.md.",
        kind=PROMETHEUS,
        rows=SERVICE,
        queries=prometheus_queries,
        workspaces="label_values(tracker_runs, workspace_id)",
        every_workspace=".*",  # before there are runs, too
        every="30s",
        span="now-6h",
    )
    runs = page(
        uid="flora-tracker-runs",
        title="FLORA run tracker: runs",
        about="Finished runs, callbacks and cost, from the SQL views: docs/views.md.",
        kind=POSTGRES,
        rows=RUNS,
        queries=sql_queries,
        workspaces=WORKSPACES,
        every="1m",
        span="now-7d",
    )
    return {"service.json": _json(service), "runs.json": _json(runs)}


def _json(made: dashboard.Dashboard) -> str:
    built: Any = made.build()
    for number, one in enumerate(built.panels, 1):
        one.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files, or compare them."""
    check = arguments == ["--check"]
    stale = []
    for name, text in dashboards().items():
        path = FOLDER / name
        if check and not (path.exists() and path.read_text(encoding="utf-8") == text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not what generate.py makes: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
