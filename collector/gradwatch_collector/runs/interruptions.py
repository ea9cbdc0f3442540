"""Mean time to interrupt, to detect and to recover (M12), over the attempts that are stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import groupby, pairwise

from sqlalchemy import ColumnElement, Connection, or_, select

from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import not_excluded
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.storage import schema
from gradwatch_slo.interruptions import AttemptFacts, Interruptions, interruptions
from gradwatch_slo.runs import Status

_ENDED_BADLY = (Status.FAILED, Status.LOST, Status.CANCELLED)
_run, _attempt, _history, _process = (
    table.c for table in (schema.run, schema.attempt, schema.run_history, schema.process)
)
_Place = tuple[str, int]


def interruptions_of(
    connection: Connection, start: int, end: int, *conditions: ColumnElement[bool]
) -> Interruptions:
    """Return how attempts fared from ``start`` (inclusive) to ``end`` (exclusive), Unix nanoseconds.

    Of runs that no exclusion is about and that meet all ``conditions`` (over ``schema.run``). Every attempt in
    the window is read.
    """
    # By the index on when runs ended: an attempt ends before its run does.
    of = (
        _run.started_at < end,
        or_(_run.ended_at >= start, _run.ended_at.is_(None)),
        not_excluded(load_periods(connection)),
        *conditions,
    )
    detected = _detected(connection, *of)
    rows = connection.execute(
        select(
            _attempt.run_id,
            _attempt.attempt,
            _attempt.status,
            _attempt.reason,
            _attempt.started_at,
            _attempt.ended_at,
        )
        .join(schema.run, _run.run_id == _attempt.run_id)
        .where(*of)
        .order_by(_attempt.run_id, _attempt.started_at, _attempt.attempt)
    )
    facts = []
    for _, same_run in groupby(rows, key=lambda row: row.run_id):
        attempts = list(same_run)
        following = [*(row.started_at for row in attempts[1:]), None]
        facts += [
            AttemptFacts(
                status=Status(row.status),
                reason=row.reason,
                started_at=row.started_at,
                ended_at=row.ended_at,
                detected_at=_since(row.ended_at, detected.get((row.run_id, row.attempt), ())),
                resumed_at=resumed_at,
            )
            for row, resumed_at in zip(attempts, following, strict=True)
        ]
    return interruptions(facts, start, end)


def _since(ended_at: int | None, recorded: Collection[int]) -> int | None:
    """Return which of the records is that of the ending: an attempt may have been given up before it ended."""
    since = (at for at in recorded if ended_at is None or at >= ended_at)
    return min(since, default=max(recorded, default=None))


def _detected(connection: Connection, *of: ColumnElement[bool]) -> Mapping[_Place, Collection[int]]:
    """Return when it was recorded that attempts were over.

    A process told so, none was heard, or, if that is sooner, the next attempt was.
    """
    found: defaultdict[_Place, list[int]] = defaultdict(list)
    # The history tells of runs: an attempt that is tried again is in it only if the run was thought to be over.
    history = connection.execute(
        select(_history.run_id, _history.attempt, _history.status, _history.recorded_at)
        .join(schema.run, _run.run_id == _history.run_id)
        .where(*of)
        .order_by(_history.run_id, _history.history_id)
    ).all()
    for each in history:
        if each.status in _ENDED_BADLY:
            found[each.run_id, each.attempt].append(each.recorded_at)
    for each, following in pairwise(history):
        if each.run_id == following.run_id and each.attempt < following.attempt:
            found[each.run_id, each.attempt].append(following.recorded_at)
    told = connection.execute(
        select(_process.run_id, _process.attempt, _process.clock)
        .join(schema.run, _run.run_id == _process.run_id)
        .where(_process.is_run, _process.status.in_(_ENDED_BADLY), *of)
    )
    for row in told:
        if (told_at := Clock(**row.clock).told_at) is not None:
            found[row.run_id, row.attempt].append(told_at)
    return found
