"""Options that commands share, and opening the database they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
from sqlalchemy import Connection, Engine

from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import DatabaseError
from gradwatch_collector.storage.retention import age
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.problems import ObjectiveFileError, printable

DEFAULT_DATABASE: Final = "sqlite:///gradwatch.db"

database_option: Final = click.option(
    "--db",
    "database",
    envvar="GRADWATCH_DB",
    default=DEFAULT_DATABASE,
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="sqlite:///PATH, the path of a SQLite file, or postgresql://USER@HOST/NAME.",
)


class _Age(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """An age such as 7d, in nanoseconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or say what one looks like."""
        try:
            return value if isinstance(value, int) else age(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


AGE: Final = _Age()


class FiniteRange(click.FloatRange):
    """A number within a range; "nan" and "inf" are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it, or say what is wrong with it."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def _prices(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> PriceTable | None:
    if path is None:
        return None
    # What validates files takes a third of a second to import.
    from gradwatch_slo.prices import read_prices

    try:
        return read_prices(path)
    except ObjectiveFileError as error:
        raise click.ClickException(str(error)) from error


# Arrives as a `PriceTable`, or None.
prices_option: Final = click.option(
    "--prices",
    type=click.Path(path_type=Path),
    envvar="GRADWATCH_PRICES",
    show_envvar=True,
    callback=_prices,
    metavar="FILE",
    help="What an hour of a device costs (YAML); without it costs are unknown.",
)


def format_option(*formats: str) -> Callable[[Any], Any]:
    """Return the option ``--format``; the first format is the default. Arrives as ``output``."""
    return click.option(
        "--format",
        "output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="How to print it.",
    )


# Arrives as ``path``; for `write_output`.
output_option: Final = click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write it there [default: to the standard output].",
)


def write_output(text: str, path: Path | None) -> None:
    """Write to a file and say so, or to the standard output.

    Raises:
        click.ClickException: the file cannot be written.
    """
    if path is None:
        click.echo(text, nl=False)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}")


def connected(url: str, *, must_exist: bool = False) -> Engine:
    """Connect, whatever the schema; the connections are closed when the command ends."""
    engine = db.connect(url, must_exist=must_exist)
    click.get_current_context().call_on_close(engine.dispose)
    return engine


def open_database(url: str, *, upgrade_sqlite: bool = False) -> Engine:
    """Open a database whose schema this version knows.

    ``upgrade_sqlite`` creates and migrates a SQLite file; a PostgreSQL schema changes only on
    ``gradwatch db upgrade``, because others may be using it.

    Raises:
        click.ClickException: it cannot be opened or used as it is.
    """
    try:
        engine = connected(url, must_exist=not upgrade_sqlite)
        if upgrade_sqlite and engine.dialect.name == "sqlite":
            db.upgrade(engine)
        db.require_current(engine)
    except DatabaseError as error:
        raise click.ClickException(str(error)) from error
    return engine


def existing_run(connection: Connection, run_id: str) -> RunRow:
    """Return a run.

    Raises:
        click.ClickException: there is none of this id.
    """
    for row in load_runs(connection, schema.run.c.run_id == run_id):
        return row
    raise click.ClickException(f"no run {printable(run_id)!r}; `gradwatch runs list` names them")
