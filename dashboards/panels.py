"""How a gradwatch panel and dashboard is made: the rules that hold for every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import postgres
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BigValueGraphMode,
    BigValueTextMode,
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
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from links import of_alert, of_rule, of_run, rule_names
from variables import (
    PROMETHEUS_DATASOURCE,
    addresses,
    data_sources,
    epoch_steps,
    filters,
    metric_filter,
    select,
    stored_filters,
)

from gradwatch import conventions as names

TAG: Final = "gradwatch"

JOB_LEGEND: Final = "{{training_job}} {{model}} {{dataset}}"
RUN_LEGEND: Final = "{{training_job}} {{run_id}}"

# What the heat map's columns are called once a query's rows have become a matrix.
STEP_COLUMN: Final = "step"
LAYER_COLUMN: Final = "layer"
NORM_COLUMN: Final = "norm"

_BELOW_ALL: Final = -1000

PanelKind = Literal["stat", "timeseries", "table", "heatmap"]
AnyPanel = stat.Panel | timeseries.Panel | table.Panel | heatmap.Panel


def equal(label: str, value: str) -> str:
    """A matcher for :func:`select`."""
    return f'{label}="{value}"'


def newest(family: names.Family, *matchers: str) -> str:
    """The family's series, as one for all replicas of the collector."""
    return over_replicas(select(family, *matchers))


def over_replicas(expr: str, how: Literal["max", "sum"] = "max") -> str:
    """Fold the replicas of the collector: ``max`` of what each knows in full, ``sum`` of what each counts."""
    return f"{how} without ({', '.join(names.REPLICA_LABELS)}) ({expr})"


def or_zero(expr: str) -> str:
    """Nothing counts as 0, but only while a collector is scraped: no data must not look like no trouble."""
    return f"{expr} or 0 * max({names.COLLECTOR_EVALUATED_TIMESTAMP.name})"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of Prometheus. ``legend`` names its series, or in a table its column, of that ``unit``."""

    expr: str
    legend: str = ""
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Sql:
    """One query of PostgreSQL. ``legend`` names its series by their labels; ``units`` are those of columns."""

    sql: str
    legend: str = ""
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel. ``unit`` is Grafana's id; ``thresholds`` are (from, colour) above the colour ``base``.

    ``runbook``: the alert about what it shows, whose runbook it leads to. ``colours``: of texts that it shows.
    """

    kind: PanelKind
    title: str
    description: str
    unit: str
    empty: str
    queries: tuple[Query, ...] | tuple[Sql, ...]
    width: int
    height: int = 8
    base: str = "green"
    thresholds: tuple[tuple[float, str], ...] = ()
    least: float | None = None
    most: float | None = None
    logarithmic: bool = False
    bars: bool = False
    runbook: str | None = None
    colours: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """Marks on the time lines. An SQL query has columns ``time``, ``text`` and ``tags``."""

    name: str
    colour: str
    query: Query | Sql


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One dashboard: its address, whom it is for, the time it shows and its rows.

    ``stored``: its filters offer every run that is stored. ``metrics``, ``epochs``: it asks for these as well.
    """

    uid: str
    title: str
    description: str
    since: str
    refresh: str
    rows: tuple[Row, ...]
    annotations: tuple[Annotation, ...] = ()
    stored: bool = False
    metrics: bool = False
    epochs: bool = False


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
    )
    for variable in (
        *data_sources(),
        *(stored_filters() if spec.stored else filters()),
        *([metric_filter()] if spec.metrics else []),
        *([epoch_steps()] if spec.epochs else []),
        *addresses(),
    ):
        builder.with_variable(variable)
    for annotation in spec.annotations:
        builder.annotation(_annotation(annotation))
    panel_id = 0
    for row in spec.rows:
        panel_id += 1
        builder.with_row(dashboard.Row(row.title).id(panel_id))
        for panel in row.panels:
            panel_id += 1
            builder.with_panel(_panel(panel).id(panel_id))
    return builder.build()


def _annotation(spec: Annotation) -> dashboard.AnnotationQuery:
    annotation = dashboard.AnnotationQuery().name(spec.name).enable(True).icon_color(spec.colour)
    if isinstance(spec.query, Sql):
        query = postgres.SqlQuery(spec.query.sql, spec.name, "table")
        return annotation.datasource(postgres.DATASOURCE).target(query)
    return (
        annotation.datasource(PROMETHEUS_DATASOURCE)
        .expr(spec.query.expr)
        .title_format(spec.query.legend)
        .text_format(RUN_LEGEND)
        .tag_keys("rule,severity")
        .step("10s")
    )


# --- Panels --------------------------------------------------------------------------------------------


def _panel(spec: Panel) -> AnyPanel:
    panel = _KINDS[spec.kind](spec)
    steps = [Threshold(None, spec.base), *(Threshold(value, colour) for value, colour in spec.thresholds)]
    panel.title(spec.title).description(spec.description).unit(spec.unit).no_value(spec.empty)
    panel.span(spec.width).height(spec.height)
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if spec.least is not None:
        panel.min(spec.least)
    if spec.most is not None:
        panel.max(spec.most)
    if spec.runbook is not None:
        runbook = dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK).url(of_alert(spec.runbook))
        panel.links([runbook.target_blank(True)])
    queries: Sequence[Query | Sql] = spec.queries
    for query, ref_id in zip(queries, "ABCDEFGH", strict=False):
        panel.with_target(_target(spec, query, ref_id))
    is_sql = isinstance(spec.queries[0], Sql)
    panel.datasource(postgres.DATASOURCE if is_sql else PROMETHEUS_DATASOURCE)
    return panel


def _target(spec: Panel, query: Query | Sql, ref_id: str) -> Builder[Dataquery]:
    if isinstance(query, Sql):
        return postgres.SqlQuery(query.sql, ref_id, "time_series" if spec.kind == "timeseries" else "table")
    target = prometheus.Dataquery().datasource(PROMETHEUS_DATASOURCE).ref_id(ref_id).expr(query.expr)
    if spec.kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    return (target.instant() if spec.kind == "stat" else target.range()).legend_format(query.legend)


def _stat(spec: Panel) -> stat.Panel:
    named = any(query.legend for query in spec.queries)
    shown = common.ReduceDataOptions().calcs(["lastNotNull"])
    if spec.unit == "string":
        shown.fields("/.*/")  # numbers only unless told
    panel = (
        stat.Panel()
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(BigValueTextMode.VALUE_AND_NAME if named else BigValueTextMode.VALUE)
        .reduce_options(shown)
    )
    if spec.colours:
        mapping = _mapping({text: {"color": colour} for text, colour in spec.colours})
        panel.override_by_regexp(".*", [DynamicConfigValue("mappings", [mapping])])
    return panel


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
    legend = next((query.legend for query in spec.queries if query.legend), "")
    if isinstance(spec.queries[0], Sql) and legend:
        panel.display_name(legend)
    if "run_id" in legend:
        of_this = of_run("${__field.labels.run_id:percentencode}")
        panel.override_by_field_type("number", [DynamicConfigValue("links", of_this)])
    return panel


def _table(spec: Panel) -> table.Panel:
    """A query's rows as they are; of Prometheus one for each set of labels, queries' values as columns."""
    panel = table.Panel().show_header(True)
    units: dict[str, str] = {}
    for query in spec.queries:
        if isinstance(query, Sql):
            units |= dict(query.units)
        elif query.legend and query.unit:
            units[query.legend] = query.unit
    if not isinstance(spec.queries[0], Sql):
        _as_one_table(panel, [query for query in spec.queries if isinstance(query, Query)])
    panel.override_by_name(
        "run_id", [DynamicConfigValue("links", of_run("${__value.raw:percentencode}"))]
    ).override_by_name(
        "rule",
        [
            DynamicConfigValue("mappings", [_mapping(rule_names())]),
            DynamicConfigValue("links", [of_rule()]),
        ],
    )
    for column, unit in units.items():
        panel.override_by_name(column, [DynamicConfigValue("unit", unit)])
    return panel


def _as_one_table(panel: table.Panel, queries: list[Query]) -> None:
    only = len(queries) == 1
    columns = {
        "Value" if only else f"Value #{ref_id}": query
        for query, ref_id in zip(queries, "ABCDEFGH", strict=False)
    }
    hidden = {"Time": True, **{column: True for column, query in columns.items() if not query.legend}}
    shown = {column: query.legend for column, query in columns.items() if query.legend}
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={})).with_transformation(
        DataTransformerConfig(
            id_val="organize", options={"excludeByName": hidden, "renameByName": shown, "indexByName": {}}
        )
    )


def _heatmap(spec: Panel) -> heatmap.Panel:
    """Layers over steps, of a query with the columns step, layer and norm."""
    return (
        heatmap.Panel()
        .with_transformation(
            DataTransformerConfig(
                id_val="groupingToMatrix",
                options={
                    "rowField": STEP_COLUMN,
                    "columnField": LAYER_COLUMN,
                    "valueField": NORM_COLUMN,
                    "emptyValue": "null",
                },
            )
        )
        # The first field of a matrix is text, whatever it was, and its name is of both.
        .with_transformation(
            DataTransformerConfig(
                id_val="convertFieldType",
                options={
                    "fields": {},
                    "conversions": [
                        {"targetField": rf"{STEP_COLUMN}\{LAYER_COLUMN}", "destinationType": "number"}
                    ],
                },
            )
        )
        .calculate(False)
        .cell_gap(0)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64))
        # What is not above 1e-9 would be left out, and most decades are negative.
        .filter_values(heatmap.FilterValueRange().le(_BELOW_ALL))
        .y_axis(heatmap.YAxisConfig().axis_placement(AxisPlacement.LEFT).reverse(True))
        .cell_values(heatmap.CellValues().unit(spec.unit))
        .tooltip(heatmap.HeatmapTooltip().mode(TooltipDisplayMode.SINGLE))
        .show_legend()
    )


def _mapping(results: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
    """Texts and colours in place of values."""
    options = {value: {**result, "index": index} for index, (value, result) in enumerate(results.items())}
    return {"type": "value", "options": options}


_KINDS: Final[Mapping[PanelKind, Callable[[Panel], AnyPanel]]] = {
    "stat": _stat,
    "timeseries": _timeseries,
    "table": _table,
    "heatmap": _heatmap,
}
