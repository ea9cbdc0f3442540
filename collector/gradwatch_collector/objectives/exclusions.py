"""What no objective counts: maintenance, a known outage, a cancelled sweep, one run; and who said so, and why.

Nothing is deleted: an exclusion is withdrawn. Either way the hours that it is about are counted again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, literal, select, update

from gradwatch_collector.objectives.changes import HOUR
from gradwatch_collector.objectives.judging import Period, excluded_by
from gradwatch_collector.runs.turns import take_all_turns
from gradwatch_collector.service import audit
from gradwatch_collector.storage import schema
from gradwatch_slo.indicators import Selection

_exclusion, _run = schema.exclusion.c, schema.run.c


class UnknownExclusionError(LookupError):
    """There is no such exclusion, or it was withdrawn before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class What:
    """One run; or the runs that ended within a period and match ``fields`` (all, if there are none)."""

    single_run: str | None = None
    start: int | None = None
    end: int | None = None
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def period(self) -> Period | None:
        """The period, if it is about one; None for one run."""
        if self.start is None or self.end is None:
            return None
        return self.start, self.end, Selection(tuple((name, tuple(each)) for name, each in self.fields.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """What is excluded, by whom and why. Moments in Unix nanoseconds."""

    exclusion_id: int
    what: What
    reason: str
    actor: str
    recorded_at: int
    withdrawn_at: int | None


def exclude(connection: Connection, what: What, reason: str, *, now: int) -> int:
    """Let no objective count it, from now on and for the past; return the exclusion's number.

    ``now`` in Unix nanoseconds.
    """
    take_all_turns(connection)
    actor = audit.operator()
    values = {**asdict(what), "reason": reason, "actor": actor, "recorded_at": now}
    exclusion_id: int = connection.execute(
        insert(schema.exclusion).values(values).returning(_exclusion.exclusion_id)
    ).scalar_one()
    audit.record(
        connection, actor, "slo.excluded", str(exclusion_id), {**asdict(what), "reason": reason}, now=now
    )
    _tell_changed(connection, what)
    return exclusion_id


def withdraw(connection: Connection, exclusion_id: int, *, now: int) -> Exclusion:
    """Let it count again; return what was excluded.

    Raises:
        UnknownExclusionError: nothing is excluded under that number.
    """
    take_all_turns(connection)
    found = next((each for each in load_exclusions(connection) if each.exclusion_id == exclusion_id), None)
    if found is None or found.withdrawn_at is not None:
        raise UnknownExclusionError(f"nothing is excluded under the number {exclusion_id}")
    connection.execute(
        update(schema.exclusion).where(_exclusion.exclusion_id == exclusion_id).values(withdrawn_at=now)
    )
    audit.record(connection, audit.operator(), "slo.included", str(exclusion_id), now=now)
    _tell_changed(connection, found.what)
    return found


def still_excluding(connection: Connection, what: What) -> list[Exclusion]:
    """Return what excludes it, or a part of it, now; the oldest first."""
    return [
        each
        for each in reversed(load_exclusions(connection))
        if each.withdrawn_at is None and _overlap(connection, each.what, what)
    ]


def load_exclusions(connection: Connection) -> list[Exclusion]:
    """Return all there ever were, newest first."""
    rows = connection.execute(select(schema.exclusion).order_by(_exclusion.exclusion_id.desc()))
    return [_exclusion_of(row) for row in rows]


def load_periods(connection: Connection) -> list[Period]:
    """Return the periods that are excluded now. Single runs are not among them: SQL looks them up itself."""
    rows = connection.execute(
        select(schema.exclusion).where(_exclusion.withdrawn_at.is_(None), _exclusion.start.is_not(None))
    )
    periods = (_exclusion_of(row).what.period for row in rows)
    return [period for period in periods if period is not None]


def _exclusion_of(row: Any) -> Exclusion:
    return Exclusion(
        exclusion_id=row.exclusion_id,
        what=What(single_run=row.single_run, start=row.start, end=row.end, fields=row.fields),
        reason=row.reason,
        actor=row.actor,
        recorded_at=row.recorded_at,
        withdrawn_at=row.withdrawn_at,
    )


def _overlap(connection: Connection, one: What, other: What) -> bool:
    if one.period is None or other.period is None:
        both = select(_run.run_id).where(_concerned(one), _concerned(other)).limit(1)
        return connection.execute(both).first() is not None
    # There may be no run in it yet.
    (start, end, _), (other_start, other_end, _) = one.period, other.period
    return (
        start < other_end
        and other_start < end
        and not any(
            set(one.fields[name]).isdisjoint(other.fields[name]) for name in one.fields.keys() & other.fields
        )
    )


def _tell_changed(connection: Connection, what: What) -> None:
    # Whoever ends a run within the period from now on tells that by itself. An ending that is on its way waits
    # for this transaction: it must not be told, and counted, between our look and our commit.
    hour = (_run.ended_at // literal(HOUR)).label("hour")
    hours = select(hour).where(_run.ended_at.is_not(None), _concerned(what)).distinct()
    connection.execute(insert(schema.run_change).from_select(["hour"], hours))


def _concerned(what: What) -> ColumnElement[bool]:
    return _run.run_id == what.single_run if what.period is None else excluded_by(what.period)
