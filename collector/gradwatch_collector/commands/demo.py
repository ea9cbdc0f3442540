"""``gradwatch demo``."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from gradwatch_collector.api.findings import findings_of_run
from gradwatch_collector.api.run_list import list_runs
from gradwatch_collector.commands.options import open_database
from gradwatch_collector.commands.runs import print_runs
from gradwatch_collector.demo.scenario import PLAN, CollectorProcess, DemoError, PlannedRun, collector, play
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.unsummarised import not_summarised
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.render import render_table

_SUMMARISED_WITHIN: Final = 30.0


@click.command()
@click.option("--serve", is_flag=True, help="Keep the collector running until Ctrl-C.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to put the database and the logs [default: a new temporary folder].",
)
def demo(serve: bool, directory: Path | None) -> None:
    """Train healthy and sick models on real data and report on them, in about a minute.

    \b
    Example:
      gradwatch demo --serve
    """
    for module, extra in (("torch", "torch"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise click.ClickException(f"the demo needs {extra}: pip install 'gradwatch[demo]'")
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="gradwatch-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "gradwatch.db"
    if path.exists():
        raise click.ClickException(f"{path} is there already; choose another --directory")
    database = f"sqlite:///{path}"
    console = Console()
    try:
        with collector(database, directory / "collector.log") as server:
            console.print(f"collector on {server.url}, database {path}", soft_wrap=True)
            _play(console, server, directory)
            engine = open_database(database)
            _await_summaries(engine)
            _report(console, engine, database)
            if serve:
                console.print(f"\nlook at {server.url}/ in a browser; serving until Ctrl-C", soft_wrap=True)
                with suppress(KeyboardInterrupt):
                    server.process.wait()
    except DemoError as error:
        raise click.ClickException(str(error)) from error


def _play(console: Console, server: CollectorProcess, logs: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=len(PLAN))

        def tell(planned: PlannedRun, what: str) -> None:
            progress.console.print(
                f"  {planned.run_id:<13} {what:<24} ({planned.story})", highlight=False, soft_wrap=True
            )
            if what != "started":
                progress.advance(task)

        play(server, logs, tell)


def _await_summaries(engine: Engine) -> None:
    """Return when all that objectives are about is known: some seconds after the last run has ended."""
    give_up = time.monotonic() + _SUMMARISED_WITHIN
    while time.monotonic() < give_up:
        with engine.connect() as connection:
            if not any(not_summarised(connection, default_objectives().objectives, time.time_ns())):
                return
        time.sleep(0.2)


def _report(console: Console, engine: Engine, database: str) -> None:
    with engine.connect() as connection:
        rows = list_runs(connection)["runs"]
        findings = [finding for row in rows for finding in findings_of_run(connection, row["run_id"])]
        reports = evaluate_objectives(connection, default_objectives().objectives, time.time_ns())
    console.print("\n[bold]Runs[/]")
    print_runs(console, rows)
    for finding in findings:
        if finding["rule"] == "nonfinite":
            born_in = f", born in {finding['born_in']}" if finding["born_in"] else ""
            console.print(
                f"\n[bold]NaN[/] in {finding['run_id']}: first at step {finding['step']}, "
                f"layer {finding['layer']}{born_in}"
            )
    console.print("\n[bold]SLO report[/]")
    render_table(reports, console)
    standing = {row["run_id"]: row["status"] for row in rows}
    wrong = [planned for planned in PLAN if standing.get(planned.run_id) != planned.status]
    for planned in wrong:
        console.print(f"{planned.run_id} should be {planned.status} but is {standing.get(planned.run_id)}")
    if wrong:
        raise DemoError(f"{len(wrong)} of {len(PLAN)} runs got the wrong verdict")
    console.print(f"\nAll {len(PLAN)} runs stand as they should, the killed one as well. Look next:")
    for command in ("runs list", "runs show demo-nan", "runs report demo-nan", "slo report"):
        console.print(f"  gradwatch {command} --db {database}", soft_wrap=True, highlight=False)
