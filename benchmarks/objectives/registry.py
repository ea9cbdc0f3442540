"""A registry like that of a large fleet: four million runs in eleven months, straight into the table.

The size is that of the two clusters in Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning
Research Clusters" (2025): 4 million jobs in 11 months. The rest is made up: 2 000 jobs of 20 teams, one run in
ten of tier production and one in ten with a target, 70 % succeeded, 15 % failed, 12 % cancelled, 3 % lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Engine, insert

from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

DAYS: Final = 334
JOBS: Final = 2_000
TEAMS: Final = 20
_NANOS: Final = 1_000_000_000
_AT_ONCE: Final = 20_000
_STATUSES: Final = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.LOST)
_COLUMNS: Final = (
    "run_id", "job", "model", "dataset", "team", "tier", "status", "reason", "attempt", "rank_count",
    "started_at", "ended_at", "last_seen_at", "last_loss_nonfinite", "target", "deadline_seconds",
    "target_reached_at", "baseline",
)  # fmt: skip
_SUMMARY: Final = (
    "run_id", "steps", "observed_steps", "unhealthy_steps", "nonfinite_steps", "checkpoints",
    "failed_checkpoints", "gpu_utilization", "collective_p95_ratio", "memory_headroom", "step_cost_ratio",
    "quality_delta", "effective_time_ratio",
)  # fmt: skip


def fill(engine: Engine, runs: int, now: int) -> None:
    """Store runs that ended in the days before ``now`` (Unix nanoseconds), and their summaries."""
    for rows in _batches(runs, now):
        with db.transaction(engine) as connection:
            _insert(connection, "run", _COLUMNS, rows)
            _insert(connection, "run_summary", _SUMMARY, _summaries([row[0] for row in rows]))
    for table in ("run", "run_summary"):
        with db.transaction(engine) as connection:
            connection.exec_driver_sql(f"ANALYZE {table}")


def _insert(
    connection: Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    if connection.dialect.name == "postgresql":
        cursor: Any = connection.connection.cursor()
        with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 - our names
        connection.exec_driver_sql(statement, list(rows))


def _summaries(run_ids: Sequence[str]) -> list[tuple[Any, ...]]:
    random = np.random.default_rng(len(run_ids))
    bad, shares = random.random((len(run_ids), 2)).tolist(), random.random((len(run_ids), 6)).tolist()
    return [
        (run_id, 10_000, 10_000, int(20 * few), int(some < 0.02), 10, int(some < 0.03), *values)
        for run_id, (few, some), values in zip(run_ids, bad, shares, strict=True)
    ]


def add(engine: Engine, number: int, now: int) -> None:
    """Store one more, as the registry does: an attempt, and that its hour has changed."""
    row = dict(zip(_COLUMNS, next(_batches(1, now, first=number))[0], strict=True))
    with db.transaction(engine) as connection:
        connection.execute(insert(schema.run).values(**{**row, "ended_at": now, "last_seen_at": now}))
        connection.execute(
            insert(schema.attempt).values(
                run_id=row["run_id"],
                attempt=1,
                status=row["status"],
                rank_count=1,
                will_retry=False,
                started_at=row["started_at"],
                ended_at=now,
                evidence={},
            )
        )
        connection.execute(insert(schema.run_change).values(hour=now // (3600 * _NANOS)))


def _batches(runs: int, now: int, first: int = 0) -> Iterator[list[tuple[Any, ...]]]:
    random = np.random.default_rng(runs + first)
    for start in range(0, runs, _AT_ONCE):
        count = min(_AT_ONCE, runs - start)
        ago = (1 - np.arange(start + 1, start + count + 1) / runs) * DAYS * 86_400
        ended = (now - (ago * _NANOS).astype(np.int64)).tolist()
        lasted = (np.exp(random.normal(8, 2, count)).clip(1, 7 * 86_400) * _NANOS).astype(np.int64).tolist()
        job = random.integers(JOBS, size=count).tolist()
        status = random.choice(4, size=count, p=(0.70, 0.15, 0.12, 0.03)).tolist()
        share = random.random((count, 2)).tolist()
        yield [
            (
                f"run-{first + start + i:08d}",
                f"job-{job[i]}",
                f"model-{job[i] % 50}",
                f"data-{job[i] % 30}",
                f"team-{job[i] % TEAMS}",
                "production" if job[i] % 10 == 0 else "experiment",
                _STATUSES[status[i]],
                "RuntimeError" if status[i] == 1 else None,
                1,
                8,
                ended[i] - lasted[i],
                ended[i],
                ended[i],
                False,
                "val_loss<=0.5" if share[i][0] < 0.1 else None,
                None,
                ended[i] - lasted[i] // 2 if share[i][0] < 0.1 and share[i][1] < 0.9 else None,
                int(lasted[i] * (0.4 + share[i][1])) if share[i][0] < 0.1 else None,
            )
            for i in range(count)
        ]
