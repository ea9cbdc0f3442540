"""Runs as a list: chosen, sorted and paged by the database, which may hold very many of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Connection, and_, case, func, literal, or_, select, tuple_

from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError, Json, timestamp
from gradwatch_collector.findings import Severity
from gradwatch_collector.findings.store import OPEN
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

_run = schema.run.c
_UNKNOWN_NUMBER: Final = 1e300
_UNKNOWN_STEP: Final = 2**62
# What needs somebody first.
_BY_SICKNESS: Final = (Status.FAILED, Status.LOST, Status.RUNNING, Status.CANCELLED, Status.SUCCEEDED)
# What the list can be sorted by; what is not known comes last either way.
_KEYS: Final[Mapping[str, tuple[ColumnElement[Any], object]]] = {
    "started": (_run.started_at, 0),
    "seen": (_run.last_seen_at, 0),
    "duration": (func.coalesce(_run.ended_at, _run.last_seen_at) - _run.started_at, 0),
    "run": (_run.run_id, ""),
    "job": (_run.job, ""),
    "model": (_run.model, ""),
    "status": (case({each.value: place for place, each in enumerate(_BY_SICKNESS)}, value=_run.status), 0),
    "step": (_run.last_step, _UNKNOWN_STEP),
    "loss": (_run.last_loss, _UNKNOWN_NUMBER),
}
SORTS: Final = tuple(name for key in _KEYS for name in (key, f"-{key}"))
NEWEST_FIRST: Final = "-started"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsQuery:
    """Which runs, in which order; None and nothing are any.

    ``text``: what id, job, model, data set, team or reason contains, in either case. ``sort``: one of `SORTS`,
    descending with a minus.
    """

    statuses: Sequence[str] = ()
    job: str | None = None
    tier: str | None = None
    text: str | None = None
    sort: str = NEWEST_FIRST
    limit: int = MAX_LIMIT
    cursor: str | None = None


def list_runs(connection: Connection, query: RunsQuery | None = None, team: str | None = None) -> Json:
    """Return ``{"runs": [...], "next_cursor": ...}``; with ``team`` that team's only.

    Raises:
        BadCursorError: the cursor is not one of ours, or of a list in another order.
    """
    query = query or RunsQuery()
    order = _Order(query.sort)
    conditions = [*_conditions(query), *of_team(team)]
    if query.cursor is not None:
        conditions.append(order.after(query.cursor))
    limit = max(1, min(query.limit, MAX_LIMIT))
    rows = load_runs(connection, *conditions, order=order.columns, limit=limit + 1)
    page, more = rows[:limit], rows[limit:]
    return {
        "runs": [run_json(row) for row in page],
        "next_cursor": order.cursor(connection, page[-1]) if more else None,
    }


def count_runs(connection: Connection, query: RunsQuery, team: str | None = None) -> Json:
    """Return how many runs there are by status, and how many findings are open of them, by severity."""
    finding = schema.finding.c
    conditions = [*_conditions(query), *of_team(team)]
    by_status = connection.execute(
        select(_run.status, func.count().label("runs")).where(*conditions).group_by(_run.status)
    ).all()
    by_severity = connection.execute(
        select(finding.severity, func.count().label("findings"))
        .join(schema.run, _run.run_id == finding.run_id)
        .where(finding.state == OPEN, *conditions)
        .group_by(finding.severity)
    ).all()
    counts = {each.value: 0 for each in Status} | {row.status: row.runs for row in by_status}
    findings = {each.value: 0 for each in Severity} | {row.severity: row.findings for row in by_severity}
    return {"total": sum(counts.values()), "statuses": counts, "open_findings": findings}


def run_json(row: RunRow) -> Json:
    """Return the contract's `run`."""
    return {
        "run_id": row.run_id,
        "job": row.job,
        "model": row.model,
        "dataset": row.dataset,
        "team": row.team,
        "tier": row.tier,
        "status": row.status.value,
        "reason": row.reason,
        "attempt": row.attempt,
        "rank_count": row.rank_count,
        "started_at": timestamp(row.started_at),
        "ended_at": timestamp(row.ended_at),
        "last_seen_at": timestamp(row.last_seen_at),
        "last_step": row.last_step,
        "last_loss": row.last_loss,
        "last_loss_nonfinite": row.last_loss_nonfinite,
        "host": row.host,
        "commit": row.commit,
        "target": row.target,
        "target_reached_at": timestamp(row.target_reached_at),
    }


def of_team(team: str | None) -> list[ColumnElement[bool]]:
    """Return what a run must meet to be shown to a team: nothing for those who see all."""
    return [] if team is None else [_run.team == team]


def is_run(connection: Connection, run_id: str, team: str | None) -> bool:
    """Return whether there is such a run, and it may be shown to a team."""
    return connection.scalar(select(_run.run_id).where(_run.run_id == run_id, *of_team(team))) is not None


def _conditions(query: RunsQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if query.statuses:
        conditions.append(_run.status.in_(query.statuses))
    if query.job is not None:
        conditions.append(_run.job == query.job)
    if query.tier is not None:
        conditions.append(_run.tier == query.tier)
    if query.text:
        columns = (_run.run_id, _run.job, _run.model, _run.dataset, _run.team, _run.reason)
        conditions.append(or_(*(column.icontains(query.text, autoescape=True) for column in columns)))
    return conditions


class _Order:
    """An order of runs, and where in it a page ends. Those that are alike come newest first."""

    def __init__(self, sort: str) -> None:
        self._sort = sort
        self._is_descending = sort.startswith("-")
        column, unknown = _KEYS[sort.removeprefix("-")]
        if self._is_descending and isinstance(unknown, float | int):
            unknown = -unknown
        self._key = func.coalesce(column, literal(unknown, BigInteger) if isinstance(unknown, int) else unknown)
        # By their index.
        self._is_newest_first = sort == NEWEST_FIRST

    @property
    def columns(self) -> Sequence[ColumnElement[Any]]:
        newest_first = [_run.started_at.desc(), _run.run_id.desc()]
        if self._is_newest_first:
            return newest_first
        return [self._key.desc() if self._is_descending else self._key.asc(), *newest_first]

    def after(self, cursor: str) -> ColumnElement[bool]:
        """Return what is met by the runs of the pages after the one that the cursor was given out with."""
        sort, key, started_at, run_id = _open(cursor)
        if sort != self._sort:
            raise BadCursorError(cursor)
        older = tuple_(_run.started_at, _run.run_id) < tuple_(started_at, run_id)
        if self._is_newest_first:
            return older
        beyond = self._key < key if self._is_descending else self._key > key
        return or_(beyond, and_(self._key == key, older))

    def cursor(self, connection: Connection, last: RunRow) -> str:
        key = None
        if not self._is_newest_first:
            key = connection.scalar(select(self._key).where(_run.run_id == last.run_id))
        told = [self._sort, key, last.started_at, last.run_id]
        return base64.urlsafe_b64encode(json.dumps(told).encode()).decode()


def _open(cursor: str) -> tuple[str, Any, int, str]:
    try:
        sort, key, started_at, run_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        run_id.encode()  # not every JSON string is text: "\ud800" is none
        is_key = _is_key(sort, key)
        known = telling.integer(started_at)
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_key, known = False, None
    if known is None or not is_key:
        raise BadCursorError(cursor)
    return sort, key, known, run_id


def _is_key(sort: str, key: object) -> bool:
    if sort == NEWEST_FIRST:
        return key is None
    unknown = _KEYS[sort.removeprefix("-")][1] if sort in SORTS else None
    if isinstance(unknown, str):
        return isinstance(key, str) and bool(key.encode() or True)
    return telling.number(key) is not None if isinstance(unknown, float) else telling.integer(key) is not None
