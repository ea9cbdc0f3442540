"""``gradwatch db``."""

from __future__ import annotations

import click

from gradwatch_collector.commands.options import connected, database_option
from gradwatch_collector.database import (
    DatabaseError,
    SchemaState,
    describe,
    schema_version,
    upgrade,
)


@click.group()
def db() -> None:
    """Create and migrate the database."""


@db.command("upgrade")
@database_option
def upgrade_command(database: str) -> None:
    """Bring the database to the schema of this version; an empty one gets all of it.

    \b
    Example:
      gradwatch db upgrade --db postgresql://gradwatch@db.example/gradwatch
    """
    try:
        engine = connected(database)
        applied = upgrade(engine)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error
    if applied:
        click.echo(f"{describe(engine)}: applied {', '.join(applied)}")
    else:
        click.echo(f"{describe(engine)}: already up to date")


@db.command("status")
@database_option
def status_command(database: str) -> None:
    """Say which schema the database has; exit code 1 unless it is this version's.

    \b
    Example:
      gradwatch db status --db sqlite:///gradwatch.db
    """
    try:
        engine = connected(database, must_exist=True)
        version = schema_version(engine)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{describe(engine)}: {version.state.value} (schema {version.current}, newest {version.head})")
    if version.state is not SchemaState.CURRENT:
        raise click.exceptions.Exit(1)
