"""``gradwatch runs watch``."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import click
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.api.findings import FindingsQuery, list_findings
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.commands.colours import OF_SEVERITY, OF_STATUS
from gradwatch_collector.commands.options import FiniteRange, database_option, open_database
from gradwatch_collector.commands.watch_table import HEADINGS, MOST_BARS, RIGHT, bars_within, fitted
from gradwatch_collector.findings.figures import SECOND, newest
from gradwatch_collector.findings.levels import median
from gradwatch_collector.findings.losses import own_losses
from gradwatch_collector.findings.run_reader import RunReader
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.reports.wording import clock_time, duration, number
from gradwatch_collector.runs.facts import RunRow, load_runs, recent
from gradwatch_collector.storage import schema
from gradwatch_slo.tables import print_table

_BARS: Final = "▁▂▃▄▅▆▇█"
_NOT_FINITE: Final = "x"
_NOTHING: Final = "no run is live or ended within the last hour: add gradwatch.watch(model, optimizer) to one"


@click.command("watch")
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@database_option
@click.option("--job", help="Only runs of this job.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 200), help="The newest so many.")
@click.option("--interval", default=2.0, show_default=True, type=FiniteRange(0.2, 3600), help="In seconds.")
@click.option("--once", is_flag=True, help="Print it once; so too where there is no terminal.")
def watch_command(
    run_ids: Sequence[str], database: str, job: str | None, limit: int, interval: float, once: bool
) -> None:
    """Watch runs that are live or ended within the last hour: loss, pace, open findings. Ctrl-C ends it.

    \b
    Example:
      gradwatch runs watch --job digits
    """
    engine, console = open_database(database), Console()
    watched = _Watched(engine, run_ids, job, limit)
    if once or not console.is_terminal:
        now = time.time_ns()
        rows = watched.look(now)
        if not rows:
            click.echo(_NOTHING)
        elif console.is_terminal:
            console.print(_table(rows, now, console.width))
        else:
            print_table(console, HEADINGS, _cells(rows, now, MOST_BARS), right=RIGHT)
        return
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                now = time.time_ns()
                live.update(_picture(watched.look(now), now, console.width), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        return


@dataclass(frozen=True, slots=True)
class _Row:
    """One run, what was read of it, and its open findings."""

    run: RunRow
    view: RunView | None
    findings: Sequence[Json]


class _Watched:
    """Reads what is new of the runs that are looked at."""

    def __init__(self, engine: Engine, run_ids: Sequence[str], job: str | None, limit: int) -> None:
        self._engine = engine
        self._conditions = [
            *([schema.run.c.run_id.in_(run_ids)] if run_ids else []),
            *([schema.run.c.job == job] if job is not None else []),
        ]
        self._job, self._limit = job, limit
        self._reader = RunReader()
        self._views: dict[str, RunView] = {}

    def look(self, now: int) -> list[_Row]:
        """Return how the runs stand, the newest first."""
        with self._engine.connect() as connection:
            runs = load_runs(connection, recent(now), *self._conditions, limit=self._limit)
            for view in self._reader.read(connection, runs, now, lambda: True):
                self._views[view.run.run_id] = view
            findings: dict[str, list[Json]] = defaultdict(list)
            for found in list_findings(connection, FindingsQuery(state="open", job=self._job))["findings"]:
                findings[found["run_id"]].append(found)
        return [_Row(run, self._views.get(run.run_id), findings[run.run_id]) for run in runs]


def _picture(rows: Sequence[_Row], now: int, width: int) -> Group:
    counts: Mapping[str, int] = {
        status: len(list(each)) for status, each in itertools.groupby(sorted(row.run.status for row in rows))
    }
    heading = ", ".join(f"{count} {status}" for status, count in counts.items()) or _NOTHING
    return Group(Text(f"{clock_time(now)} UTC  {heading}"), _table(rows, now, width))


def _table(rows: Sequence[_Row], now: int, width: int) -> Table:
    return fitted(_cells(rows, now, bars_within(width)), width)


def _cells(rows: Sequence[_Row], now: int, bars: int) -> list[tuple[Text | str, ...]]:
    return [
        (
            row.run.run_id,
            row.run.job,
            Text(row.run.status, style=OF_STATUS[row.run.status]),
            "" if row.run.last_step is None else str(row.run.last_step + 1),
            _loss(row.run),
            sparkline(_course(row.view, bars)),
            _pace(row.view),
            duration(max(0, now - row.run.last_seen_at) / SECOND),
            _findings(row.findings),
        )
        for row in rows
    ]


def _loss(run: RunRow) -> str:
    if run.last_loss_nonfinite:
        return "NaN"
    return "" if run.last_loss is None else number(run.last_loss)


def _course(view: RunView | None, bars: int) -> Sequence[float]:
    """The loss so far in at most so many means; NaN where no value was finite."""
    told = own_losses(view) if view is not None and view.every(c.LOSS) else ()
    if not told or not len(told[0].course):
        return []
    course = told[0].course
    stretches = np.array_split(np.arange(len(course)), min(bars, len(course)))
    means = np.nan_to_num(course.mean)
    return [
        float(np.average(means[each], weights=course.finite[each])) if course.finite[each].any() else math.nan
        for each in stretches
    ]


def sparkline(values: Sequence[float]) -> str:
    """Return numbers as bars from the least to the greatest; what is not finite is told apart by its sign."""
    known = [value for value in values if math.isfinite(value)]
    least, most = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (most - least) if most > least else 0.0
    return "".join(
        _BARS[round((value - least) * scale)] if math.isfinite(value) else _NOT_FINITE for value in values
    )


def _pace(view: RunView | None) -> str:
    steps = view.first(c.STEP_DURATION) if view is not None else None
    if steps is None or newest(steps) is None:
        return ""
    return duration(median(steps.recent.values[-100:]))


def _findings(findings: Sequence[Json]) -> Text:
    loud = sorted(findings, key=lambda each: (list(OF_SEVERITY).index(each["severity"]), each["rule"]))
    return Text(", ").join(
        Text(f"{each['rule']} ({each['severity']})", style=OF_SEVERITY[each["severity"]]) for each in loud
    )
