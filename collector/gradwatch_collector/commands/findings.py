"""``gradwatch findings``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import click
from rich.console import Console
from rich.text import Text

from gradwatch_collector.api.findings import FindingsQuery, list_findings, load_finding
from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError, Json, timestamp
from gradwatch_collector.commands.colours import OF_SEVERITY
from gradwatch_collector.commands.options import (
    AGE,
    database_option,
    existing_run,
    format_option,
    open_database,
)
from gradwatch_collector.findings import RULES, Severity
from gradwatch_collector.findings.acknowledging import UnknownFindingError, acknowledge
from gradwatch_collector.findings.silences import About, UnknownSilenceError, load_silences, silence, unsilence
from gradwatch_collector.findings.store import OPEN, RESOLVED
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import FOREVER
from gradwatch_slo.problems import printable
from gradwatch_slo.tables import print_table

_ALL = "all"
# What a database numbers rows with.
_NUMBER = click.IntRange(1, 2**63 - 1)

rule_option = click.option(
    "--rule", type=click.Choice(sorted(RULES)), metavar="RULE", help="Only of this rule (docs/findings.md)."
)


@click.group()
def findings() -> None:
    """What is wrong with runs, and who has it in hand."""


@findings.command("list")
@database_option
@format_option("table", "json")
@click.option("--run", "run_id", metavar="RUN", help="Only of this run.")
@click.option("--job", help="Only of runs of this job.")
@rule_option
@click.option("--severity", type=click.Choice([each.value for each in Severity]), help="Only as loud as this.")
@click.option("--state", type=click.Choice([OPEN, RESOLVED, _ALL]), default=OPEN, show_default=True)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, MAX_LIMIT))
@click.option("--cursor", help="Go on from `next_cursor` of an earlier call.")
def list_command(
    database: str,
    output: str,
    run_id: str | None,
    job: str | None,
    rule: str | None,
    severity: str | None,
    state: str,
    limit: int,
    cursor: str | None,
) -> None:
    """List findings, newest first; those that are open, unless told otherwise.

    \b
    Example:
      gradwatch findings list --severity page
    """
    query = FindingsQuery(
        state=None if state == _ALL else state,
        severity=severity,
        rule=rule,
        run_ids=() if run_id is None else (run_id,),
        job=job,
        limit=limit,
        cursor=cursor,
    )
    engine = open_database(database)
    try:
        with engine.connect() as connection:
            if run_id is not None:
                existing_run(connection, run_id)
            page = list_findings(connection, query)
    except BadCursorError as error:
        raise click.ClickException(str(error)) from error
    if output == "json":
        click.echo(json.dumps(page, indent=2))
        return
    if not page["findings"]:
        is_chosen = state != OPEN or any(each is not None for each in (severity, rule, job, cursor))
        click.echo("no such findings" if is_chosen else "nothing is wrong")
        return
    _print_findings(Console(), page["findings"])
    if page["next_cursor"]:
        click.echo(f"more: gradwatch findings list --cursor {page['next_cursor']}")


def _print_findings(console: Console, rows: list[Json]) -> None:
    print_table(
        console,
        ("ID", "SEVERITY", "RULE", "RUN", "WHERE", "FIRST SEEN", "IN HAND"),
        [
            (
                str(row["finding_id"]),
                Text(row["severity"], style=OF_SEVERITY[row["severity"]] if row["state"] == OPEN else "dim"),
                row["rule"] if row["state"] == OPEN else f"{row['rule']} (resolved)",
                row["run_id"],
                where(row),
                row["first_seen"][:19].replace("T", " "),
                " ".join(_in_hand(row)),
            )
            for row in rows
        ],
        right=("ID",),
    )


def heading(finding: Json) -> str:
    """Return what a finding is and how it stands, in one line."""
    return f"{finding['rule'].upper()} ({finding['severity']}, {finding['state']})"


def where(finding: Json) -> str:
    """Return where in its run a finding is, in one line."""
    places = ("step", "layer", "rank", "born_in")
    return " ".join(f"{name} {finding[name]}" for name in places if finding.get(name) is not None)


def _in_hand(finding: Json) -> Iterator[str]:
    if finding["acknowledged_by"] is not None:
        yield finding["acknowledged_by"]
    if finding["silenced_until"] is not None:
        yield f"(silent until {finding['silenced_until'][:16].replace('T', ' ')})"


@findings.command("show")
@click.argument("finding_id", metavar="ID", type=_NUMBER)
@database_option
@format_option("table", "json")
def show_command(finding_id: int, database: str, output: str) -> None:
    """Show one finding: its evidence, the likely cause, what to do.

    \b
    Example:
      gradwatch findings show 7
    """
    engine = open_database(database)
    with engine.connect() as connection:
        found = load_finding(connection, finding_id)
    if found is None:
        raise click.ClickException(
            f"there is no finding {finding_id}: see `gradwatch findings list --state all`"
        )
    if output == "json":
        click.echo(json.dumps(found, indent=2))
        return
    for line in _lines(found):
        click.echo(printable(line))


def _lines(found: Json) -> Iterator[str]:
    yield f"{heading(found)} of run {found['run_id']} {where(found)}"
    yield f"  first seen  {found['first_seen']}, last {found['last_seen']}"
    for name, value in found["evidence"].items():
        yield f"  {name:<10}  {value if isinstance(value, str) else json.dumps(value)}"
    yield f"  cause       {found['cause']}"
    yield f"  action      {found['action']}"
    yield f"  runbook     {found['runbook_url']}"
    if found["acknowledged_by"] is not None:
        note = f": {found['note']}" if found["note"] else ""
        yield f"  in hand     {found['acknowledged_by']} since {found['acknowledged_at']}{note}"
    if found["silenced_until"] is not None:
        yield f"  silent      until {found['silenced_until']}"


@findings.command("ack")
@click.argument("finding_ids", metavar="ID...", type=_NUMBER, nargs=-1, required=True)
@database_option
@click.option("--note", metavar="TEXT", help="What the others should know.")
def ack_command(finding_ids: tuple[int, ...], database: str, note: str | None) -> None:
    """Say that you have findings in hand. Their alerts go on until what they tell of is over, or silenced.

    Corrupt checkpoints of a run that is over are done with then: nothing else may come to tell so.

    \b
    Example:
      gradwatch findings ack 7 --note "restarting from step 4000 with half the learning rate"
    """
    engine = open_database(database)
    now = time.time_ns()
    try:
        with transaction(engine) as connection:
            for finding_id in finding_ids:
                acknowledge(connection, finding_id, note, now=now)
    except UnknownFindingError as error:
        raise click.ClickException(f"{error}: see `gradwatch findings list --state all`") from error
    click.echo(f"in hand: {', '.join(map(str, finding_ids))}")


@findings.command("silence")
@database_option
@click.option("--run", "run_id", metavar="RUN", help="Findings of this run.")
@click.option(
    "--job", metavar="PATTERN", help="Findings of runs of these jobs; a shell pattern such as 'llm-*'."
)
@rule_option
@click.option("--for", "age", type=AGE, required=True, metavar="AGE", help="For how long: 4h, 2d, 1w.")
@click.option("--reason", required=True, help="Why: it is kept beside your name.")
def silence_command(
    database: str, run_id: str | None, job: str | None, rule: str | None, age: int, reason: str
) -> None:
    """Let findings raise no alert for a while. They are found, stored and shown all the same.

    Outages of many runs are silenced by their --rule only, the cost of a job by that or by --job. A run has to
    be known; --job is for those to come as well.

    \b
    Example:
      gradwatch findings silence --job "rl-*" --rule plateau --for 2d --reason "rewards are sparse by design"
    """
    if not reason.strip():
        raise click.BadParameter("expected a reason", param_hint="'--reason'")
    if run_id is None and not job and rule is None:
        raise click.UsageError("expected --run, --job or --rule: which findings?")
    now = time.time_ns()
    if not 0 < age < FOREVER - now:
        raise click.BadParameter(
            "a silence lasts, and ends: expected an age such as 4h, 2d or 1w", param_hint="'--for'"
        )
    engine = open_database(database)
    about = About(single_run=run_id, job=job or None, rule=rule)
    with transaction(engine) as connection:
        if run_id is not None:
            # Most likely misspelt: who silences what is to come silences a job.
            run = existing_run(connection, run_id)
            if not about.fits(run_id, run.job, rule or ""):
                raise click.ClickException(f"run {printable(run_id)!r} is of job {printable(run.job)!r}")
        number = silence(connection, about, now + age, reason, now=now)
    click.echo(f"silent until {timestamp(now + age)}: {_words(about)} (number {number})")


@findings.command("unsilence")
@database_option
@click.argument("number", type=_NUMBER)
def unsilence_command(database: str, number: int) -> None:
    """Let findings raise alerts again.

    \b
    Example:
      gradwatch findings unsilence 3
    """
    engine = open_database(database)
    try:
        with transaction(engine) as connection:
            ended = unsilence(connection, number, now=time.time_ns())
    except UnknownSilenceError as error:
        raise click.ClickException(f"{error}: see `gradwatch findings silences`") from error
    click.echo(f"alerts again: {_words(ended.about)}")


@findings.command("silences")
@database_option
@format_option("table", "json")
def silences_command(database: str, output: str) -> None:
    """List the silences in force, newest first.

    \b
    Example:
      gradwatch findings silences
    """
    engine = open_database(database)
    with engine.connect() as connection:
        found = load_silences(connection, time.time_ns())
    if output == "json":
        rows = [
            {
                "number": each.silence_id,
                "run_id": each.about.single_run,
                "job": each.about.job,
                "rule": each.about.rule,
                "until": timestamp(each.until),
                "reason": each.reason,
                "actor": each.actor,
                "recorded_at": timestamp(each.recorded_at),
            }
            for each in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo("nothing is silenced")
        return
    print_table(
        Console(),
        ("NUMBER", "WHAT", "UNTIL", "REASON", "BY"),
        [
            (
                str(each.silence_id),
                _words(each.about),
                str(timestamp(each.until))[:16].replace("T", " "),
                each.reason,
                each.actor,
            )
            for each in found
        ],
    )


def _words(about: About) -> str:
    told = (("rule", about.rule), ("run", about.single_run), ("job", about.job))
    return ", ".join(f"{name} {value}" for name, value in told if value is not None)
