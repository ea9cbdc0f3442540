"""Stored findings: the same rule on the same attempt is one finding, opened, updated, resolved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sqlalchemy import ColumnElement, Connection, RowMapping, select, update

from gradwatch_collector.findings.observation import Observation, Severity
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_collector.storage.upsert import insert

_SECOND: Final = 1_000_000_000
_PAGES_UNTIL: Final = 15 * 60 * _SECOND
OPEN = "open"
RESOLVED = "resolved"
_IN_HAND: Final = ("acknowledged_at", "acknowledged_by", "note")
_finding = schema.finding.c
_Key = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """A stored finding, and whether it is open."""

    finding_id: int
    is_open: bool
    told: Observation


def load_findings(connection: Connection, known: int | None) -> list[Finding]:
    """Read the findings that are open, and those that were stored after the one with the id ``known``."""
    wanted = _finding.state == OPEN
    if known is not None:
        wanted |= _finding.finding_id > known
    rows = connection.execute(select(schema.finding).where(wanted).order_by(_finding.finding_id)).mappings()
    return [Finding(row["finding_id"], row["state"] == OPEN, _observation(row)) for row in rows]


def _observation(row: RowMapping) -> Observation:
    fields = Observation.__dataclass_fields__.keys() & row.keys()
    return Observation(**{**{name: row[name] for name in fields}, "severity": Severity(row["severity"])})


def reconcile(
    connection: Connection,
    observations: Iterable[Observation],
    now: int,
    *,
    clears_after: Mapping[str, float] = MappingProxyType({}),
    unread: Collection[str] = (),
) -> None:
    """Make the stored findings match what is wrong now.

    Findings whose rule has not observed them for ``clears_after`` (in seconds, by rule; else at all) are
    resolved, but for those of ``unread`` runs, and at once those that it says are over. ``now`` in Unix
    nanoseconds.
    """
    finding = schema.finding
    observed = {(o.run_id, o.attempt, o.rule): o for o in observations}
    stored = _stored(connection, observed)
    for key, o in observed.items():
        row = stored.get(key)
        if o.is_over and row is not None:
            continue
        values = {
            "severity": _loudness(o, row, now),
            "state": RESOLVED if o.is_over else OPEN,
            "rank": o.rank,
            "step": o.step,
            "layer": o.layer,
            "born_in": o.born_in,
            "last_seen": o.last_seen,
            "resolved_at": now if o.is_over else None,
            "evidence": dict(o.evidence),
        }
        if row is None or row["state"] != OPEN:
            # Another occurrence: nobody has this one in hand.
            values |= {"first_seen": o.first_seen} | dict.fromkeys(_IN_HAND)
        if row is None:
            connection.execute(
                insert(connection, finding).values(run_id=o.run_id, attempt=o.attempt, rule=o.rule, **values)
            )
        elif any(row[name] != value for name, value in values.items()):
            connection.execute(
                update(finding).where(finding.c.finding_id == row["finding_id"]).values(**values)
            )
    cleared = [
        row["finding_id"]
        for key, row in stored.items()
        if row["state"] == OPEN and _is_over(key, row, observed.get(key), unread, now, clears_after)
    ]
    for some in batched(cleared):
        connection.execute(
            update(finding).where(finding.c.finding_id.in_(some)).values(state=RESOLVED, resolved_at=now)
        )


def _is_over(
    key: _Key,
    row: RowMapping,
    seen: Observation | None,
    unread: Collection[str],
    now: int,
    clears_after: Mapping[str, float],
) -> bool:
    if seen is not None:
        return seen.is_over
    run_id, _, rule = key
    return run_id not in unread and now - row["last_seen"] >= clears_after.get(rule, 0.0) * _SECOND


def _loudness(o: Observation, row: RowMapping | None, now: int) -> Severity:
    """Return the severity to store: what was over when it became known, by a replay say, wakes nobody."""
    pages = row is not None and row["state"] == OPEN and row["severity"] == Severity.PAGE
    as_of = o.last_seen if o.as_of is None else o.as_of
    if o.severity is Severity.PAGE and not pages and now - as_of > _PAGES_UNTIL:
        return Severity.TICKET
    return o.severity


def _stored(connection: Connection, observed: Collection[_Key]) -> dict[_Key, RowMapping]:
    """Return the open findings, and those that were resolved of what is observed now."""
    found = {_key(row): row for row in _rows(connection, _finding.state == OPEN)}
    again = sorted({run_id for run_id, attempt, rule in observed if (run_id, attempt, rule) not in found})
    for runs in batched(again):
        found |= {_key(row): row for row in _rows(connection, _finding.run_id.in_(runs))}
    return found


def _key(row: RowMapping) -> _Key:
    return row["run_id"], row["attempt"], row["rule"]


def _rows(connection: Connection, condition: ColumnElement[bool]) -> Iterator[RowMapping]:
    yield from connection.execute(select(schema.finding).where(condition)).mappings()
