"""``gradwatch token``."""

from __future__ import annotations

import time

import click

from gradwatch_collector.auth import TokenExistsError, create_token
from gradwatch_collector.commands.options import database_option, open_database
from gradwatch_collector.database import transaction


@click.group()
def token() -> None:
    """Access tokens of the collector."""


@token.command("create")
@click.argument("name")
@click.option("--team", help="Team that telemetry sent with the token belongs to, whatever it claims.")
@database_option
def create(name: str, team: str | None, database: str) -> None:
    """Create a token called NAME and print it; it is stored hashed and cannot be shown again.

    \b
    Example:
      gradwatch token create ci --team vision
      OTEL_EXPORTER_OTLP_HEADERS="Authorization=Bearer gw_..." python train.py
    """
    engine = open_database(database, upgrade_sqlite=True)
    try:
        with transaction(engine) as connection:
            created = create_token(connection, name, team, time.time_ns())
    except TokenExistsError as error:
        raise click.ClickException(str(error)) from error
    click.echo(created)
