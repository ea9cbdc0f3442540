"""Stored findings: the same rule on the same attempt is one finding, opened, updated, resolved."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, RowMapping, select, update

from gradwatch_collector import schema
from gradwatch_collector.findings.observation import Observation
from gradwatch_collector.upsert import insert

OPEN = "open"
RESOLVED = "resolved"


def reconcile(connection: Connection, observations: Iterable[Observation], now: int) -> list[Observation]:
    """Make the stored findings match what is wrong now; return what was opened.

    Findings whose rule no longer observes them are resolved. ``now`` in Unix nanoseconds.
    """
    finding = schema.finding
    observed = {(o.run_id, o.attempt, o.rule): o for o in observations}
    stored: dict[tuple[str, int, str], RowMapping] = {
        (row["run_id"], row["attempt"], row["rule"]): row
        for row in connection.execute(
            select(finding).where(
                (finding.c.state == OPEN) | finding.c.run_id.in_({o.run_id for o in observed.values()})
            )
        ).mappings()
    }
    opened: list[Observation] = []
    for key, o in observed.items():
        values = {
            "severity": o.severity,
            "state": OPEN,
            "rank": o.rank,
            "step": o.step,
            "layer": o.layer,
            "born_in": o.born_in,
            "last_seen": o.last_seen,
            "resolved_at": None,
            "evidence": dict(o.evidence),
        }
        row = stored.get(key)
        if row is None:
            connection.execute(
                # Another collector's evaluator may have just opened it.
                insert(connection, finding)
                .values(run_id=o.run_id, attempt=o.attempt, rule=o.rule, first_seen=o.first_seen, **values)
                .on_conflict_do_nothing()
            )
        elif any(row[name] != value for name, value in values.items()):
            connection.execute(
                update(finding).where(finding.c.finding_id == row["finding_id"]).values(**values)
            )
        if row is None or row["state"] != OPEN:
            opened.append(o)
    cleared = [row["finding_id"] for key, row in stored.items() if row["state"] == OPEN and key not in observed]
    if cleared:
        connection.execute(
            update(finding).where(finding.c.finding_id.in_(cleared)).values(state=RESOLVED, resolved_at=now)
        )
    return opened
