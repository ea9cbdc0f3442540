"""What objectives cost over the registry of a large fleet: reports, ticks, a thousand objectives.

    python benchmarks/slo.py [--runs 4000000] [--short]

The registry is filled straight into the database, counted by the hour as a collector does beside its other
work, and then asked. What is measured takes its place between the marks of docs/benchmarks.md; a short run
writes nothing, and prints its tables.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, delete

from collection.figures import Figure, at_most, table
from collection.servers import new_database, postgresql
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.live import LiveRuns
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Selection
from gradwatch_slo.objective import Objective
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.windows import TimeWindow
from objectives import registry
from page import PAGE, write

_TIMES: Final = 15
_TICKS: Final = 30


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4_000_000, help="in the registry")
    parser.add_argument("--folder", type=Path, help="where the databases are made (default: where others are)")
    parser.add_argument("--short", action="store_true", help="a minute in all: does it work at all")
    options = parser.parse_args()
    runs = 40_000 if options.short else options.runs
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        servers = {"SQLite": f"sqlite:///{folder}", "PostgreSQL": stack.enter_context(postgresql(folder))}
        found = [figure for name, server in servers.items() for figure in figures(name, server, runs)]
    about = f"{datetime.now(UTC):%Y-%m-%d}: {runs:,} runs in {registry.DAYS} days, {registry.JOBS:,} jobs."
    print(f"{about}\n\n{table(found)}")
    if not options.short:
        write(PAGE, {"objectives": f"{about}\n\n{table(found)}"})
    return 0


def figures(name: str, server: str, runs: int) -> Iterator[Figure]:
    """Fill one database, and ask it."""
    url = new_database(server, "objectives")
    engine = db.connect(url)
    now = time.time_ns()
    print(f"{name}: storing {runs:,} runs", file=sys.stderr)
    registry.fill(engine, runs, now)
    objectives = default_objectives().objectives
    yield Figure(
        f"{name}, counting all of it for the first time", "", f"{_count(engine, objectives, now):.0f} s"
    )
    for what, most, duration in (("28 days", 0.3, Duration(28, "d")), ("11 months", 1.0, Duration(11, "M"))):
        over = [replace(each, window=TimeWindow(duration)) for each in objectives]
        report = _seconds(lambda over=over: _evaluate(engine, over, now))  # type: ignore[misc]
        yield at_most(f"{name}, all default objectives over {what}", most, report, " s", digits=3)
    by_team = [replace(each, group_by=("team",)) for each in objectives]
    yield Figure(
        f"{name}, the same over 28 days by team, which nobody counts",
        "",
        f"{_seconds(lambda: _evaluate(engine, by_team, now), 3):.2f} s",
    )
    command = (sys.executable, "-m", "gradwatch.cli", "slo", "report", "--db", url)
    whole = _seconds(lambda: subprocess.run(command, check=True, capture_output=True), 5)
    yield Figure(f"{name}, `gradwatch slo report`, start of Python included", "", f"{whole:.2f} s")
    yield from _ticks(name, engine, objectives, runs)
    yield from _thousand(name, engine, now)
    engine.dispose()


def _ticks(name: str, engine: Engine, objectives: Sequence[Objective], runs: int) -> Iterator[Figure]:
    evaluator = Evaluator(
        engine, LiveRuns(), objectives, lease=Lease(engine, seconds=3600), lost_after=30.0, interval=1.0
    )
    taken = []
    evaluator.tick()
    for number in range(_TICKS):
        registry.add(engine, runs + number, time.time_ns())
        began = time.perf_counter()
        evaluator.tick()
        taken.append(1e3 * (time.perf_counter() - began))
    late = f" (longest {max(taken):.0f})"
    yield at_most(f"{name}, a tick in which a run ended", 100, statistics.median(taken), " ms", late)
    for table_ in (schema.attempt, schema.run):
        with db.transaction(engine) as connection:
            connection.execute(delete(table_).where(table_.c.run_id >= f"run-{runs:08d}"))


def _thousand(name: str, engine: Engine, now: int) -> Iterator[Figure]:
    success = default_objectives().objectives[1]
    many = [
        replace(
            success,
            name=f"success-of-{number}",
            target=Decimal("0.95"),
            selection=Selection((("job", (f"job-{number}",)),)),
            group_by=(),
        )
        for number in range(1_000)
    ]
    counted = _count(engine, many, now)
    yield Figure(f"{name}, counting all of it for 1,000 objectives for the first time", "", f"{counted:.0f} s")
    seconds = _seconds(lambda: _evaluate(engine, many, now), 3)
    yield at_most(f"{name}, 1,000 objectives over 28 days", 5, seconds, " s", digits=2)


def _count(engine: Engine, objectives: Sequence[Objective], now: int) -> float:
    indicators = {Indicator.of(each) for each in objectives}
    began, settled = time.perf_counter(), False
    while not settled:
        with db.transaction(engine) as connection:
            until = time.monotonic() + 1.0
            settled = keep_counted(connection, indicators, now, lambda until=until: time.monotonic() < until)  # type: ignore[misc]
    return time.perf_counter() - began


def _evaluate(engine: Engine, objectives: Sequence[Objective], now: int) -> None:
    with db.of_one_moment(engine).connect() as connection:
        reports = evaluate_objectives(connection, objectives, now)
    assert sum(each.total for each in reports) > 0


def _seconds(act: Callable[[], object], times: int = _TIMES) -> float:
    """Median."""
    act()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
