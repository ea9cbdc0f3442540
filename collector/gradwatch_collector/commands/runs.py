"""``gradwatch runs``."""

from __future__ import annotations

import base64
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from gradwatch import conventions as c
from gradwatch.life.flight_recorder import decode
from gradwatch_collector.api import views
from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError, Json, seconds_between
from gradwatch_collector.commands.colours import OF_STATUS
from gradwatch_collector.commands.findings import heading, where
from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.commands.runs_compare import compare_command
from gradwatch_collector.commands.runs_report import report_command
from gradwatch_collector.commands.runs_watch import watch_command
from gradwatch_collector.reports.wording import duration
from gradwatch_slo.problems import printable
from gradwatch_slo.tables import print_table

_EVENTS_SHOWN = 20
_CHECKPOINTS_SHOWN = 10
_STALLS_SHOWN = 4


@click.group()
def runs() -> None:
    """What ran, and how it ended."""


runs.add_command(compare_command)
runs.add_command(report_command)
runs.add_command(watch_command)


@runs.command("list")
@database_option
@format_option("table", "json")
@click.option("--status", type=click.Choice(sorted(OF_STATUS)), help="Only runs that stand so.")
@click.option("--job", help="Only runs of this job.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, MAX_LIMIT))
@click.option("--cursor", help="Go on from `next_cursor` of an earlier call.")
def list_command(
    database: str, output: str, status: str | None, job: str | None, limit: int, cursor: str | None
) -> None:
    """List runs, newest first.

    \b
    Example:
      gradwatch runs list --status failed --format json
    """
    engine = open_database(database)
    try:
        with engine.connect() as connection:
            page = views.list_runs(connection, limit=limit, cursor=cursor, status=status, job=job)
    except BadCursorError as error:
        raise click.ClickException(str(error)) from error
    if output == "json":
        _print_json(page)
        return
    if not page["runs"]:
        click.echo("no runs yet: add gradwatch.watch(model, optimizer) to a training script")
        return
    print_runs(Console(), page["runs"])
    if page["next_cursor"]:
        click.echo(f"more: gradwatch runs list --cursor {page['next_cursor']}")


@runs.command("show")
@click.argument("run_id", metavar="RUN")
@database_option
@format_option("table", "json")
def show_command(run_id: str, database: str, output: str) -> None:
    """Show one run: how it ended, findings, gradient norms by layer, events.

    \b
    Example:
      gradwatch runs show digits-nan --format json
    """
    engine = open_database(database)
    with engine.connect() as connection:
        shown = views.show_run(connection, run_id)
    if shown is None:
        raise click.ClickException(f"no run {run_id!r}; `gradwatch runs list` names them")
    if output == "json":
        _print_json(shown)
    else:
        _print_run(Console(), shown)


def print_runs(console: Console, rows: Sequence[Json]) -> None:
    """Print runs as a table, one a line."""
    print_table(
        console,
        ("RUN", "JOB", "STATUS", "REASON", "STEPS", "LOSS", "STARTED", "TOOK"),
        [
            (
                row["run_id"],
                row["job"],
                Text(row["status"], style=OF_STATUS[row["status"]]),
                row["reason"] or "",
                "" if row["last_step"] is None else str(row["last_step"] + 1),
                _loss(row),
                row["started_at"][:19].replace("T", " "),
                _took(row),
            )
            for row in rows
        ],
        right=("STEPS", "LOSS", "TOOK"),
    )


def _print_run(console: Console, shown: Json) -> None:
    print_runs(console, [shown])
    for finding in shown["findings"]:
        _print(console, f"\n{heading(finding)} {where(finding)}")
        _print(console, f"  cause    {finding['cause']}")
        _print(console, f"  action   {finding['action']}")
        _print(console, f"  runbook  {finding['runbook_url']}")
    for line in _attempts(shown["attempts"]):
        _print(console, line)
    if shown["layers"]:
        console.print()
        _print_layers(console, shown["layers"])
    events = shown["events"]
    sections = (_time(shown["effective_time"]), _checkpoints(shown), _black_boxes(events), _stalls(events))
    for line in itertools.chain.from_iterable(sections):
        _print(console, line)
    _print(console, "\nEVENTS")
    for event in reversed(shown["events"][:_EVENTS_SHOWN]):
        _print(console, f"  {event['time'][11:23]}  {event['name']}  {_facts(event['attributes'])}")


def _print_layers(console: Console, layers: Sequence[Json]) -> None:
    numbers = ("mean", "min", "max")
    headings = ("LAYER", "STEPS OBSERVED", "MEAN NORM", "MIN", "MAX")
    rows = [
        (
            layer["layer"],
            str(layer["steps_observed"]),
            *("-" if layer[name] is None else f"{layer[name]:.4g}" for name in numbers),
        )
        for layer in layers
    ]
    print_table(console, headings, rows, right=headings[1:])


def _print(console: Console, line: str) -> None:
    # Telemetry is somebody else's text: no markup, and nothing that a terminal would obey.
    console.print(Text("\n" * line.startswith("\n") + printable(line.lstrip("\n"))), soft_wrap=True)


def _black_boxes(events: Sequence[Json]) -> Iterator[str]:
    """One line for each black box, oldest first: what it holds and how to get at it."""
    boxes = [event for event in reversed(events) if event["name"] == c.FLIGHT_RECORD.name]
    if boxes:
        yield f"\nBLACK BOX ({c.FLIGHT_DATA} in --format json, for gradwatch.life.flight_recorder.decode)"
    for event in boxes:
        attributes = event["attributes"]
        trigger, steps = attributes.get(c.FLIGHT_TRIGGER, "unknown"), attributes.get(c.FLIGHT_STEPS, "?")
        yield f"  {trigger}: flight record of {steps} steps{_contents(attributes.get(c.FLIGHT_DATA))}"


def _attempts(attempts: Sequence[Json]) -> Iterator[str]:
    """One line for each attempt, oldest first, where there is more to tell than the run's own line does."""
    if len(attempts) == 1 and not attempts[0]["evidence"]:
        return
    yield "\nATTEMPTS"
    for attempt in reversed(attempts):
        rank = "" if attempt["cause_rank"] is None else f"(rank {attempt['cause_rank']})"
        retry = "will be retried" if attempt["will_retry"] else ""
        facts = (attempt["status"], attempt["reason"] or "", rank, retry, _facts(attempt["evidence"]))
        yield f"  {attempt['attempt']}  {attempt['started_at'][11:19]}  {'  '.join(filter(None, facts))}"


def _stalls(events: Sequence[Json]) -> Iterator[str]:
    """The newest stalls, oldest first, with the stack of every thread as it was."""
    stalls = [event for event in events if event["name"] == c.STALLED.name][:_STALLS_SHOWN]
    for event in reversed(stalls):
        step = event["attributes"].get(c.STEP, "?")
        yield f"\nSTALLED {event['time'][11:19]} rank {event['rank']} after step {step}"
        for line in str(event["attributes"].get(c.STACKS) or "no stacks").splitlines():
            yield f"  {line}"


def _time(spent: Json) -> Iterator[str]:
    if spent["ratio"] is not None:
        productive, waiting, lost = (spent[f"{name}_seconds"] for name in ("productive", "waiting", "lost"))
        yield (
            f"\nEFFECTIVE TIME {spent['ratio']:.1%} of {spent['wall_seconds']:.1f} s: {productive:.1f} s in "
            f"steps that count, {waiting:.1f} s waiting for data, {lost:.1f} s in steps done again"
        )


def _checkpoints(shown: Json) -> Iterator[str]:
    """The record in one line, then the newest, oldest first."""
    record = shown["checkpoint_record"]
    if not shown["checkpoints"]:
        return
    age = "" if record["last_good_at"] is None else f", the last {record['last_good_age_seconds']:.0f} s old"
    yield f"\nCHECKPOINTS {record['saved']} of {record['saved'] + record['failed']} saved{age}"
    for each in reversed(shown["checkpoints"][:_CHECKPOINTS_SHOWN]):
        known = (
            ("step", each["step"]),
            ("rank", each["rank"] or None),
            ("bytes", each["bytes"]),
            ("seconds", each["seconds"] and round(each["seconds"], 3)),
            ("error", each["error"]),
        )
        facts = " ".join(f"{name}={value}" for name, value in known if value is not None)
        yield f"  {each['time'][11:23]}  {each['state']:8}  {each['name'] or '?'}  {facts}"


def _contents(data: object) -> str:
    try:
        optimizers = decode(base64.b64decode(str(data)))["optimizers"].values()
    except ValueError:
        return ", not readable"
    steps = [step for ring in optimizers for step in ring["step"]]
    layers = {layer for ring in optimizers for layer in ring["layers"]}
    return f", {min(steps)} to {max(steps)}, {len(layers)} layers" if steps else ""


def _facts(attributes: dict[str, Any]) -> str:
    return " ".join(
        f"{name.removeprefix('training.')}={value}"
        for name, value in attributes.items()
        if name not in {c.EVENT_SEQUENCE, c.FLIGHT_DATA, c.STACKS}
    )


def _loss(row: Json) -> str:
    if row["last_loss_nonfinite"]:
        return "NaN"
    return "" if row["last_loss"] is None else f"{row['last_loss']:.4g}"


def _took(row: Json) -> str:
    return duration(seconds_between(row["started_at"], row["ended_at"] or row["last_seen_at"]))


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
