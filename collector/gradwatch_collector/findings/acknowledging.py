"""Who has a finding in hand: it stays open, and its alert as well, until what it tells of is over."""

from __future__ import annotations

from sqlalchemy import Connection, update

from gradwatch_collector.service import audit
from gradwatch_collector.storage import schema

_finding = schema.finding.c


class UnknownFindingError(LookupError):
    """There is no finding of that number."""


def acknowledge(connection: Connection, finding_id: int, note: str | None, *, now: int) -> None:
    """Write down that somebody has it in hand, and what they say; whoever comes last stands there.

    ``now`` in Unix nanoseconds.

    Raises:
        UnknownFindingError: there is no such finding.
    """
    actor = audit.operator()
    changed = connection.execute(
        update(schema.finding)
        .where(_finding.finding_id == finding_id)
        .values(acknowledged_at=now, acknowledged_by=actor, note=note)
    )
    if not changed.rowcount:
        raise UnknownFindingError(f"there is no finding {finding_id}")
    audit.record(connection, actor, "finding.acknowledged", str(finding_id), {"note": note}, now=now)
