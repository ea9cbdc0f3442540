"""Which metrics there are and who sent them: runs, and telemetry that belongs to none.

The shape is ``schemas/metric-list.schema.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.api.shapes import MAX_LIMIT, Json, open_number
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.facts import team_of
from gradwatch_collector.storage import schema

MAX_SOURCES: Final = 20
# How many of a metric's newest series are asked for who sent them: a run has one for each field and set.
_LOOKED_AT: Final = 500
# Characters of JSON: what a sender says about itself may be megabytes, and is repeated for each of its metrics.
_LONGEST_VALUE: Final = 2_000
_LONGEST_RESOURCE: Final = 10_000
_PAGE_CHARACTERS: Final = 8 << 20
_TEMPORALITY: Final = (None, "delta", "cumulative")


def list_metrics(
    connection: Connection,
    *,
    run_id: str | None = None,
    name: str | None = None,
    limit: int = MAX_LIMIT,
    cursor: str | None = None,
    team: str | None = None,
) -> Json:
    """Return ``{"metrics": [...], "next_cursor": ...}``, the metric that was first seen last coming first.

    Each has the newest `MAX_SOURCES` of its senders, or only ``run_id``; with ``team`` only that team's. Long
    attributes of senders are cut or left out, and a page of many senders ends before ``limit``.

    Raises:
        BadCursorError: the cursor is not one of ours.
    """
    metric = schema.metric.c
    query = select(schema.metric).order_by(metric.metric_id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(metric.metric_id < open_number(cursor))
    if name is not None:
        query = query.where(metric.name == name)
    series, process = schema.series.c, schema.process.c
    senders = []
    if run_id is not None:
        senders.append(series.run_id == run_id)
    if team is not None:
        theirs = select(process.run_id).where(team_of(process.run_id) == team)
        senders.append(series.run_id.in_(theirs))
    if senders:
        query = query.where(metric.metric_id.in_(select(series.metric_id).where(*senders)))
    rows = connection.execute(query).mappings().all()
    page: list[Json] = []
    known: dict[str, Json] = {}
    room = _PAGE_CHARACTERS
    for row in rows[:limit]:
        if room <= 0:
            break
        page.append({**metric_json(row), **_sources(connection, row["metric_id"], run_id, team, known)})
        room -= sum(_size(source) for source in page[-1]["sources"])
    return {
        "metrics": page,
        "next_cursor": str(rows[len(page) - 1]["metric_id"]) if len(rows) > len(page) else None,
    }


def metric_json(row: Mapping[Any, Any]) -> Json:
    """Return what identifies a metric."""
    temporality: int = row["temporality"]
    return {
        "name": row["name"],
        "unit": row["unit"],
        "kind": row["kind"],
        "temporality": _TEMPORALITY[temporality] if 0 <= temporality < len(_TEMPORALITY) else None,
        "monotonic": row["monotonic"],
    }


def _sources(
    connection: Connection, metric_id: int, run_id: str | None, team: str | None, known: dict[str, Json]
) -> Json:
    seen: Sequence[str]
    if run_id is not None:
        seen, found = [run_id], [run_id]
    else:
        series = schema.series.c
        seen = connection.scalars(
            select(series.run_id)
            .where(series.metric_id == metric_id, *([] if team is None else [team_of(series.run_id) == team]))
            .order_by(series.series_id.desc())
            .limit(_LOOKED_AT)
        ).all()
        found = list(dict.fromkeys(seen))
    for each in found[:MAX_SOURCES]:
        if each not in known:
            known[each] = _source(connection, each)
    return {
        "sources": [known[each] for each in found[:MAX_SOURCES]],
        "more_sources": len(found) > MAX_SOURCES or len(seen) == _LOOKED_AT,
    }


def _source(connection: Connection, run_id: str) -> Json:
    process = schema.process.c
    row = connection.execute(
        select(process.is_run, process.resource)
        .where(process.run_id == run_id)
        .order_by(process.is_run.desc(), process.attempt.desc(), process.rank == NO_RANK, process.rank)
        .limit(1)
    ).one_or_none()
    resource: dict[str, Any] = {} if row is None else row.resource
    return {
        "run_id": run_id,
        "is_run": row is not None and row.is_run,
        "job": telling.text(resource.get(c.SERVICE_NAME)),
        "resource": _shortened(resource),
    }


def _shortened(resource: Mapping[str, Any]) -> Json:
    """Return the attributes with long texts cut, but for those for which there is no room."""
    shown: Json = {}
    room = _LONGEST_RESOURCE
    for name, value in resource.items():
        short = f"{value[: _LONGEST_VALUE - 1]}…" if _is_long(value) else value
        size = len(name) + _size(short)
        if size <= room:
            shown[name] = short
            room -= size
    return shown


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > _LONGEST_VALUE


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False))
