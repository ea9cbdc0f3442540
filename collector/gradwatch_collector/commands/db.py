"""``gradwatch db``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from sqlalchemy import Connection, Engine

from gradwatch_collector.commands.options import AGE, connected, database_option, open_database
from gradwatch_collector.service import audit
from gradwatch_collector.storage import citus
from gradwatch_collector.storage.backup import back_up
from gradwatch_collector.storage.database import (
    DatabaseError,
    SchemaState,
    describe,
    downgrade,
    failing_in_one_line,
    schema_version,
    steps_back,
    transaction,
    upgrade,
)
from gradwatch_collector.storage.database_clock import database_now
from gradwatch_collector.storage.retention import LEAST, Policy, Pruned, due, policy_for, prune


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


@db.command("downgrade")
@click.argument("revision")
@database_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def downgrade_command(revision: str, database: str, yes: bool) -> None:
    """Take the schema back to REVISION, for an older version of gradwatch; "base" leaves nothing.

    Says what would be lost, and asks. What is lost stays so when the database is upgraded again: take a backup,
    and stop the collectors.

    \b
    Example:
      gradwatch db downgrade 0006_history_by_time --db sqlite:///gradwatch.db
    """
    try:
        engine = connected(database, must_exist=True)
        steps = steps_back(engine, revision)
        for step in steps:
            click.echo(f"takes {step.revision} back, and loses {step.loses or 'nothing'}")
        if steps and not yes:
            click.confirm(f"Downgrade {describe(engine)}?", abort=True)
        if steps:
            downgrade(engine, revision)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{describe(engine)}: {'schema' if steps else 'already at schema'} {revision}")


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
    policy = policy_for(engine.dialect.name, **ages)
    if policy.runs < LEAST or policy.rollups < LEAST:
        raise click.UsageError("runs and roll-ups are kept for a day at least")
    try:
        with failing_in_one_line(engine, "prune"):
            click.echo(_would_prune(engine, policy) if dry_run else _prune(engine, policy))
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error


def _would_prune(engine: Engine, policy: Policy) -> str:
    with engine.connect() as connection:
        return f"would prune {_told(due(connection, policy, database_now(connection)))}"


def _prune(engine: Engine, policy: Policy) -> str:
    # By the database's clock, as all that is stored: by one that is ahead everything would be old.
    with engine.connect() as connection:
        now = database_now(connection)
    begun: list[Pruned] = []

    def tell(connection: Connection, what: Pruned) -> None:
        # With the first thing that goes, because a pass that fails half-way has no end.
        if not begun:
            audit.record(connection, audit.operator(), "db.pruning", describe(engine), asdict(policy), now=now)
        begun.append(what)

    pruned = prune(lambda: transaction(engine), policy, now, takes=tell)
    if begun:
        with transaction(engine) as connection:
            audit.record(connection, audit.operator(), "db.pruned", describe(engine), asdict(pruned), now=now)
    return f"pruned {_told(pruned)}"


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
