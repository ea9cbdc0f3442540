"""``gradwatch slo``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from gradwatch.conventions import RUNBOOK_BASE_URL
from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_slo.files import read_files
from gradwatch_slo.lint import lint
from gradwatch_slo.objective import ObjectiveSet, objectives_of
from gradwatch_slo.objectives import default_documents
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.reader import Document
from gradwatch_slo.render import render_json, render_markdown, render_table
from gradwatch_slo.rules import GRAFANA_URL, render_rules

_file = click.Path(path_type=Path)
_files_option = click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=_file,
    metavar="FILE",
    help="OpenSLO file, folder of *.yaml and *.yml files, or - for the standard input; repeatable"
    " [default: those shipped].",
)


@click.group()
def slo() -> None:
    """Is the training service healthy?"""


@slo.command("validate")
@click.argument("named", nargs=-1, type=_file, metavar="[FILE]...")
@_files_option
@click.option("--strict", is_flag=True, help="What is legal, but useless, is an error.")
def validate(named: tuple[Path, ...], files: tuple[Path, ...], strict: bool) -> None:
    """Check OpenSLO files; every mistake is one line with file, line and field.

    A warning tells of what is legal, but useless, such as an alert that can never fire.

    \b
    Example:
      gradwatch slo validate --strict objectives.yaml
    """
    documents = _read((*named, *files))
    found = _objectives(documents)
    useless = lint(documents)
    for warning in (*useless, *found.unevaluated):
        click.echo(f"warning: {warning}", err=True)
    if useless and strict:
        raise click.ClickException(f"{_counted(len(useless), 'warning')} found")
    skipped_count = len(found.unevaluated)
    click.echo(
        f"valid: {_counted(len(found.objectives), 'objective')}"
        + (f", {skipped_count} not evaluated here" if skipped_count else "")
    )


@slo.command("report")
@database_option
@format_option("table", "json", "markdown")
@_files_option
def report(database: str, output: str, files: tuple[Path, ...]) -> None:
    """Report every objective: verdict, error budget, and a sentence.

    \b
    Example:
      gradwatch slo report --format markdown
    """
    found = _load(files)
    engine = open_database(database)
    with engine.connect() as connection:
        reports = evaluate_objectives(connection, found.objectives, time.time_ns())
    if output == "json":
        click.echo(render_json(reports, [str(skipped) for skipped in found.unevaluated]), nl=False)
    elif output == "markdown":
        click.echo(render_markdown(reports), nl=False)
    else:
        render_table(reports, Console())


@slo.command("rules")
@_files_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write [default: the standard output].",
)
@click.option(
    "--runbook-url", default=RUNBOOK_BASE_URL, show_default=True, help="Absolute URL of the folder of runbooks."
)
@click.option("--grafana-url", default=GRAFANA_URL, show_default=True, help="Absolute URL of Grafana.")
def rules(files: tuple[Path, ...], output: Path | None, runbook_url: str, grafana_url: str) -> None:
    """Write Prometheus recording and alerting rules for objectives.

    \b
    Example:
      gradwatch slo rules -f objectives.yaml -o slo.rules.yaml
    """
    text = render_rules(_load(files).objectives, runbook_url=runbook_url, grafana_url=grafana_url)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror or error}") from error


def _load(files: Sequence[Path]) -> ObjectiveSet:
    """Return the objectives of files, or those shipped; warn of what is not evaluated."""
    found = _objectives(_read(files))
    for skipped in found.unevaluated:
        click.echo(f"warning: {skipped}", err=True)
    return found


def _read(files: Sequence[Path]) -> list[Document]:
    if not files:
        return default_documents()
    with _told():
        return read_files(files)


def _objectives(documents: Sequence[Document]) -> ObjectiveSet:
    with _told():
        return objectives_of(documents)


@contextmanager
def _told() -> Iterator[None]:
    """Print every problem of files, one a line."""
    try:
        yield
    except ObjectiveFileError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        raise click.ClickException(f"{_counted(len(error.problems), 'problem')} found") from error


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
