"""``gradwatch metrics``: what any OTLP client sent, runs and all else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from sqlalchemy import Connection

from gradwatch_collector.api.metric_catalog import list_metrics
from gradwatch_collector.api.metric_points import SeriesQuery, list_series, parse_labels
from gradwatch_collector.api.moments import parse_moment
from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError, Json
from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.storage.packed import EXEMPLARS
from gradwatch_slo.tables import print_table

_SOURCES_SHOWN = 3


@click.group()
def metrics() -> None:
    """Metrics of runs, and of whatever else sends OTLP."""


@metrics.command("list")
@database_option
@format_option("table", "json")
@click.option("--run", "run_id", metavar="RUN", help="Only metrics of this run, or of this sender.")
@click.option("--name", metavar="METRIC", help="Only metrics of this name.")
@click.option("--limit", default=MAX_LIMIT, show_default=True, type=click.IntRange(1, MAX_LIMIT))
@click.option("--cursor", help="Go on from `next_cursor` of an earlier call.")
def list_command(
    database: str, output: str, run_id: str | None, name: str | None, limit: int, cursor: str | None
) -> None:
    """List metrics and who sent them, newest first.

    What belongs to no run has a run id made of its resource, such as resource-0123456789abcdef.

    \b
    Example:
      gradwatch metrics list --run digits-nan
    """
    page = _read(
        database,
        lambda connection: list_metrics(connection, run_id=run_id, name=name, limit=limit, cursor=cursor),
    )
    if output == "json":
        _print_json(page)
        return
    print_table(
        Console(),
        ("METRIC", "KIND", "UNIT", "SENT BY"),
        [(each["name"], _kind(each), each["unit"], _sources(each)) for each in page["metrics"]],
    )
    if page["next_cursor"]:
        click.echo(f"more: gradwatch metrics list --cursor {page['next_cursor']}")


@metrics.command("show")
@click.argument("metric", metavar="METRIC")
@click.option("--run", "run_id", required=True, metavar="RUN", help="The run, or the sender, that sent it.")
@database_option
@format_option("table", "json")
@click.option("--attempt", type=click.IntRange(1), help="Only this attempt.")
@click.option("--rank", type=click.IntRange(0), help="Only this rank.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Only points with it; repeatable.")
@click.option("--since", metavar="TIME", help="Only from this moment on, such as 2026-01-31T12:00:00Z.")
@click.option("--until", metavar="TIME", help="Only up to this moment.")
@click.option(
    "--points", default=10, show_default=True, type=click.IntRange(1, MAX_LIMIT), help="Of each series."
)
@click.option("--limit", default=MAX_LIMIT, show_default=True, type=click.IntRange(1, MAX_LIMIT))
@click.option("--cursor", help="Go on from `next_cursor` of an earlier call.")
def show_command(
    metric: str,
    run_id: str,
    database: str,
    output: str,
    labels: tuple[str, ...],
    since: str | None,
    until: str | None,
    **asked: Any,
) -> None:
    """Show the newest points of one metric, newest first.

    Of points that are too old to be kept as they were sent, statistics of up to 64 at a time are shown.

    \b
    Example:
      gradwatch metrics show training.loss --run digits-nan --points 100
    """
    try:
        query = SeriesQuery(
            run_id,
            metric,
            labels=parse_labels(labels),
            since=None if since is None else parse_moment(since),
            until=None if until is None else parse_moment(until),
            **asked,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    page = _read(database, lambda connection: list_series(connection, query))
    if page is None:
        raise click.ClickException(
            f"{run_id!r} sent no metric {metric!r}; `gradwatch metrics list` names metrics and who sent them"
        )
    if output == "json":
        _print_json(page)
        return
    print_table(
        Console(),
        ("ATTEMPT", "RANK", "LABELS", "TIME", "VALUE"),
        [row for series in page["series"] for row in _rows(series)],
        right=("ATTEMPT", "RANK"),
    )
    if page["next_cursor"]:
        click.echo(f"more: add --cursor {page['next_cursor']}")


def _read(database: str, view: Callable[[Connection], Any]) -> Any:
    engine = open_database(database)
    try:
        with engine.connect() as connection:
            return view(connection)
    except BadCursorError as error:
        raise click.ClickException(str(error)) from error


def _kind(metric: Json) -> str:
    words = (metric["temporality"], "monotonic" if metric["monotonic"] else None, metric["kind"])
    return " ".join(word for word in words if word).replace("_", " ")


def _sources(metric: Json) -> str:
    shown = [_source(each) for each in metric["sources"][:_SOURCES_SHOWN]]
    more = metric["more_sources"] or len(metric["sources"]) > _SOURCES_SHOWN
    return ", ".join([*shown, *(["..."] if more else [])])


def _source(source: Json) -> str:
    run_id: str = source["run_id"]
    return run_id if source["is_run"] or not source["job"] else f"{run_id} ({source['job']})"


def _rows(series: Json) -> list[tuple[str, ...]]:
    labels = " ".join(f"{name}={value}" for name, value in series["labels"].items())
    rank = "" if series["rank"] is None else str(series["rank"])
    told = [(point["time"], _value(point)) for point in series["points"]]
    told += [(rollup["time"], _statistics(rollup)) for rollup in series["rollups"]]
    # Their times have all nine digits, and so sort as text.
    told.sort(key=lambda row: row[0], reverse=True)
    return [(str(series["attempt"]), rank, labels, *row) for row in told]


def _value(point: Json) -> str:
    """Return what a point says in one cell: its number, or every field that it has."""
    facts = {
        name: (point["nonfinite"] or {}).get(name, value)
        for name, value in point.items()
        if name not in ("time", "nonfinite", EXEMPLARS)
    }
    if facts.keys() == {"value"}:
        return str(facts["value"])
    return " ".join(f"{name}={json.dumps(value)}" for name, value in facts.items() if value is not None)


def _statistics(rollup: Json) -> str:
    """Return in one cell what a roll-up says: of how many points it is, and of each field the statistics."""
    by_field = {
        field: " ".join(f"{name}={value}" for name, value in told.items() if value is not None)
        for field, told in rollup["fields"].items()
        if told is not None
    }
    if by_field.keys() == {"value"}:
        return f"{rollup['count']} points: {by_field['value']}"
    return f"{rollup['count']} points: " + ", ".join(f"{field}: {said}" for field, said in by_field.items())


def _print_json(value: Json) -> None:
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
