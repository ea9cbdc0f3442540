"""``gradwatch slo report``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zoneinfo import ZoneInfo

import click
from rich.console import Console
from sqlalchemy import Connection

from gradwatch_collector.commands.objective_files import files_option, load_objectives
from gradwatch_collector.commands.options import (
    database_option,
    format_option,
    open_database,
    output_option,
    prices_option,
    write_output,
)
from gradwatch_collector.commands.slo_options import (
    as_of_option,
    group_by_option,
    is_past,
    judged_at,
    window_option,
    zone_option,
)
from gradwatch_collector.commands.web_address import WEB_ADDRESS
from gradwatch_collector.objectives.comparing import compare_with_previous
from gradwatch_collector.objectives.evaluation import count_objectives
from gradwatch_collector.objectives.pinned import unknown_pinned
from gradwatch_collector.objectives.unsummarised import not_summarised
from gradwatch_collector.runs.facts import moment
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.caveats import thin_budgets
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.objective import Objective
from gradwatch_slo.periods import ChosenWindow
from gradwatch_slo.regrouping import grouped
from gradwatch_slo.render import render_json, render_markdown, render_table, title
from gradwatch_slo.render_csv import render_csv
from gradwatch_slo.report import ObjectiveReport


@click.command("report")
@database_option
@format_option("table", "markdown", "json", "csv", "html")
@output_option
@files_option
@zone_option
@window_option
@group_by_option
@as_of_option
@click.option("--compare", type=click.Choice(["previous"]), help="Beside the window before.")
@prices_option
@click.option("--url", type=WEB_ADDRESS, help="Of a collector: the page (html) links to its runs there.")
def report_command(
    database: str,
    output: str,
    path: Path | None,
    files: tuple[Path, ...],
    zone: ZoneInfo,
    window: ChosenWindow | None,
    group_by: Sequence[str],
    as_of: int,
    compare: str | None,
    prices: PriceTable | None,
    url: str | None,
) -> None:
    """Report every objective: verdict, error budget, and a sentence.

    The page (html) is one file with pictures, and needs no other; prices are for its costs.

    \b
    Example:
      gradwatch slo report --window 2026-10 --group-by team --compare previous
      gradwatch slo report --format html -o objectives.html --prices prices.yaml
    """
    found = load_objectives(files)
    objectives = [_asked(each, window, group_by) for each in found.objectives]
    now = judged_at(window, as_of)
    engine = open_database(database)
    with of_one_moment(engine).connect() as connection:
        evaluated = _evaluated(connection, objectives, now, compare)
        reports = [each for _, each in evaluated]
        caveats = [*not_summarised(connection, objectives, now), *unknown_pinned(connection, objectives)]
        caveats += thin_budgets(reports)
        for warning in caveats:
            click.echo(f"warning: {warning}", err=True)
        warnings = [*map(str, found.unevaluated), *caveats]
        if output == "html":
            # What draws takes most of a second to import.
            from gradwatch_collector.reports.objectives_page import PageOptions, objectives_page

            options = PageOptions(zone=zone, prices=prices, url=url)
            write_output(objectives_page(connection, evaluated, warnings, now, options), path)
            return
    if output == "json":
        write_output(render_json(reports, warnings), path)
    elif output == "csv":
        write_output(render_csv(reports), path)
    elif output == "markdown":
        write_output(render_markdown(reports, title(reports, moment(now), zone), warnings), path)
    elif path is None:
        render_table(reports, Console(), title(reports, moment(now), zone))
    else:
        plain = io.StringIO()
        # Even where the environment asks for colours.
        render_table(reports, Console(file=plain, force_terminal=False), title(reports, moment(now), zone))
        write_output(plain.getvalue(), path)


def _asked(objective: Objective, window: ChosenWindow | None, group_by: Sequence[str]) -> Objective:
    if window is not None:
        objective = replace(objective, window=window.window)
    return grouped(objective, group_by) if group_by else objective


def _evaluated(
    connection: Connection, objectives: Sequence[Objective], now: int, compare: str | None
) -> list[tuple[Objective, ObjectiveReport]]:
    if compare is not None:
        return compare_with_previous(connection, objectives, now, past=is_past(now))
    return [
        (counted.objective, report)
        for counted in count_objectives(connection, objectives, now, past=is_past(now))
        for report in counted.reports()
    ]
