"""What a run's processes said of themselves."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from gradwatch_collector.records import NO_RANK
from gradwatch_collector.storage import schema


def environment(connection: Connection, run_id: str, attempt: int) -> dict[str, Any]:
    """Return the resource attributes of the lowest rank of an attempt, the newest of its processes."""
    process = schema.process.c
    resource: dict[str, Any] | None = connection.scalar(
        select(process.resource)
        .where(process.run_id == run_id, process.attempt == attempt)
        .order_by(process.rank == NO_RANK, process.rank, process.started_at.desc())
        .limit(1)
    )
    return resource or {}
