"""``gradwatch slo``."""

from __future__ import annotations

from pathlib import Path

import click

from gradwatch.conventions import RUNBOOK_BASE_URL
from gradwatch_collector.commands.objective_files import (
    FILE,
    files_option,
    load_objectives,
    objectives_in,
    read_documents,
)
from gradwatch_collector.commands.options import output_option, write_output
from gradwatch_collector.commands.slo_check import check_command
from gradwatch_collector.commands.slo_exclude import exclude_command, exclusions_command, include_command
from gradwatch_collector.commands.slo_interruptions import interruptions_command
from gradwatch_collector.commands.slo_report import report_command
from gradwatch_collector.commands.slo_simulate import simulate_command
from gradwatch_collector.commands.slo_summarise import summarise_command
from gradwatch_collector.commands.web_address import WEB_ADDRESS
from gradwatch_slo.burn_rules import is_alerted
from gradwatch_slo.lint import lint
from gradwatch_slo.rules import GRAFANA_URL, render_rules
from gradwatch_slo.wording import counted


@click.group()
def slo() -> None:
    """Is the training service healthy?"""


for command in (
    check_command,
    exclude_command,
    exclusions_command,
    include_command,
    interruptions_command,
    report_command,
    simulate_command,
    summarise_command,
):
    slo.add_command(command)


@slo.command("validate")
@click.argument("named", nargs=-1, type=FILE, metavar="[FILE]...")
@files_option
@click.option("--strict", is_flag=True, help="What is legal, but useless, is an error.")
def validate(named: tuple[Path, ...], files: tuple[Path, ...], strict: bool) -> None:
    """Check OpenSLO files; every mistake is one line with file, line and field.

    A warning tells of what is legal, but useless, such as an alert that can never fire.

    \b
    Example:
      gradwatch slo validate --strict objectives.yaml
    """
    documents = read_documents((*named, *files))
    found = objectives_in(documents)
    useless = lint(documents)
    for warning in (*useless, *found.unevaluated):
        click.echo(f"warning: {warning}", err=True)
    if useless and strict:
        raise click.ClickException(f"{counted(len(useless), 'warning')} found")
    skipped_count = len(found.unevaluated)
    click.echo(
        f"valid: {counted(len(found.objectives), 'objective')}"
        + (f", {skipped_count} not evaluated here" if skipped_count else "")
    )


@slo.command("rules")
@files_option
@output_option
@click.option(
    "--runbook-url",
    default=RUNBOOK_BASE_URL,
    show_default=True,
    type=WEB_ADDRESS,
    help="Absolute URL of the folder of runbooks.",
)
@click.option(
    "--grafana-url", default=GRAFANA_URL, show_default=True, type=WEB_ADDRESS, help="Absolute URL of Grafana."
)
def rules(files: tuple[Path, ...], path: Path | None, runbook_url: str, grafana_url: str) -> None:
    """Write Prometheus recording and alerting rules for objectives.

    \b
    Example:
      gradwatch slo rules -f objectives.yaml -o slo.rules.yaml
    """
    objectives = load_objectives(files).objectives
    for each in objectives:
        if not is_alerted(each.unit, each.target, each.window.duration, each.time_slice, each.alerts):
            click.echo(f"warning: {each.name}: no alert is made of it, so nobody is told", err=True)
    write_output(render_rules(objectives, runbook_url=runbook_url, grafana_url=grafana_url), path)
