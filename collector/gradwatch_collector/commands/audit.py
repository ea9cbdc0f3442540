"""``gradwatch audit``."""

from __future__ import annotations

import json

import click
from rich.console import Console

from gradwatch_collector.api.shapes import MAX_LIMIT, timestamp
from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.service.audit import entries
from gradwatch_slo.tables import print_table


@click.group()
def audit() -> None:
    """Who did what to the service."""


@audit.command("list")
@database_option
@format_option("table", "json")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, MAX_LIMIT))
def list_command(database: str, output: str, limit: int) -> None:
    """List administrative acts, newest first.

    \b
    Example:
      gradwatch audit list --format json
    """
    engine = open_database(database)
    with engine.connect() as connection:
        found = entries(connection, limit)
    if output == "json":
        rows = [
            {
                "time": timestamp(entry.recorded_at),
                "actor": entry.actor,
                "action": entry.action,
                "subject": entry.subject,
                "details": entry.details,
            }
            for entry in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    print_table(
        Console(),
        ("TIME", "ACTOR", "ACTION", "SUBJECT", "DETAILS"),
        [
            (
                str(timestamp(entry.recorded_at))[:19].replace("T", " "),
                entry.actor,
                entry.action,
                entry.subject,
                " ".join(
                    f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                    for name, value in entry.details.items()
                    if value is not None
                ),
            )
            for entry in found
        ],
    )
