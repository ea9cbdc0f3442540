"""``gradwatch slo``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_slo.objective import ObjectiveSet, load_objectives
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.render import render_json, render_markdown, render_table

_file = click.Path(path_type=Path)


@click.group()
def slo() -> None:
    """Is the training service healthy?"""


@slo.command("validate")
@click.argument("files", nargs=-1, required=True, type=_file, metavar="FILE...")
def validate(files: tuple[Path, ...]) -> None:
    """Check OpenSLO files; every mistake is one line with file, line and field.

    \b
    Example:
      gradwatch slo validate objectives.yaml
    """
    found = _load(files)
    for skipped in found.unevaluated:
        click.echo(f"warning: {skipped}", err=True)
    valid, skipped_count = len(found.objectives), len(found.unevaluated)
    click.echo(
        f"valid: {valid} objectives" + (f", {skipped_count} not evaluated here" if skipped_count else "")
    )


@slo.command("report")
@database_option
@format_option("table", "json", "markdown")
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=_file,
    help="OpenSLO files; repeatable [default: those shipped].",
)
def report(database: str, output: str, files: tuple[Path, ...]) -> None:
    """Report every objective: verdict, error budget, and a sentence.

    \b
    Example:
      gradwatch slo report --format markdown
    """
    found = _load(files) if files else default_objectives()
    for skipped in found.unevaluated:
        click.echo(f"warning: {skipped}", err=True)
    engine = open_database(database)
    with engine.connect() as connection:
        reports = evaluate_objectives(connection, found.objectives, time.time_ns())
    if output == "json":
        click.echo(render_json(reports, [str(skipped) for skipped in found.unevaluated]), nl=False)
    elif output == "markdown":
        click.echo(render_markdown(reports), nl=False)
    else:
        render_table(reports, Console())


def _load(files: Sequence[Path]) -> ObjectiveSet:
    try:
        return load_objectives(files)
    except ObjectiveFileError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        count = len(error.problems)
        raise click.ClickException(f"{count} problem{'s' if count > 1 else ''} found") from error
