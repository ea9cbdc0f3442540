"""``gradwatch slo exclude``, ``include`` and ``exclusions``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from zoneinfo import ZoneInfo

import click
from rich.console import Console

from gradwatch_collector.api.shapes import timestamp
from gradwatch_collector.commands.options import database_option, existing_run, format_option, open_database
from gradwatch_collector.commands.slo_options import group_option, zone_option
from gradwatch_collector.objectives.exclusions import (
    Exclusion,
    UnknownExclusionError,
    What,
    exclude,
    load_exclusions,
    still_excluding,
    withdraw,
)
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.periods import read_span
from gradwatch_slo.problems import printable
from gradwatch_slo.report import rfc3339
from gradwatch_slo.tables import print_table


@click.command("exclude")
@database_option
@click.option("--run", "runs", multiple=True, metavar="RUN", help="A single run; repeatable.")
@click.option("--from", "first", metavar="DATE", help="Runs that ended from then on: RFC 3339, or a day.")
@click.option("--to", "last", metavar="DATE", help="Until then: RFC 3339, or a day, which belongs to it.")
@group_option
@zone_option
@click.option("--reason", required=True, help="Why: it is kept beside your name.")
def exclude_command(
    database: str,
    runs: tuple[str, ...],
    first: str | None,
    last: str | None,
    group: Mapping[str, str],
    zone: ZoneInfo,
    reason: str,
) -> None:
    """Let no objective count a run, or what ended within a period: maintenance, an outage, a cancelled sweep.

    Objectives are counted anew, for the past as well; a period may be still to come. Who did it, and why, is in
    the audit log.

    \b
    Example:
      gradwatch slo exclude --from 2026-11-01 --to 2026-11-02 --group team=vision --reason "storage was moved"
      gradwatch slo exclude --run demo-killed --reason "an exercise"
    """
    if not reason.strip():
        raise click.BadParameter("expected a reason", param_hint="'--reason'")
    chosen = list(_chosen(runs, first, last, group, zone))
    engine = open_database(database)
    now = time.time_ns()
    with transaction(engine) as connection:
        for run in runs:
            existing_run(connection, run)
        numbers = [exclude(connection, what, reason, now=now) for what in chosen]
    for number, what in zip(numbers, chosen, strict=True):
        click.echo(f"excluded {_words(what)} (number {number})")


def _chosen(
    runs: tuple[str, ...], first: str | None, last: str | None, group: Mapping[str, str], zone: ZoneInfo
) -> Iterator[What]:
    if runs:
        if first or last or group:
            raise click.UsageError("expected either --run, or --from and --to and perhaps --group")
        yield from (What(single_run=run) for run in dict.fromkeys(runs))
        return
    if first is None or last is None:
        raise click.UsageError("expected --run, or both --from and --to")
    try:
        start, end = read_span(first, last, zone)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    yield What(start=nanos(start), end=nanos(end), fields={name: [value] for name, value in group.items()})


@click.command("include")
@database_option
@click.argument("number", type=click.IntRange(min=1))
def include_command(database: str, number: int) -> None:
    """Count again what was excluded under a number.

    \b
    Example:
      gradwatch slo include 3
    """
    engine = open_database(database)
    try:
        with transaction(engine) as connection:
            found = withdraw(connection, number, now=time.time_ns())
            others = still_excluding(connection, found.what)
    except UnknownExclusionError as error:
        raise click.ClickException(f"{error}: see `gradwatch slo exclusions`") from error
    if others:
        numbers = ", ".join(str(each.exclusion_id) for each in others)
        part = "" if found.what.single_run is not None else ", at least in part,"
        click.echo(f"withdrawn: {_words(found.what)}; still excluded{part} under number {numbers}")
    else:
        click.echo(f"counted again: {_words(found.what)}")


@click.command("exclusions")
@database_option
@format_option("table", "json")
@click.option("--all", "withdrawn", is_flag=True, help="Those that were withdrawn, too.")
def exclusions_command(database: str, output: str, withdrawn: bool) -> None:
    """List what no objective counts, who said so, and why; newest first.

    \b
    Example:
      gradwatch slo exclusions --all
    """
    engine = open_database(database)
    with engine.connect() as connection:
        found = [each for each in load_exclusions(connection) if withdrawn or each.withdrawn_at is None]
    if output == "json":
        click.echo(json.dumps([_json(each) for each in found], indent=2))
        return
    rows = [
        (
            str(each.exclusion_id),
            _words(each.what) + ("" if each.withdrawn_at is None else " (withdrawn)"),
            each.reason,
            each.actor,
            str(timestamp(each.recorded_at))[:19].replace("T", " "),
        )
        for each in found
    ]
    print_table(Console(), ("NUMBER", "WHAT", "REASON", "BY", "AT"), rows)


def _json(each: Exclusion) -> dict[str, object]:
    return {
        "number": each.exclusion_id,
        "run_id": each.what.single_run,
        "from": timestamp(each.what.start),
        "to": timestamp(each.what.end),
        "group": {name: list(values) for name, values in each.what.fields.items()},
        "reason": each.reason,
        "actor": each.actor,
        "recorded_at": timestamp(each.recorded_at),
        "withdrawn_at": timestamp(each.withdrawn_at),
    }


def _words(what: What) -> str:
    if what.single_run is not None:
        return f"the run {printable(what.single_run)}"
    assert what.start is not None
    assert what.end is not None
    group = ", ".join(f"{name}={' or '.join(values)}" for name, values in what.fields.items())
    return f"{printable(group) or 'all'} from {rfc3339(moment(what.start))} to {rfc3339(moment(what.end))}"
