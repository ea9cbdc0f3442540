"""How a gradwatch panel, variable and dashboard is made: the rules that hold for every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    BigValueTextMode,
    DataSourceRef,
    GraphDrawStyle,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import Dashboard as DashboardModel
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from gradwatch import conventions as names

DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG: Final = "gradwatch"

EXECUTIVE: Final = "gradwatch-executive"
ON_CALL: Final = "gradwatch-oncall"
DEBUG: Final = "gradwatch-debug"

# The labels that every dashboard filters by, widest first: each list narrows the next one.
FILTERS: Final = ("team", "tier", "training_job", "model", "dataset", "run_id")
METRIC_FILTER: Final = "metric"
# Team, model and data set may be unknown, and an objective need not be grouped by any of them: such series have
# the label empty, and `.+` would hide them.
ALL: Final = ".*"

JOB_LEGEND: Final = "{{training_job}} {{model}} {{dataset}}"
RUN_LEGEND: Final = "{{training_job}} {{run_id}}"

GridKind = Literal["stat", "timeseries", "table"]
AnyPanel = stat.Panel | timeseries.Panel | table.Panel


def equal(label: str, value: str) -> str:
    """A matcher for :func:`select`."""
    return f'{label}="{value}"'


def select(family: names.Family, *matchers: str) -> str:
    """The family's series within the dashboard's filters, as far as it has those labels."""
    filters = [f'{label}=~"${label}"' for label in FILTERS if label in family.labels]
    return f"{family.name}{{{', '.join((*matchers, *filters))}}}"


def newest(family: names.Family, *matchers: str) -> str:
    """The same, as one series for all replicas of the collector."""
    return over_replicas(select(family, *matchers))


def over_replicas(expr: str, how: Literal["max", "sum"] = "max") -> str:
    """Fold the replicas of the collector: ``max`` of what each knows in full, ``sum`` of what each counts."""
    return f"{how} without ({', '.join(names.REPLICA_LABELS)}) ({expr})"


def or_zero(expr: str) -> str:
    """Nothing counts as 0, but only while a collector is scraped: no data must not look like no trouble."""
    return f"{expr} or 0 * max({names.COLLECTOR_EVALUATED_TIMESTAMP.name})"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. ``legend`` names its series, or in a table its column; ``unit`` is the column's."""

    expr: str
    legend: str = ""
    unit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel. ``unit`` is Grafana's id; ``thresholds`` are (from, colour) above the colour ``base``."""

    kind: GridKind
    title: str
    description: str
    unit: str
    empty: str
    queries: tuple[Query, ...]
    width: int
    height: int = 8
    base: str = "green"
    thresholds: tuple[tuple[float, str], ...] = ()
    least: float | None = None
    most: float | None = None
    logarithmic: bool = False
    bars: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One dashboard: its address, whom it is for, the time it shows and its rows."""

    uid: str
    title: str
    description: str
    since: str
    refresh: str
    rows: tuple[Row, ...]
    metric_filter: bool = False
    findings: bool = False


def build(spec: Dashboard) -> DashboardModel:
    """Build a dashboard by the rules every one of them keeps."""
    builder = (
        dashboard.Dashboard(spec.title)
        .uid(spec.uid)
        .description(spec.description)
        .tags([TAG])
        .readonly()
        .time(spec.since, "now")
        .timezone("browser")
        .refresh(spec.refresh)
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("gradwatch")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for index, label in enumerate(FILTERS):
        builder.with_variable(_filter(label, FILTERS[:index]))
    if spec.metric_filter:
        builder.with_variable(_metric_filter())
    if spec.findings:
        builder.annotation(_findings())
    panel_id = 0
    for row in spec.rows:
        panel_id += 1
        builder.with_row(dashboard.Row(row.title).id(panel_id))
        for panel in row.panels:
            panel_id += 1
            builder.with_panel(_panel(panel).id(panel_id))
    return builder.build()


# --- Variables and annotations -------------------------------------------------------------------------


def _filter(label: str, wider: tuple[str, ...]) -> dashboard.QueryVariable:
    # Every job has RUNS_LIVE, 0 when it is idle; only runs that are live or sick have RUN_INFO.
    family = names.RUN_INFO if label == "run_id" else names.RUNS_LIVE
    chosen = ", ".join(f'{name}=~"${name}"' for name in wider)
    return _query_variable(label, f"label_values({family.name}{{{chosen}}}, {label})")


def _metric_filter() -> dashboard.QueryVariable:
    return _query_variable(METRIC_FILTER, f"label_values({select(names.LAST_METRIC)}, name)")


def _query_variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.replace("_", " "))
        .datasource(DATASOURCE)
        .query({"query": query, "refId": "A"})
        .definition(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _findings() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Findings")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("red")
        .expr(newest(names.FINDING_ACTIVE))
        .title_format("{{rule}} ({{severity}})")
        .text_format("{{training_job}} {{run_id}}")
        .tag_keys("rule,severity")
        .step("10s")
    )


# --- Panels --------------------------------------------------------------------------------------------


def _panel(spec: Panel) -> AnyPanel:
    panel = _KINDS[spec.kind](spec)
    steps = [Threshold(None, spec.base), *(Threshold(value, colour) for value, colour in spec.thresholds)]
    panel.title(spec.title).description(spec.description).unit(spec.unit).no_value(spec.empty)
    panel.datasource(DATASOURCE).span(spec.width).height(spec.height)
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if spec.least is not None:
        panel.min(spec.least)
    if spec.most is not None:
        panel.max(spec.most)
    for query, ref_id in zip(spec.queries, "ABCDEFGH", strict=False):
        target = prometheus.Dataquery().datasource(DATASOURCE).ref_id(ref_id).expr(query.expr)
        if spec.kind == "table":
            target.instant().format(PromQueryFormat.TABLE)
        elif spec.kind == "stat":
            target.instant().legend_format(query.legend)
        else:
            target.range().legend_format(query.legend)
        panel.with_target(target)
    return panel


def _stat(spec: Panel) -> stat.Panel:
    named = any(query.legend for query in spec.queries)
    return (
        stat.Panel()
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(BigValueTextMode.VALUE_AND_NAME if named else BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _timeseries(spec: Panel) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if spec.thresholds:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    if spec.logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if spec.bars:
        panel.draw_style(GraphDrawStyle.BARS).fill_opacity(70)
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return panel


def _table(spec: Panel) -> table.Panel:
    """One row for each set of labels; the queries' values are columns named by their legends."""
    only = len(spec.queries) == 1
    columns = {
        "Value" if only else f"Value #{ref_id}": query
        for query, ref_id in zip(spec.queries, "ABCDEFGH", strict=False)
    }
    hidden = {"Time": True, **{column: True for column, query in columns.items() if not query.legend}}
    shown = {column: query.legend for column, query in columns.items() if query.legend}
    panel = (
        table.Panel()
        .show_header(True)
        .with_transformation(DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            DataTransformerConfig(
                id_val="organize", options={"excludeByName": hidden, "renameByName": shown, "indexByName": {}}
            )
        )
        .override_by_name("run_id", [DynamicConfigValue("links", [_RUN_LINK])])
    )
    for query in spec.queries:
        if query.legend and query.unit:
            panel.override_by_name(query.legend, [DynamicConfigValue("unit", query.unit)])
    return panel


_RUN_LINK: Final = {
    "title": "Debug this run",
    "url": f"/d/{DEBUG}?var-run_id=${{__value.raw:percentencode}}&${{__url_time_range}}"
    "&var-datasource=${datasource}",
}
_KINDS: Final[Mapping[GridKind, Callable[[Panel], AnyPanel]]] = {
    "stat": _stat,
    "timeseries": _timeseries,
    "table": _table,
}
