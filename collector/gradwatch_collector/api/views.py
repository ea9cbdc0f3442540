"""The JSON shape of one run, as the API and ``gradwatch runs --format json`` give them.

Their JSON Schemas are in ``schemas/``. Times are RFC 3339 UTC, numbers are never NaN (null beside a flag),
unknown is null, lists are newest first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, literal, select

from gradwatch_collector.api.findings import findings_of_run
from gradwatch_collector.api.layers import layer_summaries
from gradwatch_collector.api.run_list import of_team, run_json
from gradwatch_collector.api.shapes import MAX_LIMIT, Json, timestamp
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs import checkpoints
from gradwatch_collector.runs.effective_time import effective_time
from gradwatch_collector.runs.environment import environment
from gradwatch_collector.runs.facts import RunRow, load_runs, team_of
from gradwatch_collector.storage import schema

_LONGEST_BODY = 10_000


def is_shown(connection: Connection, run_id: str, team: str | None) -> bool:
    """Return whether what is stored of a run, or of what sent telemetry and is none, may be shown to a team."""
    return team is None or connection.scalar(select(team_of(literal(run_id)))) == team


# What is shown of a run beside itself.
SECTIONS: Final = (
    "attempts", "history", "events", "findings", "layers", "checkpoints", "checkpoint_record", "effective_time",
    "environment",
)  # fmt: skip


def show_run(
    connection: Connection, run_id: str, team: str | None = None, sections: Collection[str] = SECTIONS
) -> Json | None:
    """Return one run with its attempts, events, findings, layers, checkpoints, time and environment.

    With ``team`` None if the run is another's, and nothing is told of other teams' runs. ``sections``: which of
    `SECTIONS` are read.
    """
    row = next(iter(load_runs(connection, schema.run.c.run_id == run_id, *of_team(team))), None)
    if row is None:
        return None
    read: dict[str, Callable[[], Any]] = {
        "attempts": lambda: _attempts(connection, run_id),
        "history": lambda: _history(connection, run_id),
        "events": lambda: _events(connection, run_id),
        "findings": lambda: findings_of_run(connection, run_id, alone=team is not None),
        "layers": lambda: [layer.json() for layer in layer_summaries(connection, run_id, row.attempt)],
        "checkpoints": lambda: _checkpoints(connection, run_id),
        "checkpoint_record": lambda: _checkpoint_record(connection, row),
        "effective_time": lambda: _effective_time(connection, row),
        "environment": lambda: environment(connection, run_id, row.attempt),
    }
    return {**run_json(row), **{name: read[name]() for name in SECTIONS if name in sections}}


_later = schema.process.alias().c
# One whose command began a later attempt by itself is shown with that.
_SUPERVISES = (schema.process.c.rank == NO_RANK) & ~exists().where(
    _later.run_id == schema.process.c.run_id,
    _later.rank == NO_RANK,
    _later.instance == schema.process.c.instance,
    _later.attempt > schema.process.c.attempt,
)


def _attempts(connection: Connection, run_id: str) -> list[Json]:
    attempt = schema.attempt.c
    rows = connection.execute(
        select(schema.attempt).where(attempt.run_id == run_id).order_by(attempt.attempt.desc())
    ).mappings()
    return [
        {
            "attempt": row["attempt"],
            "status": row["status"],
            "reason": row["reason"],
            "cause_rank": row["cause_rank"],
            "rank_count": row["rank_count"],
            "will_retry": row["will_retry"],
            "started_at": timestamp(row["started_at"]),
            "ended_at": timestamp(row["ended_at"]),
            "evidence": row["evidence"],
            "processes": _processes(connection, run_id, row["attempt"], schema.process.c.rank != NO_RANK),
            "supervisors": _processes(connection, run_id, row["attempt"], _SUPERVISES),
        }
        for row in rows
    ]


def _processes(connection: Connection, run_id: str, attempt: int, condition: ColumnElement[bool]) -> list[Json]:
    process = schema.process.c
    rows = connection.execute(
        select(schema.process)
        .where(process.run_id == run_id, process.attempt == attempt, process.is_run, condition)
        .order_by(process.rank, process.started_at)
    ).mappings()
    return [
        {
            "rank": _rank(row),
            "instance": row["instance"],
            "status": row["status"],
            "reason": row["reason"],
            "exit_code": row["exit_code"],
            "evidence": row["evidence"],
            "started_at": timestamp(row["started_at"]),
            "ended_at": timestamp(row["ended_at"]),
            "last_seen_at": timestamp(row["last_seen_at"]),
            "last_step": row["last_step"],
        }
        for row in rows
    ]


def _rank(row: RowMapping) -> int | None:
    """Return the rank; a supervisor has none."""
    rank: int = row["rank"]
    return None if rank == NO_RANK else rank


def _history(connection: Connection, run_id: str) -> list[Json]:
    history = schema.run_history.c
    rows = connection.execute(
        select(schema.run_history).where(history.run_id == run_id).order_by(history.history_id.desc())
    ).mappings()
    return [
        {
            "recorded_at": timestamp(row["recorded_at"]),
            "attempt": row["attempt"],
            "status": row["status"],
            "reason": row["reason"],
            "evidence": row["evidence"],
        }
        for row in rows
    ]


def _events(connection: Connection, run_id: str) -> list[Json]:
    event = schema.event.c
    rows = connection.execute(
        select(schema.event)
        .where(event.run_id == run_id)
        .order_by(event.time.desc(), event.sequence.desc())
        .limit(MAX_LIMIT)
    ).mappings()
    return [
        {
            "name": row["name"],
            "time": timestamp(row["time"]),
            "attempt": row["attempt"],
            "rank": _rank(row),
            "body": _shortened(row["body"]),
            "attributes": row["attributes"],
        }
        for row in rows
    ]


def _checkpoints(connection: Connection, run_id: str) -> list[Json]:
    return [
        {
            "time": timestamp(row["time"]),
            "attempt": row["attempt"],
            "rank": _rank(row),
            "state": row["state"],
            "name": row["name"],
            "step": row["step"],
            "bytes": row["size"],
            "seconds": row["seconds"],
            "error": row["error"],
        }
        for row in checkpoints.newest(connection, run_id, MAX_LIMIT)
    ]


def _checkpoint_record(connection: Connection, row: RunRow) -> Json:
    record = checkpoints.record_of(connection, row.run_id)
    return {
        "saved": record.saved,
        "failed": record.failed,
        "success_rate": record.success_rate,
        "last_good_at": timestamp(record.last_good_at),
        "last_good_step": record.last_good_step,
        # Up to where the run was last known to be: then or never a crash would have cost it.
        "last_good_age_seconds": record.age_seconds(row.last_seen_at if row.ended_at is None else row.ended_at),
    }


def _effective_time(connection: Connection, row: RunRow) -> Json:
    found = effective_time(connection, row)
    return {
        "ratio": None if found is None else found.ratio,
        "productive_seconds": None if found is None else found.productive,
        "waiting_seconds": None if found is None else found.waiting,
        "lost_seconds": None if found is None else found.lost,
        "wall_seconds": None if found is None else found.wall,
    }


def _shortened(body: str | None) -> str | None:
    # A thousand events are shown, and a log record may have megabytes.
    return body if body is None or len(body) <= _LONGEST_BODY else body[: _LONGEST_BODY - 1] + "…"
