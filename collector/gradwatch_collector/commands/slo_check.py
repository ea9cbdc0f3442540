"""``gradwatch slo check``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from gradwatch_collector.commands.objective_files import files_option, objectives_in, read_documents
from gradwatch_collector.commands.options import database_option, open_database
from gradwatch_collector.commands.slo_options import as_of_option, group_option, is_past
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.pinned import unknown_pinned
from gradwatch_collector.objectives.unsummarised import not_summarised
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.objective import Objective, ObjectiveSet, Unevaluated
from gradwatch_slo.problems import one_of, printable, suggestion
from gradwatch_slo.regrouping import narrowed
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.wording import group as group_words

_ERROR: Final = 1
# In the order in which they decide.
_EXIT_CODES: Final = {Verdict.BREACHED: 3, Verdict.INSUFFICIENT_DATA: 4}


@click.command("check")
@database_option
@files_option
@click.option(
    "--objective", "names", multiple=True, metavar="NAME", help="Only those of this name; repeatable."
)
@group_option
@as_of_option
@click.option(
    "--insufficient",
    type=click.Choice(["ok", "fail"]),
    default="fail",
    show_default=True,
    help="What it means that there is not enough data to judge.",
)
@click.pass_context
def check_command(
    context: click.Context,
    database: str,
    files: tuple[Path, ...],
    names: tuple[str, ...],
    group: Mapping[str, str],
    as_of: int,
    insufficient: str,
) -> None:
    """Tell by the exit code how objectives stand, for pipelines and deployments; and why, a line for each.

    0: all are met or uncertain; 1: error, or one cannot be evaluated here; 3: one is breached; 4: none is, but
    there is not enough data to judge one.

    \b
    Example:
      gradwatch slo check -f objectives/ --objective training-success-rate --group team=vision
    """
    objectives, unevaluated = _chosen(objectives_in(read_documents(files)), names)
    about = [found for each in objectives if (found := narrowed(each, group)) is not None]
    if not about and not unevaluated:
        raise click.ClickException(f"no objective is about {group_words(group)}")
    engine = open_database(database)
    with of_one_moment(engine).connect() as connection:
        reports = evaluate_objectives(connection, about, as_of, past=is_past(as_of))
        warnings = [*not_summarised(connection, about, as_of), *unknown_pinned(connection, about)]
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    counts = Counter(report.verdict for report in reports)
    passing = {Verdict.INSUFFICIENT_DATA} if insufficient == "ok" else set()
    decided = next((verdict for verdict in _EXIT_CODES if counts[verdict] and verdict not in passing), None)
    for skipped in unevaluated:
        click.echo(f"error: {printable(str(skipped))}")
    for report in reports:
        if report.verdict is decided:
            click.echo(_line(report))
    if unevaluated:
        context.exit(_ERROR)
    if decided is not None:
        context.exit(_EXIT_CODES[decided])
    click.echo("ok: " + ", ".join(f"{counts[each]} {each.value}" for each in Verdict if counts[each]))


def _chosen(found: ObjectiveSet, names: Sequence[str]) -> tuple[list[Objective], list[Unevaluated]]:
    """Return the SLOs of these names, or all.

    Raises:
        click.BadParameter: there is none of a name.
    """
    known = dict.fromkeys(
        [*(each.name for each in found.objectives), *(each.name for each in found.unevaluated)]
    )
    for name in names:
        if name not in known:
            message = f"found {name!r}, expected {one_of(known) if known else 'none'}{suggestion(name, known)}"
            raise click.BadParameter(message, param_hint="'--objective'")
    wanted = names or known
    return (
        [each for each in found.objectives if each.name in wanted],
        [each for each in found.unevaluated if each.name in wanted],
    )


def _line(report: ObjectiveReport) -> str:
    grouped = f" ({group_words(report.group)})" if report.group else ""
    return f"{report.verdict.value}: {printable(report.name)}{grouped}: {report.summary}"
