"""The JSON shapes of findings; their JSON Schemas are in ``schemas/``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, select

from gradwatch import conventions as c
from gradwatch_collector.api.shapes import MAX_LIMIT, Json, open_number, timestamp
from gradwatch_collector.findings import RULES
from gradwatch_collector.findings.silences import Silence, load_silences, silenced_until
from gradwatch_collector.findings.store import OPEN
from gradwatch_collector.storage import schema

_finding, _run = schema.finding.c, schema.run.c
_FINDINGS = select(schema.finding, _run.job).join(schema.run, _run.run_id == _finding.run_id)
# Told of one run, and about many.
_SHARED = (c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingsQuery:
    """Which findings; None is any, and so are no runs."""

    state: str | None = None
    severity: str | None = None
    rule: str | None = None
    run_ids: Sequence[str] = ()
    job: str | None = None
    limit: int = MAX_LIMIT
    cursor: str | None = None


def list_findings(connection: Connection, query: FindingsQuery, team: str | None = None) -> Json:
    """Return ``{"findings": [...], "next_cursor": ...}``, newest first; with ``team`` those of its runs only.

    Raises:
        BadCursorError: the cursor is not one of ours.
    """
    asked = {
        _finding.state: query.state,
        _finding.severity: query.severity,
        _finding.rule: query.rule,
        _run.job: query.job,
        _run.team: team,
    }
    conditions = [column == value for column, value in asked.items() if value is not None]
    if query.run_ids:
        conditions.append(_finding.run_id.in_(query.run_ids))
    if query.cursor is not None:
        conditions.append(_finding.finding_id < open_number(query.cursor))
    limit = max(1, min(query.limit, MAX_LIMIT))
    rows = (
        connection.execute(_FINDINGS.where(*conditions).order_by(_finding.finding_id.desc()).limit(limit + 1))
        .mappings()
        .all()
    )
    silences = load_silences(connection, time.time_ns())
    shown = [finding_json(row, silences) for row in rows[:limit]]
    return {
        "findings": [_alone(each, each["run_id"]) for each in shown] if team is not None else shown,
        "next_cursor": str(shown[-1]["finding_id"]) if len(rows) > limit else None,
    }


def load_finding(connection: Connection, finding_id: int) -> Json | None:
    """Return one finding; None if there is none of that number."""
    row = connection.execute(_FINDINGS.where(_finding.finding_id == finding_id)).mappings().one_or_none()
    return None if row is None else finding_json(row, load_silences(connection, time.time_ns()))


def findings_of_run(connection: Connection, run_id: str, *, alone: bool = False) -> list[Json]:
    """Return the contract's `finding` for each finding of a run, newest first.

    An outage of many runs is one finding, told of one of them; while it is open it is shown with each. With
    ``alone`` it tells of this run only, not even how many others there are: they may be another team's.
    """
    shared = _finding.rule.in_(_SHARED) & (_finding.state == OPEN)
    rows = connection.execute(
        _FINDINGS.where((_finding.run_id == run_id) | shared).order_by(
            _finding.first_seen.desc(), _finding.finding_id.desc()
        )
    ).mappings()
    mine = [row for row in rows if row["run_id"] == run_id or run_id in row["evidence"]["runs"]]
    silences = load_silences(connection, time.time_ns())
    found = [finding_json(row, silences) for row in mine]
    return [_alone(each, run_id) for each in found] if alone else found


def _alone(finding: Json, run_id: str) -> Json:
    if finding["rule"] not in _SHARED:
        return finding
    return {**finding, "run_id": run_id, "evidence": {"runs": [run_id]}}


def finding_json(row: RowMapping, silences: Sequence[Silence]) -> Json:
    """Return the contract's `finding`, and who has it in hand; ``row`` has its run's job as well."""
    name = str(row["rule"])
    rule = RULES[name]
    shape = {
        "finding_id": row["finding_id"],
        "rule": name,
        "severity": row["severity"],
        "state": row["state"],
        "run_id": row["run_id"],
        "attempt": row["attempt"],
        "rank": row["rank"],
        "step": row["step"],
        "layer": row["layer"],
        "first_seen": timestamp(row["first_seen"]),
        "last_seen": timestamp(row["last_seen"]),
        "resolved_at": timestamp(row["resolved_at"]),
        "evidence": row["evidence"],
        "cause": rule.cause,
        "action": rule.action,
        "runbook_url": c.runbook_url(c.RULE_ALERTS[name]),
        "acknowledged_at": timestamp(row["acknowledged_at"]),
        "acknowledged_by": row["acknowledged_by"],
        "note": row["note"],
        "silenced_until": timestamp(silenced_until(silences, row["run_id"], row["job"], name)),
    }
    if rule.has_birthplace:
        shape["born_in"] = row["born_in"]
    return shape
