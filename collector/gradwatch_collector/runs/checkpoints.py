"""Checkpoints of a run: every attempt to save or verify one, how many are good, how old the last of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Subquery,
    and_,
    case,
    cast,
    exists,
    func,
    or_,
    select,
)

from gradwatch import conventions as c
from gradwatch_collector.records import NO_RANK, EventRecord, ProcessKey
from gradwatch_collector.runs import telling
from gradwatch_collector.storage import schema

SAVED: Final = "saved"
FAILED: Final = "failed"
VERIFIED: Final = "verified"
CORRUPT: Final = "corrupt"
_STATES: Final = {
    c.CHECKPOINT_SAVED.name: SAVED,
    c.CHECKPOINT_FAILED.name: FAILED,
    c.CHECKPOINT_VERIFIED.name: VERIFIED,
    c.CHECKPOINT_CORRUPT.name: CORRUPT,
}
_SENDER: Final = ("run_id", "attempt", "rank", "instance")
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """How saving went over a run (M7). Moments in Unix nanoseconds; None where nothing was saved."""

    saved: int
    failed: int
    last_good_at: int | None
    last_good_step: int | None
    last_good_name: str | None

    @property
    def success_rate(self) -> float | None:
        """Saved, of all that were attempted; None if none was."""
        attempted = self.saved + self.failed
        return self.saved / attempted if attempted else None

    def has_good_after(self, moment: int, name: str | None, step: int | None) -> bool:
        """Whether one was saved since, and is not the one of this name and step."""
        last = self.last_good_name, self.last_good_step
        return self.last_good_at is not None and self.last_good_at > moment and last != (name, step)

    def age_seconds(self, now: int) -> float | None:
        """How long ago the last good one was complete: what a crash would cost."""
        return None if self.last_good_at is None else max(0, now - self.last_good_at) / _NANOS


def rows(key: ProcessKey, events: Iterable[EventRecord], received_at: int) -> Iterator[dict[str, Any]]:
    """Yield a row of `checkpoint` for each event about one."""
    for event in events:
        state = _STATES.get(event.name)
        if state is not None:
            told = event.attributes
            yield {
                "run_id": key.run_id,
                "attempt": key.attempt,
                "rank": key.rank,
                "instance": key.instance,
                "sequence": event.sequence,
                # A sender's clock may be ahead of ours; nothing happened after it was received.
                "time": min(event.time, received_at),
                "state": state,
                "name": telling.text(told.get(c.CHECKPOINT_NAME)),
                "step": telling.integer(told.get(c.STEP)),
                "size": telling.integer(told.get(c.CHECKPOINT_SIZE)),
                "seconds": telling.number(told.get(c.CHECKPOINT_DURATION)),
                "error": _error(
                    told.get(c.CHECKPOINT_FAULT), told.get(c.EXCEPTION_TYPE), told.get(c.EXCEPTION_MESSAGE)
                ),
            }


def _error(*told: object) -> str | None:
    return ": ".join(filter(None, map(telling.text, told))) or None


def newest(connection: Connection, run_id: str, limit: int) -> list[RowMapping]:
    """Read the run's rows of `checkpoint`, newest first."""
    checkpoint = schema.checkpoint.c
    query = (
        select(schema.checkpoint)
        .where(checkpoint.run_id == run_id)
        .order_by(checkpoint.time.desc(), checkpoint.rank, checkpoint.sequence.desc())
        .limit(limit)
    )
    return list(connection.execute(query).mappings())


def record_of(connection: Connection, run_id: str) -> Record:
    """Count the run's checkpoints over all its attempts."""
    checkpoint = schema.checkpoint.c
    counted = connection.execute(
        select(checkpoint.state, func.count()).where(checkpoint.run_id == run_id).group_by(checkpoint.state)
    )
    counts = {row.state: int(row[1]) for row in counted}
    last = _last_good(connection, run_id)
    return Record(
        saved=counts.get(SAVED, 0),
        failed=counts.get(FAILED, 0),
        last_good_at=None if last is None else last["at"],
        last_good_step=None if last is None else last["step"],
        last_good_name=None if last is None else last["name"],
    )


def attempted(connection: Connection, run_id: str) -> tuple[int, int]:
    """Return how many checkpoints the run tried to save, and how many of them failed or were found corrupt.

    Every rank tells of its part of one: it failed if any part did. Saving it again counts again.
    """
    checkpoint, bad = _told(), _found_corrupt(run_id)
    what = (checkpoint.c.attempt, checkpoint.c.name, checkpoint.c.step)
    turn = func.row_number().over(
        partition_by=(*what, checkpoint.c.rank), order_by=(checkpoint.c.time, checkpoint.c.sequence)
    )
    parts = (
        select(
            *what,
            case(((checkpoint.c.state == FAILED) | (bad.c.at >= checkpoint.c.at), 1), else_=0).label("bad"),
            turn.label("turn"),
        )
        .join(bad, _same(bad, checkpoint), isouter=True)
        .where(checkpoint.c.run_id == run_id, checkpoint.c.state.in_((SAVED, FAILED)))
        .subquery()
    )
    whole = (
        select(func.max(parts.c.bad).label("failed"))
        .group_by(parts.c.attempt, parts.c.name, parts.c.step, parts.c.turn)
        .subquery()
    )
    number, failed = connection.execute(select(func.count(), func.coalesce(func.sum(whole.c.failed), 0))).one()
    return int(number), int(failed)


def _last_good(connection: Connection, run_id: str) -> RowMapping | None:
    """Return the last that was saved and not found corrupt, and when, by our clock."""
    saved, bad = _told(), _found_corrupt(run_id)
    query = (
        select(saved.c.at, saved.c.name, saved.c.step)
        .join(bad, _same(bad, saved), isouter=True)
        .where(saved.c.run_id == run_id, saved.c.state == SAVED)
        .where(bad.c.at.is_(None) | (bad.c.at < saved.c.at))
        .order_by(saved.c.at.desc(), saved.c.rank)
        .limit(1)
    )
    return connection.execute(query).mappings().one_or_none()


def _found_corrupt(run_id: str) -> Subquery:
    """Select what any rank found corrupt of its part, in any attempt, and when last: ``name, step, at``.

    Not where that part was found good again after that.
    """
    bad, good = _told(), _told()
    what = good.c.name, good.c.step, good.c.rank, good.c.host
    # Grouped first: databases make a table of it, and do not look through the run for every part that was bad.
    found = (
        select(*what, func.max(good.c.at).label("at"))
        .where(good.c.run_id == run_id, good.c.state == VERIFIED)
        .group_by(*what)
        .subquery()
    )
    again = exists().where(_same(found, bad), _same_place(found, bad), found.c.at > bad.c.at)
    return (
        select(bad.c.name, bad.c.step, func.max(bad.c.at).label("at"))
        .where(bad.c.run_id == run_id, bad.c.state == CORRUPT, ~again)
        .group_by(bad.c.name, bad.c.step)
        .subquery()
    )


def _told() -> Subquery:
    """Select rows of `checkpoint`, each with the ``host`` of its sender, and ``at``, its time by our clock."""
    checkpoint, process = schema.checkpoint.alias(), schema.process.alias()
    offset = cast(process.c.clock["offset"].as_string(), BigInteger)
    # A clock that is ahead was corrected when it was received.
    at = case((offset < 0, checkpoint.c.time - offset), else_=checkpoint.c.time)
    return (
        select(checkpoint, process.c.resource[c.HOST_NAME].as_string().label("host"), at.label("at"))
        .join(process, and_(*(process.c[name] == checkpoint.c[name] for name in _SENDER)), isouter=True)
        .subquery()
    )


def _same(one: FromClause, other: FromClause) -> ColumnElement[bool]:
    return and_(one.c.name == other.c.name, one.c.step.is_not_distinct_from(other.c.step))


def _same_place(one: FromClause, other: FromClause) -> ColumnElement[bool]:
    """Return the condition that files of one name may be the same one.

    Every rank and every host may have its own; who looks from outside (`gradwatch checkpoint verify`) is none
    of the ranks.
    """
    return and_(
        or_(one.c.rank == other.c.rank, one.c.rank == NO_RANK, other.c.rank == NO_RANK),
        or_(one.c.host == other.c.host, one.c.host.is_(None), other.c.host.is_(None)),
    )
