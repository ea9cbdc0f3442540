"""Checkpoints of a run: every attempt to save or verify one, how many are good, how old the last of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, FromClause, RowMapping, and_, case, func, select

from gradwatch import conventions as c
from gradwatch_collector.records import EventRecord, ProcessKey
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.clocks import Clock
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
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """How saving went over a run (M7). Moments in Unix nanoseconds; None where nothing was saved."""

    saved: int
    failed: int
    last_good_at: int | None
    last_good_step: int | None

    @property
    def success_rate(self) -> float | None:
        """Saved, of all that were attempted; None if none was."""
        attempted = self.saved + self.failed
        return self.saved / attempted if attempted else None

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
    good = _last_good(connection, run_id)
    at, last = good if good is not None else (None, None)
    return Record(
        saved=counts.get(SAVED, 0),
        failed=counts.get(FAILED, 0),
        last_good_at=at,
        last_good_step=None if last is None else last["step"],
    )


def attempted(connection: Connection, run_id: str) -> tuple[int, int]:
    """Return how many checkpoints the run tried to save, and how many of them failed or were found corrupt.

    Every rank tells of its part of one: it failed if any part did. Saving it again counts again.
    """
    checkpoint = schema.checkpoint.c
    what = (checkpoint.attempt, checkpoint.name, checkpoint.step)
    turn = func.row_number().over(
        partition_by=(*what, checkpoint.rank), order_by=(checkpoint.time, checkpoint.sequence)
    )
    bad = case(((checkpoint.state == FAILED) | found_corrupt(schema.checkpoint), 1), else_=0)
    parts = (
        select(*what, bad.label("bad"), turn.label("turn"))
        .where(checkpoint.run_id == run_id, checkpoint.state.in_((SAVED, FAILED)))
        .subquery()
    )
    whole = (
        select(func.max(parts.c.bad).label("failed"))
        .group_by(parts.c.attempt, parts.c.name, parts.c.step, parts.c.turn)
        .subquery()
    )
    number, failed = connection.execute(select(func.count(), func.coalesce(func.sum(whole.c.failed), 0))).one()
    return int(number), int(failed)


def found_corrupt(saved: FromClause) -> ColumnElement[bool]:
    """Return the condition that a row of `checkpoint` is of one that was found corrupt later, in any attempt.

    Not where it was found good again after that.
    """
    later = schema.checkpoint.alias()
    newest = (
        select(later.c.state)
        .where(
            later.c.run_id == saved.c.run_id,
            later.c.name == saved.c.name,
            later.c.step.is_not_distinct_from(saved.c.step),
            later.c.state.in_((VERIFIED, CORRUPT)),
            later.c.time >= saved.c.time,
        )
        .order_by(later.c.time.desc(), later.c.sequence.desc())
        .limit(1)
        .scalar_subquery()
    )
    return func.coalesce(newest, VERIFIED) == CORRUPT


def _last_good(connection: Connection, run_id: str) -> tuple[int, RowMapping] | None:
    """The last that was saved and not found corrupt, and when, by our clock: one of a process may be behind."""
    checkpoint, process = schema.checkpoint.c, schema.process.c
    who = (checkpoint.run_id, checkpoint.attempt, checkpoint.rank, checkpoint.instance)
    turn = func.row_number().over(
        partition_by=who, order_by=(checkpoint.time.desc(), checkpoint.sequence.desc())
    )
    saved = (
        select(*who, checkpoint.time, checkpoint.step, turn.label("turn"))
        .where(checkpoint.run_id == run_id, checkpoint.state == SAVED, ~found_corrupt(schema.checkpoint))
        .subquery()
    )
    query = (
        select(saved.c.time, saved.c.step, process.clock)
        .join(schema.process, and_(*(process[column.name] == saved.c[column.name] for column in who)))
        .where(saved.c.turn == 1)
    )
    # One that is ahead was corrected when it was received.
    dated = [
        (row["time"] - min(Clock(**row["clock"]).offset, 0), row)
        for row in connection.execute(query).mappings()
    ]
    return max(dated, key=lambda each: each[0], default=None)
