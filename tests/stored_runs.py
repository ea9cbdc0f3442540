"""Runs as they are stored, for the tests of objectives, with everything ordinary filled in."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from sqlalchemy import Connection, insert

from gradwatch_collector.objectives.changes import tell_changed
from gradwatch_collector.objectives.judging import nanoseconds
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

NOW = datetime(2026, 3, 29, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)

StoredRun = dict[str, Any]
_ids = count()


def run(
    status: Status = Status.SUCCEEDED,
    *,
    started: datetime = NOW - 3 * HOUR,
    lasted: timedelta = HOUR,
    reached: timedelta | None = None,
    deadline: timedelta | None = None,
    baseline: timedelta | None = None,
    **columns: Any,
) -> StoredRun:
    """A run of an hour; ``reached`` is its time to the target ``val_loss<=0.5``."""
    ended = None if status is Status.RUNNING else nanos(started + lasted)
    return {
        "run_id": f"run-{next(_ids)}",
        "job": "digits",
        "model": "mlp",
        "dataset": "digits",
        "team": "vision",
        "tier": "production",
        "status": status,
        "reason": None,
        "attempt": 1,
        "rank_count": 1,
        "started_at": nanos(started),
        "ended_at": ended,
        "last_seen_at": nanos(started) if ended is None else ended,
        "last_step": None,
        "last_loss": None,
        "last_loss_nonfinite": False,
        "target": None if reached is None else "val_loss<=0.5",
        "target_reached_at": None if reached is None else nanos(started + reached),
        "deadline_seconds": None if deadline is None else deadline.total_seconds(),
        "baseline": None if baseline is None else nanoseconds(baseline),
        **columns,
    }


def _attempt(row: StoredRun) -> dict[str, Any]:
    names = ("run_id", "attempt", "status", "reason", "rank_count", "started_at", "ended_at")
    return {name: row.get(name) for name in names} | {"will_retry": False, "evidence": {}}


def store_runs(connection: Connection, runs: Iterable[StoredRun]) -> None:
    """Store them as the registry does."""
    rows = list(runs)
    if rows:
        connection.execute(insert(schema.run), rows)
        connection.execute(insert(schema.attempt), [_attempt(row) for row in rows])
        tell_changed(connection, [row["ended_at"] for row in rows])
