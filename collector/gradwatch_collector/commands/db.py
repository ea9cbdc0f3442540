"""``gradwatch db``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from gradwatch_collector.commands.options import AGE, connected, database_option, open_database
from gradwatch_collector.service import audit
from gradwatch_collector.storage import citus
from gradwatch_collector.storage.backup import back_up
from gradwatch_collector.storage.database import (
    DatabaseError,
    SchemaState,
    describe,
    schema_version,
    transaction,
    upgrade,
)
from gradwatch_collector.storage.retention import LEAST, Pruned, due, policy_for, prune


@click.group()
def db() -> None:
    """Create, migrate, prune and back up the database."""


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


@db.command("prune")
@database_option
@click.option(
    "--older-than",
    "raw",
    type=AGE,
    metavar="AGE",
    help="Roll up numbers of whole days (UTC) that are older: 12h, 7d, 4w or forever "
    "[default: 30d in SQLite, 7d in PostgreSQL].",
)
@click.option(
    "--rollups-older-than",
    "rollups",
    type=AGE,
    metavar="AGE",
    help="Delete roll-ups and events that are older [default: 365d in SQLite, 90d in PostgreSQL].",
)
@click.option(
    "--runs-older-than",
    "runs",
    type=AGE,
    metavar="AGE",
    help="Delete all of runs that ended so long ago, which objectives then count no more [default: forever].",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
def prune_command(database: str, dry_run: bool, **ages: int | None) -> None:
    """Replace old numbers by roll-ups, delete what is older still, and give the space back.

    The collector does the same by itself, every ten minutes. Other commands and collectors go on meanwhile.

    \b
    Example:
      gradwatch db prune --db sqlite:///gradwatch.db --older-than 7d --dry-run
    """
    engine = open_database(database)
    policy, now = policy_for(engine.dialect.name, **ages), time.time_ns()
    if policy.runs < LEAST or policy.rollups < LEAST:
        raise click.UsageError("runs and roll-ups are kept for a day at least")
    if dry_run:
        with engine.connect() as connection:
            click.echo(f"would prune {_told(due(connection, policy, now))}")
        return
    pruned = prune(lambda: transaction(engine), policy, now)
    if pruned != Pruned():
        with transaction(engine) as connection:
            audit.record(connection, audit.operator(), "db.pruned", describe(engine), asdict(pruned), now=now)
    click.echo(f"pruned {_told(pruned)}")


def _told(pruned: Pruned) -> str:
    rolled = f" (now {pruned.rollups} rows of roll-ups)" if pruned.rollups else ""
    return (
        f"{pruned.values} values in {pruned.blocks} blocks{rolled}, {pruned.old_rollups} rows of roll-ups, "
        f"{pruned.events} events, {pruned.spans} spans, {pruned.runs} runs"
    )


@db.command("backup")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@database_option
def backup_command(path: Path, database: str) -> None:
    """Write a copy of a SQLite database to PATH, whole and of one moment; collectors go on meanwhile.

    \b
    Example:
      gradwatch db backup /backups/gradwatch.db --db sqlite:///gradwatch.db
    """
    try:
        back_up(connected(database, must_exist=True), path)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path}: {path.stat().st_size} bytes")


@db.command("citus")
def citus_command() -> None:
    """Print the SQL statements that spread a PostgreSQL database over the nodes of Citus.

    \b
    Example:
      gradwatch db citus | psql postgresql://gradwatch@coordinator/gradwatch
    """
    for statement in citus.statements():
        click.echo(statement)
