"""``gradwatch slo simulate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

import click
from rich.console import Console

from gradwatch_collector.commands.objective_files import files_option, load_objectives
from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.commands.slo_options import as_of_option, zone_option
from gradwatch_collector.objectives.history import load_history
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo import markdown
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import rfc3339
from gradwatch_slo.simulation import Episode, History, Simulated, simulate
from gradwatch_slo.tables import print_table
from gradwatch_slo.wording import counted, minute
from gradwatch_slo.wording import group as group_words

_DAYS: Final = 366
_NANOS_A_DAY: Final = 86_400 * 1_000_000_000
_HEADINGS: Final = ("Objective", "Group", "Alert", "Since", "Events", "Bad", "Fired", "By chance", "When")
# Where a terminal is narrow.
_BELOW: Final = ("Group", "When")
_SPARED: Final = ("When", "Group", "Since", "Events", "Bad", "By chance")
_LEAST: Final = {"Objective": 24, "Group": 16, "Alert": 14, "When": 30}


@dataclass(frozen=True, slots=True)
class _Row:
    objective: Objective
    group: Mapping[str, str | None]
    history: History
    simulated: Simulated


@click.command("simulate")
@database_option
@files_option
@format_option("table", "markdown", "json")
@click.option(
    "--days",
    type=click.IntRange(1, 10 * _DAYS),
    default=_DAYS,
    show_default=True,
    help="How many days of the past.",
)
@as_of_option
@zone_option
def simulate_command(
    database: str, files: tuple[Path, ...], output: str, days: int, as_of: int, zone: ZoneInfo
) -> None:
    """Tell what objectives' alerts would have done over past runs: when they would have fired, for how long.

    "By chance" is how often a year an alert would fire, wrongly each time, if the same events were bad with
    just the probability that the target allows (from 400 simulated histories, the same ones each time).

    \b
    Example:
      gradwatch slo simulate -f objectives.yaml --days 90
    """
    found = load_objectives(files)
    engine = open_database(database)
    with of_one_moment(engine).connect() as connection:
        histories = [
            (objective, load_history(connection, objective, as_of - days * _NANOS_A_DAY, as_of))
            for objective in found.objectives
        ]
    rows = [row for objective, by_group in histories for row in _rows(objective, by_group)]
    if output == "json":
        click.echo(json.dumps([_json(row) for row in rows], indent=2))
    elif output == "markdown":
        click.echo(markdown.table(_HEADINGS, [_cells(row, zone) for row in rows]))
    else:
        cells = [_cells(row, zone) for row in rows]
        right = {"Events", "Bad"}
        print_table(Console(), _HEADINGS, cells, right=right, spared=_SPARED, below=_BELOW, least=_LEAST)


def _rows(objective: Objective, by_group: Mapping[tuple[str | None, ...], History]) -> Iterator[_Row]:
    for group, history in sorted(by_group.items(), key=lambda item: [value or "" for value in item[0]]):
        try:
            for simulated in simulate(objective, history):
                yield _Row(objective, dict(zip(objective.group_by, group, strict=True)), history, simulated)
        except ValueError as error:
            click.echo(f"warning: {objective.name} is not simulated: {error}", err=True)


def _cells(row: _Row, zone: ZoneInfo) -> tuple[str, ...]:
    episodes = row.simulated.episodes
    when = [_when(each, row.history, zone) for each in episodes[-3:]]
    if len(episodes) > len(when):
        when.insert(0, f"{len(episodes) - len(when)} earlier")
    return (
        row.objective.name,
        group_words(row.group),
        row.simulated.rule,
        f"{row.history.start.astimezone(zone):%Y-%m-%d}",
        str(row.history.counts.total),
        str(row.history.counts.bad),
        counted(len(episodes), "time"),
        "-" if row.simulated.by_chance is None else f"{row.simulated.by_chance:.2g} a year",
        "; ".join(when) or "-",
    )


def _when(episode: Episode, history: History, zone: ZoneInfo) -> str:
    start = minute(episode.start or history.start, zone)
    if episode.start is None:
        start = f"since before {start}"
    if episode.end is None:
        lasted = "and goes on"
    elif episode.start is None:
        lasted = f"until {minute(episode.end, zone)}"
    else:
        lasted = f"for {_length(episode.end - episode.start)}"
    return f"{start} {lasted} ({episode.bad} of {episode.total} bad)"


def _length(length: timedelta) -> str:
    hours = length // timedelta(hours=1)
    return f"{hours} h" if hours < 48 else f"{hours // 24} d"


def _json(row: _Row) -> dict[str, object]:
    return {
        "name": row.objective.name,
        "group": dict(row.group),
        "target": float(row.objective.target),
        "alert": row.simulated.rule,
        "from": rfc3339(row.history.start),
        "to": rfc3339(row.history.start + row.history.length),
        "total": row.history.counts.total,
        "bad": row.history.counts.bad,
        "by_chance_a_year": row.simulated.by_chance,
        "quiet_share": row.simulated.quiet,
        "episodes": [
            {
                "from": None if each.start is None else rfc3339(each.start),
                "to": None if each.end is None else rfc3339(each.end),
                "bad": each.bad,
                "total": each.total,
            }
            for each in row.simulated.episodes
        ],
    }
