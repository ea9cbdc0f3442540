"""What follows from hearing nothing: processes lost, outages of many runs, retries that never came.

Everything happens inside the caller's transaction. What arrives meanwhile wins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    and_,
    exists,
    false,
    func,
    or_,
    select,
    update,
)

from gradwatch_collector.objectives.changes import tell_due
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs.lifecycle import REASON_HEARTBEAT_TIMEOUT, heartbeat_of, survival
from gradwatch_collector.runs.outages import PATIENCE, quiet_after, silent_together
from gradwatch_collector.runs.refresh import refresh_run
from gradwatch_collector.runs.turns import take_all_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.runs import Status

_NANOS: Final = 1_000_000_000
# Who sent old data last, and nothing since, has nothing newer. The clock of a sender that is alive and behind
# is known by then (`clocks.py`): it takes two heartbeats, of which the limit of silence is six.
_ONLY_OLD_DATA: Final = 10 * _NANOS

_process, _run, _attempt = schema.process.c, schema.run.c, schema.attempt.c
_KEY = tuple(schema.process.primary_key.columns)
# Fell silent in an outage, and was not heard since.
_IN_OUTAGE = func.coalesce(_run.last_seen_at <= _run.outage_at, false())


def mark_silent(connection: Connection, now: int, lost_after: int, up_since: int) -> list[str]:
    """Mark what has been silent for longer than ``lost_after``; return the runs that may stand otherwise now.

    All in Unix nanoseconds. Silence counts only from ``up_since``: nobody could be heard before. A run that
    fell silent in an outage is given ten times as long.
    """
    if not _is_any_quiet(connection, now, lost_after, up_since):
        return []
    # Whoever writes waits meanwhile.
    take_all_turns(connection)
    _note_outage(connection, now, lost_after, up_since)
    lost = _mark_lost(connection, now, lost_after, up_since)
    given_up = _give_up_waiting(connection, _waiting(now, lost_after, up_since))
    runs = sorted({*lost, *given_up, *connection.scalars(_undecided(now, lost_after))})
    for run_id in runs:
        refresh_run(connection, run_id, now, heartbeat_of(lost_after))
    tell_due(connection, runs, now)
    _end_outage(connection)
    return runs


def _is_any_quiet(connection: Connection, now: int, lost_after: int, up_since: int) -> bool:
    """Return whether anything may have to be done."""
    quiet = now - min(quiet_after(lost_after), _only_old(lost_after))
    causes = (
        select(_run.run_id).where(_run.status == Status.RUNNING, _run.last_seen_at <= quiet),
        select(_run.run_id).where(_run.outage_at.is_not(None)),
        select(_process.run_id).where(_heard_before(quiet)),
        _waiting(now, lost_after, up_since),
        _undecided(now, lost_after),
    )
    return any(connection.execute(cause.limit(1)).first() is not None for cause in causes)


def _note_outage(connection: Connection, now: int, lost_after: int, up_since: int) -> None:
    quiet_before = now - quiet_after(lost_after)
    if up_since > quiet_before:
        return
    heard = connection.execute(
        select(_run.run_id, func.max(_process.heard_at).label("heard_at"))
        .join(schema.process, _process.run_id == _run.run_id)
        .where(_run.status == Status.RUNNING, _run.last_seen_at <= quiet_before, _process.is_run)
        .group_by(_run.run_id)
        .having(func.max(_process.heard_at) <= quiet_before)
    ).all()
    if not heard:
        return
    live = connection.scalar(select(func.count()).select_from(schema.run).where(_run.status == Status.RUNNING))
    quiet = {row.run_id: max(row.heard_at, up_since) for row in heard}
    together = silent_together(quiet, live or 0, now - lost_after)
    for runs in batched(sorted(together)):
        connection.execute(
            update(schema.run)
            .where(_run.run_id.in_(runs), _run.last_seen_at <= quiet_before)
            .where(_run.outage_at.is_(None) | (_run.outage_at < _run.last_seen_at))
            .values(outage_at=now)
        )


def _end_outage(connection: Connection) -> None:
    """Forget the outage once nobody is silent in it any more. Until then those who are back belong to it."""
    silent = select(_run.run_id).where(_run.status == Status.RUNNING, _run.last_seen_at <= _run.outage_at)
    if connection.execute(silent.limit(1)).one_or_none() is None:
        connection.execute(update(schema.run).where(_run.outage_at.is_not(None)).values(outage_at=None))


def _mark_lost(connection: Connection, now: int, lost_after: int, up_since: int) -> list[str]:
    only_old = _only_old(lost_after)
    silent = connection.execute(
        select(*_KEY, _process.last_seen_at, _process.heard_at, _IN_OUTAGE.label("in_outage"))
        .join(schema.run, _run.run_id == _process.run_id)
        .where(_heard_before(now - only_old))
    ).mappings()
    runs = []
    for row in silent.all():
        limit = PATIENCE * lost_after if row["in_outage"] else lost_after
        heard = max(row["heard_at"], up_since)
        # Old data that we were there to hear tell when it lived; else it may have lived until we were there.
        lived = row["last_seen_at"] if row["heard_at"] >= up_since else heard
        quiet = only_old if lived < heard else limit
        if now - lived > limit and now - heard > quiet:
            _lose(connection, row, now)
            runs.append(row["run_id"])
    return runs


def _only_old(lost_after: int) -> int:
    return min(lost_after, max(_ONLY_OLD_DATA, lost_after // 3))


def _heard_before(moment: int) -> ColumnElement[bool]:
    return and_(_process.is_run, _process.status == Status.RUNNING, _process.heard_at < moment)


def _lose(connection: Connection, row: RowMapping, now: int) -> None:
    connection.execute(
        update(schema.process)
        # A batch committed since the select is a sign of life: it wins.
        .where(*(column == row[column.name] for column in (*_KEY, _process.heard_at)))
        .values(
            status=Status.LOST,
            reason=REASON_HEARTBEAT_TIMEOUT,
            ended_at=row["last_seen_at"],
            evidence={"silent_seconds": round((now - row["last_seen_at"]) / _NANOS, 1)},
        )
    )


def _latest(status: Status) -> Select[str, int]:
    """Select runs that stand so, with their latest attempts."""
    return (
        select(_run.run_id, _run.last_seen_at)
        .join(schema.attempt, (_attempt.run_id == _run.run_id) & (_attempt.attempt == _run.attempt))
        .where(_run.status == status)
    )


def _silent(since: int, up_since: int) -> ColumnElement[bool]:
    return false() if up_since >= since else _run.last_seen_at < since


def _waiting(now: int, lost_after: int, up_since: int) -> Select[str, int]:
    """Select the runs that wait for an attempt which was promised by somebody who has fallen silent.

    A supervisor lives until the next attempt. A worker of a launcher is gone with the attempt, and the next one
    is heard of only when it watches: it is given as long as a run that fell silent in an outage.
    """
    is_supervised = exists().where(_process.run_id == _run.run_id, _process.rank == NO_RANK)
    return _latest(Status.RUNNING).where(
        _attempt.will_retry,
        or_(
            and_(is_supervised, _silent(now - lost_after, up_since)),
            _silent(now - PATIENCE * lost_after, up_since),
        ),
    )


def _give_up_waiting(connection: Connection, waiting: Select[str, int]) -> Iterable[str]:
    runs = list(connection.scalars(waiting))
    for run_id in runs:
        promised = _process.run_id == run_id, _process.will_retry
        connection.execute(
            update(schema.process)
            .where(
                *promised,
                _process.attempt == select(func.max(_process.attempt)).where(*promised).scalar_subquery(),
            )
            .values(will_retry=False)
        )
    return runs


def _undecided(now: int, lost_after: int) -> Select[str, int]:
    """Select the runs that are thought to be over, and have had time to show that they are not."""
    over = _attempt.status.not_in((Status.RUNNING, Status.SUCCEEDED)) & _attempt.will_retry.is_(False)
    return _latest(Status.RUNNING).where(over, _attempt.ended_at < now - survival(heartbeat_of(lost_after)))
