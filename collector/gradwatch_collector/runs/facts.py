"""Runs as read from the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, case, exists, func, select, union

from gradwatch import conventions as c
from gradwatch_collector.records import Attributes
from gradwatch_collector.runs.telling import number, text
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

# What ended is looked at for another hour: a run may live and end, and its NaNs arrive, between two ticks. So
# is what ended before and became known only now, from a disk or by a clock that is behind.
_RECENT = 3600 * 1_000_000_000
_LONGEST_DEADLINE = 1e9  # seconds: 30 years
_LONGEST_LABEL = 256  # what becomes a Prometheus label

JobLabels = tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One row of `run`, with what its latest attempt adds. Moments in Unix nanoseconds."""

    run_id: str
    job: str
    model: str | None
    dataset: str | None
    team: str | None
    tier: str
    status: Status
    reason: str | None
    attempt: int
    rank_count: int
    started_at: int
    ended_at: int | None
    last_seen_at: int
    last_step: int | None
    last_loss: float | None
    last_loss_nonfinite: bool
    host: str | None
    commit: str | None
    target: str | None
    deadline_seconds: float | None
    target_reached_at: int | None
    baseline: int | None
    outage_at: int | None
    will_retry: bool
    cause_rank: int | None

    @property
    def silent_in_outage(self) -> bool:
        """Whether the run fell silent in an outage of many and has not been heard since."""
        return (
            self.status is Status.RUNNING and self.outage_at is not None and self.last_seen_at <= self.outage_at
        )

    @property
    def job_labels(self) -> JobLabels:
        """Values of ``conventions.JOB_LABELS``; unknown is empty."""
        return (self.job, self.model or "", self.dataset or "", self.team or "", self.tier)


def job_labels_of(resource: Attributes) -> JobLabels:
    """Return the values of ``conventions.JOB_LABELS`` a resource's run has; unknown is empty."""
    columns = described(resource)
    return (
        columns["job"],
        columns["model"] or "",
        columns["dataset"] or "",
        columns["team"] or "",
        columns["tier"],
    )


def described(resource: Attributes) -> dict[str, Any]:
    """Return the columns of `run` that its resource attributes describe."""
    tier = resource.get(c.TIER)
    deadline = number(resource.get(c.DEADLINE))
    return {
        "job": text(resource.get(c.SERVICE_NAME), _LONGEST_LABEL) or "unknown",
        "model": text(resource.get(c.MODEL), _LONGEST_LABEL),
        "dataset": text(resource.get(c.DATASET), _LONGEST_LABEL),
        "team": text(resource.get(c.TEAM), _LONGEST_LABEL),
        "tier": tier if tier in (c.TIER_PRODUCTION, c.TIER_EXPERIMENT) else c.TIER_EXPERIMENT,
        "target": text(resource.get(c.TARGET)),
        "deadline_seconds": deadline if deadline is not None and 0 < deadline <= _LONGEST_DEADLINE else None,
    }


def team_of(run_id: ColumnElement[str]) -> ColumnElement[str | None]:
    """Return SQL for the team of a run, or of what sent telemetry that is no run; ``run_id`` may be a column.

    A run's is the one that it is shown with; else it is that of the process that was first to send anything.
    """
    run, process = schema.run.alias().c, schema.process.alias().c
    of_sender = (
        select(process.resource[c.TEAM].as_string())
        .where(process.run_id == run_id)
        .order_by(process.started_at)
        .limit(1)
    )
    of_run = select(run.team).where(run.run_id == run_id)
    is_run = exists().where(run.run_id == run_id)
    return case((is_run, of_run.scalar_subquery()), else_=of_sender.scalar_subquery())


def moment(nanos: int) -> datetime:
    """Return the UTC datetime of Unix nanoseconds, to the microsecond."""
    return datetime.fromtimestamp(nanos // 1_000_000_000, UTC) + timedelta(
        microseconds=nanos % 1_000_000_000 // 1000
    )


def nanos(when: datetime) -> int:
    """Return the Unix nanoseconds of a timezone-aware datetime, exactly."""
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000


def load_runs(
    connection: Connection,
    *conditions: ColumnElement[bool],
    order: Sequence[ColumnElement[Any]] = (schema.run.c.started_at.desc(), schema.run.c.run_id.desc()),
    limit: int | None = None,
) -> list[RunRow]:
    """Read runs that meet all conditions (over ``schema.run``), newest first unless told otherwise."""
    run, attempt = schema.run.c, schema.attempt.c
    statement: Select[tuple[object, ...]] = (
        select(*schema.run.c, attempt.will_retry, attempt.cause_rank)
        .join(schema.attempt, (attempt.run_id == run.run_id) & (attempt.attempt == run.attempt))
        .where(*conditions)
        .order_by(*order)
    )
    if limit is not None:
        statement = statement.limit(limit)
    return [_row(row) for row in connection.execute(statement).mappings()]


def recent(now: int) -> ColumnElement[bool]:
    """Return the condition, over ``schema.run``, of runs that are live or of an ending of the last hour."""
    run, history, since = schema.run.c, schema.run_history.c, now - _RECENT
    return run.run_id.in_(
        # Each by its index: where an alternative is a subquery, PostgreSQL reads all runs there ever were.
        union(
            select(run.run_id).where(run.status == Status.RUNNING),
            select(run.run_id).where(run.ended_at >= since),
            select(history.run_id).where(history.recorded_at >= since),
        )
    )


def load_headroom(connection: Connection, now: int) -> dict[str, float]:
    """Return what the tightest rank of each recent run has left of its memory, as a share of the limit."""
    run, process = schema.run.c, schema.process.c
    rows = connection.execute(
        select(process.run_id, func.min(process.memory_headroom))
        .join(schema.run, (run.run_id == process.run_id) & (run.attempt == process.attempt))
        .where(recent(now), process.memory_headroom.is_not(None))
        # Who was started again within an attempt left its predecessor behind.
        .where((run.status != Status.RUNNING) | (process.status == Status.RUNNING))
        .group_by(process.run_id)
    )
    return {run_id: float(left) for run_id, left in rows}


def _row(row: RowMapping) -> RunRow:
    return RunRow(**{**row, "status": Status(row["status"])})
