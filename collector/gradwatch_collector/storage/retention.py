"""How long what is kept: numbers as they were sent, then their roll-ups, and what goes with them.

One pass is many short transactions, so that ingest gets its turn; each leaves the database whole, and where a
pass was cut off the next one goes on.

What SLOs count stays: runs, attempts, processes, checkpoints, findings and the history of endings, unless old
runs are to go as well. Numbers go by whole days (UTC), which is what makes a day's partition empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Table,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
)

from gradwatch_collector.objectives.changes import tell_changed
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.compaction import compact_older
from gradwatch_collector.storage.database import return_pages
from gradwatch_collector.storage.partitions import maintain_partitions
from gradwatch_collector.storage.rollups import roll_up
from gradwatch_collector.storage.segments import DAY
from gradwatch_slo.runs import Status

# 146 years: what is older than that is nothing.
FOREVER: Final = 2**62
# What has been silent for less may be known to a writer by ids that it has looked up (`series.py`).
LEAST: Final = DAY
_ROWS_AT_ONCE: Final = 5_000
_RUNS_AT_ONCE: Final = 5
# How long each stretch of the series has its turn: as long as from one pass of the collector's to the next.
_TURN: Final = 600 * 1_000_000_000
_UNITS: Final = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
_NANOS: Final = 1_000_000_000

Begin = Callable[[], AbstractContextManager[Connection]]
_run, _event, _span, _process, _series = (
    table.c for table in (schema.run, schema.event, schema.span, schema.process, schema.series)
)
_BY_RUN: Final = (
    schema.attempt,
    schema.process,
    schema.run_history,
    schema.event,
    schema.checkpoint,
    schema.span,
    schema.finding,
    schema.run_summary,
    schema.summary_due,
    schema.run,
)
_BY_SERIES: Final = (schema.frame, schema.block, schema.rollup)


@dataclass(frozen=True, slots=True)
class Policy:
    """Ages in nanoseconds.

    ``raw``: numbers as they were sent, spans, and log lines that are not our events. ``rollups``: what became
    of the numbers, events, and everything of telemetry that belongs to no run. ``runs``: ended runs, whole.
    """

    raw: int
    rollups: int
    runs: int = FOREVER


# A person's own runs: a month in every step, a year in outline; a few gigabytes.
EMBEDDED: Final = Policy(raw=30 * DAY, rollups=365 * DAY)
# A fleet's: `docs/scaling.md` says what that takes.
FLEET: Final = Policy(raw=7 * DAY, rollups=90 * DAY)


def policy_for(
    dialect: str, *, raw: int | None = None, rollups: int | None = None, runs: int | None = None
) -> Policy:
    """Return the policy of a kind of database, but for what somebody has said."""
    default = FLEET if dialect == "postgresql" else EMBEDDED
    told = {"raw": raw, "rollups": rollups, "runs": runs}
    return replace(default, **{name: age for name, age in told.items() if age is not None})


def age(text: str) -> int:
    """Return an age such as ``12h``, ``7d``, ``4w`` or ``forever`` in nanoseconds.

    Raises:
        ValueError: it is none.
    """
    if text == "forever":
        return FOREVER
    told = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if told is None:
        raise ValueError(f"{text!r} is not an age such as 12h, 7d, 4w or forever")
    return min(FOREVER, int(told[1]) * _UNITS[told[2]] * _NANOS)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a pass took away, in rows. Of ``values``, which are numbers, ``rollups`` new rows remain."""

    blocks: int = 0
    values: int = 0
    rollups: int = 0
    old_rollups: int = 0
    events: int = 0
    spans: int = 0
    series: int = 0
    senders: int = 0
    runs: int = 0

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def prune(
    begin: Begin,
    policy: Policy,
    now: int,
    *,
    go_on: Callable[[], bool] = lambda: True,
    takes: Callable[[Connection, Pruned], None] = lambda *_: None,
) -> Pruned:
    """Apply the policy; ``begin`` begins a transaction that writes. ``now`` in Unix nanoseconds.

    ``go_on`` is asked before each transaction, ``takes`` is told at the end of each that takes anything away.
    """
    pruned = Pruned()
    for step in _steps(policy, now):
        while go_on():
            with begin() as connection:
                done = step(connection)
                if done != Pruned():
                    takes(connection, done)
            pruned += done
            if done == Pruned():
                break
    _give_space_back(begin, now, go_on)
    return pruned


def _give_space_back(begin: Begin, now: int, go_on: Callable[[], bool]) -> None:
    """Drop emptied partitions; shorten a SQLite file by what is free in it."""
    freed = 1
    while freed and go_on():
        with begin() as connection:
            maintain_partitions(connection, now)
            freed = return_pages(connection)


def due(connection: Connection, policy: Policy, now: int) -> Pruned:
    """Return what a pass would take away now, as far as it can be told beforehand (no roll-ups, no series)."""
    block, sets = schema.block.c, schema.attribute_set.c
    blocks, values = connection.execute(
        select(func.count(), func.coalesce(func.sum(block.count * sets.width), 0))
        .select_from(schema.block)
        .join(schema.series, _series.series_id == block.series_id)
        .join(schema.attribute_set, sets.set_id == _series.set_id)
        .where(block.time < _midnight(now - policy.raw))
    ).one()
    expired = schema.rollup.c.time < _midnight(now - max(policy.rollups, LEAST))
    return Pruned(
        blocks=blocks,
        values=int(values),
        old_rollups=_number(connection, schema.rollup, expired),
        events=_number(connection, schema.event, _old_events(policy, now)),
        spans=_number(connection, schema.span, _span.start < now - policy.raw),
        runs=_number(connection, schema.run, _old_runs(now - policy.runs)),
    )


def _number(connection: Connection, table: Table, condition: ColumnElement[bool]) -> int:
    return connection.scalar(select(func.count()).select_from(table).where(condition)) or 0


Step = Callable[[Connection], Pruned]


def _steps(policy: Policy, now: int) -> Iterator[Step]:
    raw, rollups = now - policy.raw, now - max(policy.rollups, LEAST)
    yield lambda connection: _delete_runs(connection, now - policy.runs)
    yield lambda connection: _roll_up(connection, raw, now)
    yield lambda connection: Pruned(spans=_delete(connection, schema.span, _span.start < raw))
    yield lambda connection: Pruned(events=_delete(connection, schema.event, _old_events(policy, now)))
    yield lambda connection: _expire(connection, rollups)
    yield lambda connection: Pruned(series=_forget_silent(connection, rollups, now))
    yield lambda connection: Pruned(senders=_forget_senders(connection, rollups))


def _roll_up(connection: Connection, before: int, now: int) -> Pruned:
    compact_older(connection, before - before % DAY)
    done = roll_up(connection, before, now)
    return Pruned(blocks=done.blocks, values=done.values, rollups=done.rows)


def _old_events(policy: Policy, now: int) -> ColumnElement[bool]:
    """Our events as long as roll-ups, other log records as long as raw numbers.

    What a live run has told of itself stays: its findings rest on it.
    """
    ours = _event.name.startswith("training.", autoescape=True)
    live = select(_run.run_id).where(_run.status == Status.RUNNING)
    return or_(
        ~ours & (_event.received_at < now - policy.raw),
        ours & (_event.received_at < now - policy.rollups) & _event.run_id.not_in(live),
    )


def _delete(connection: Connection, table: Table, condition: ColumnElement[bool]) -> int:
    """Delete some of the rows that meet a condition; return how many."""
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(condition).limit(_ROWS_AT_ONCE)
    return _count(connection, delete(table).where(key.in_(some)))


def _count(connection: Connection, statement: Delete) -> int:
    return connection.execute(statement).rowcount


def _expire(connection: Connection, before: int) -> Pruned:
    """Delete roll-ups of before a day, and the series of which nothing is left."""
    rollup = schema.rollup
    key = tuple_(*rollup.primary_key.columns)
    old = select(*rollup.primary_key.columns).where(rollup.c.time < _midnight(before)).limit(_ROWS_AT_ONCE)
    series = connection.scalars(delete(rollup).where(key.in_(old)).returning(rollup.c.series_id)).all()
    return Pruned(old_rollups=len(series), series=_forget_series(connection, set(series), before))


def _forget_series(connection: Connection, series: Collection[int], before: int) -> int:
    """Forget the empty ones among these series, unless their process was heard since."""
    kept: set[int] = set()
    for table in _BY_SERIES:
        held = select(table.c.series_id).where(table.c.series_id.in_(series)).distinct()
        kept.update(connection.scalars(held) if series else ())
    empty = set(series) - kept
    if not empty:
        return 0
    runs = connection.scalars(select(_series.run_id).where(_series.series_id.in_(empty)).distinct()).all()
    # Who comes back waits for this transaction, and looks its series up anew.
    take_turns(connection, runs)
    return _count(connection, delete(schema.series).where(_series.series_id.in_(empty), ~_heard(before)))


def _heard(since: int) -> ColumnElement[bool]:
    """Whether a series' process was: its id may then be known to a writer."""
    return exists().where(
        _process.run_id == _series.run_id,
        _process.attempt == _series.attempt,
        _process.rank == _series.rank,
        _process.heard_at >= since,
    )


def _forget_silent(connection: Connection, before: int, now: int) -> int:
    """Forget series that were empty already when their process fell silent. Each pass looks at some of them."""
    turns = (connection.scalar(select(func.max(_series.series_id))) or 0) // _ROWS_AT_ONCE + 1
    first = now // _TURN % turns * _ROWS_AT_ONCE
    some = _series.series_id.between(first, first + _ROWS_AT_ONCE - 1)
    silent = connection.scalars(select(_series.series_id).where(some, ~_heard(before))).all()
    return _forget_series(connection, set(silent), before)


def _forget_senders(connection: Connection, before: int) -> int:
    """Forget who sent telemetry that belongs to no run, once nothing of it is left."""
    return _delete(
        connection,
        schema.process,
        ~_process.is_run
        & (_process.status == Status.RUNNING)  # as of all who never told an ending
        & (_process.heard_at < before)
        & ~exists().where(_series.run_id == _process.run_id),
    )


def _old_runs(ended_before: int) -> ColumnElement[bool]:
    # One that failed by one rank may be told of by another to this day.
    heard = exists().where(_process.run_id == _run.run_id, _process.heard_at >= ended_before)
    return (_run.ended_at < ended_before) & ~heard


def _delete_runs(connection: Connection, ended_before: int) -> Pruned:
    ids = connection.scalars(
        select(_run.run_id).where(_old_runs(ended_before)).order_by(_run.ended_at).limit(_RUNS_AT_ONCE)
    ).all()
    if not ids:
        return Pruned()
    # Who came back meanwhile stays, and who comes back now waits.
    take_turns(connection, ids)
    ended_at = dict(
        connection.execute(
            select(_run.run_id, _run.ended_at).where(_run.run_id.in_(ids), _old_runs(ended_before))
        ).all()
    )
    ids = list(ended_at)
    tell_changed(connection, ended_at.values())
    of_runs = select(_series.series_id).where(_series.run_id.in_(ids)).scalar_subquery()
    for table in _BY_SERIES:
        connection.execute(delete(table).where(table.c.series_id.in_(of_runs)))
    series = _count(connection, delete(schema.series).where(_series.run_id.in_(ids)))
    for table in _BY_RUN:
        connection.execute(delete(table).where(table.c.run_id.in_(ids)))
    return Pruned(series=series, runs=len(ids))


def _midnight(moment: int) -> int:
    return moment - moment % DAY
