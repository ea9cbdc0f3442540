"""``gradwatch runs compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from rich.console import Console
from sqlalchemy import Connection

from gradwatch_collector.api.comparisons import comparison_json
from gradwatch_collector.commands.options import (
    database_option,
    existing_run,
    format_option,
    open_database,
    prices_option,
)
from gradwatch_collector.reports import comparison_table
from gradwatch_collector.runs.comparison import compare, last_good_run
from gradwatch_collector.runs.facts import RunRow
from gradwatch_slo import markdown
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.problems import printable
from gradwatch_slo.tables import print_table


@click.command("compare")
@click.argument("run_ids", nargs=-1, required=True, metavar="RUN [OTHER...]")
@database_option
@format_option("table", "markdown", "json")
@click.option("--all", "everything", is_flag=True, help="Also what is the same.")
@prices_option
def compare_command(
    run_ids: Sequence[str], database: str, output: str, everything: bool, prices: PriceTable | None
) -> None:
    """Show what differs between runs: configuration, versions, loss, norms, time, cost.

    Changes are relative to the first run. One run alone is compared with the last one of the same job, model
    and dataset that succeeded before it started.

    \b
    Example:
      gradwatch runs compare digits-7 digits-8 --prices prices.yaml
    """
    engine = open_database(database)
    with engine.connect() as connection:
        found = compare(connection, _chosen(connection, run_ids), prices)
    rows = comparison_table.rows(found, everything=everything)
    if output == "json":
        click.echo(json.dumps(comparison_json(found, everything=everything), indent=2, allow_nan=False))
    elif not rows:
        names = ", ".join(printable(row.run_id) for row in found.runs)
        click.echo(f"nothing that is known differs between {names}")
    elif output == "markdown":
        click.echo(markdown.table(comparison_table.headings(found), rows))
    else:
        print_table(Console(), comparison_table.headings(found), rows)


def _chosen(connection: Connection, run_ids: Sequence[str]) -> list[RunRow]:
    chosen = [existing_run(connection, run_id) for run_id in run_ids]
    if len(chosen) > 1:
        return chosen
    reference = last_good_run(connection, chosen[0])
    if reference is None:
        raise click.ClickException(
            f"no run of job {printable(chosen[0].job)!r} with the same model and dataset had succeeded when it "
            "started; name one to compare it with"
        )
    return [existing_run(connection, reference), *chosen]
