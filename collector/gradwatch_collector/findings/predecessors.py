"""What is known of earlier runs of the same job, model and data set: what a run is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, select

from gradwatch import conventions as c
from gradwatch_collector.records import Attributes
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched

MOST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """An earlier run that is over. ``resource``: of its lowest rank.

    ``summary``: the columns of `run_summary` (`runs/summary.py`); empty where it is not summarised yet.
    ``errors``: types and messages of the exceptions with which its processes ended.
    """

    run: RunRow
    resource: Attributes
    summary: Mapping[str, Any]
    errors: Sequence[str] = ()


def load_predecessors(connection: Connection, run: RunRow) -> Sequence[Predecessor]:
    """Read at most 20 runs of the same job, model and data set that began before and are over, newest first."""
    table = schema.run.c
    earlier = load_runs(
        connection,
        table.job == run.job,
        _same(table.model, run.model),
        _same(table.dataset, run.dataset),
        table.run_id != run.run_id,
        table.started_at <= run.started_at,
        table.ended_at.is_not(None),
        limit=MOST,
    )
    ids = [each.run_id for each in earlier]
    resources = _resources(connection, ids)
    summaries = _summaries(connection, ids)
    errors = _errors(connection, ids)
    return tuple(
        Predecessor(
            run=each,
            resource=resources.get(each.run_id, {}),
            summary=summaries.get(each.run_id, {}),
            errors=tuple(errors.get(each.run_id, ())),
        )
        for each in earlier
    )


def _same(column: ColumnElement[str | None], value: str | None) -> ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def _resources(connection: Connection, runs: Sequence[str]) -> dict[str, Attributes]:
    """Return what the lowest rank of the last attempt said of itself."""
    process, found = schema.process.c, dict[str, Attributes]()
    for some in batched(runs):
        rows = connection.execute(
            select(process.run_id, process.resource)
            .where(process.run_id.in_(some), process.rank >= 0)
            .order_by(process.attempt, process.rank.desc())
        )
        found |= {row.run_id: row.resource for row in rows}
    return found


def _summaries(connection: Connection, runs: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    found = dict[str, Mapping[str, Any]]()
    for some in batched(runs):
        rows = connection.execute(
            select(schema.run_summary).where(schema.run_summary.c.run_id.in_(some))
        ).mappings()
        found |= {row["run_id"]: dict(row) for row in rows}
    return found


def _errors(connection: Connection, runs: Sequence[str]) -> dict[str, list[str]]:
    """Return how ranks ended that told of an exception."""
    event, found = schema.event.c, dict[str, list[str]]()
    for some in batched(runs):
        rows = connection.execute(
            select(event.run_id, event.attributes)
            .where(event.run_id.in_(some), event.name == c.RUN_ENDED.name)
            .order_by(event.run_id, event.time)
        )
        for row in rows:
            if (kind := row.attributes.get(c.EXCEPTION_TYPE)) is not None:
                found.setdefault(row.run_id, []).append(
                    f"{kind}: {row.attributes.get(c.EXCEPTION_MESSAGE, '')}"
                )
    return found
