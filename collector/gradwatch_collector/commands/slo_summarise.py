"""``gradwatch slo summarise``."""

from __future__ import annotations

import time
from zoneinfo import ZoneInfo

import click

from gradwatch_collector.commands.options import database_option, open_database
from gradwatch_collector.commands.slo_options import zone_option
from gradwatch_collector.objectives.summaries import summarise_anew
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.periods import read_span
from gradwatch_slo.wording import counted


@click.command("summarise")
@database_option
@click.option(
    "--from", "first", metavar="DATE", required=True, help="Runs that ended from then on: RFC 3339, or a day."
)
@click.option(
    "--to", "last", metavar="DATE", required=True, help="Until then: RFC 3339, or a day, which belongs to it."
)
@zone_option
def summarise_command(database: str, first: str, last: str, zone: ZoneInfo) -> None:
    """Have ended runs summarised anew: after prices were given or changed, say.

    What they cost, and all else that objectives are about, is read again, and held against what is usual for
    them by today's knowledge. The collector does it, with its prices, a minute from now or later; until then
    what is known of them counts.

    \b
    Example:
      gradwatch slo summarise --from 2026-10-01 --to 2026-10-31
    """
    try:
        start, end = read_span(first, last, zone)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with transaction(open_database(database)) as connection:
        count = summarise_anew(connection, nanos(start), nanos(end), now=time.time_ns())
    click.echo(f"{counted(count, 'run')} to be summarised anew by the collector")
