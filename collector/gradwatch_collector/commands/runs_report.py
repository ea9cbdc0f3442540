"""``gradwatch runs report``."""

from __future__ import annotations

import time
from pathlib import Path

import click
from sqlalchemy import Connection

from gradwatch_collector.commands.options import (
    database_option,
    existing_run,
    format_option,
    open_database,
    output_option,
    prices_option,
    write_output,
)
from gradwatch_collector.reports.post_mortem import post_mortem
from gradwatch_collector.reports.run_report import to_html, to_markdown
from gradwatch_slo.cost import PriceTable


@click.command("report")
@click.argument("run_id", metavar="RUN")
@database_option
@format_option("markdown", "html")
@output_option
@prices_option
def report_command(
    run_id: str, database: str, output: str, path: Path | None, prices: PriceTable | None
) -> None:
    """Write the post-mortem of a run: what happened when, why, and what changed since the last good run.

    The page (html) is one file with pictures, and needs no other.

    \b
    Example:
      gradwatch runs report digits-nan --format html -o digits-nan.html
    """
    engine = open_database(database)
    with engine.connect() as connection:
        text = _report(connection, run_id, output, prices)
    write_output(text, path)


def _report(connection: Connection, run_id: str, output: str, prices: PriceTable | None) -> str:
    run, now = existing_run(connection, run_id), time.time_ns()
    report = post_mortem(connection, run, prices)
    if output == "markdown":
        return to_markdown(report, now)
    # What draws takes most of a second to import.
    from gradwatch_collector.reports.run_pictures import run_pictures

    return to_html(report, list(run_pictures(connection, run.run_id, run.attempt, report.bad_steps)), now)
