"""Effective training time (M11): of a run's wall-clock time over all attempts, what went into steps that count.

A step counts less what it waited for data, and only once: where a later attempt, or a later process in the
same one, went on from an earlier step, what had been done after that step is lost. Start-up, evaluation,
saving, and the time between attempts are in no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.records import Times
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import lowest_ranks, read_series
from gradwatch_collector.storage.rolled_up import read_rollups

_NANOS: Final = 1_000_000_000
_LONGEST_STEP: Final = 1e9  # seconds: 30 years
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EffectiveTime:
    """Seconds. ``lost``: in steps that were done again later. ``ratio``: ``productive`` by ``wall``."""

    productive: float
    waiting: float
    lost: float
    wall: float
    ratio: float | None


def effective_time(connection: Connection, run: RunRow) -> EffectiveTime | None:
    """Measure it on the lowest rank that told its steps; None for a run without steps, or with pruned ones."""
    if read_rollups(connection, run.run_id, c.STEP_INDEX.name):
        return None  # which steps were done again is not known any more
    steps, durations, waits = (
        _by_attempt(connection, run.run_id, metric) for metric in (c.STEP_INDEX, c.STEP_DURATION, c.DATA_WAIT)
    )
    if not steps:
        return None
    began = _starts(connection, run.run_id)
    in_order = sorted(steps, key=lambda attempt: (began.get(attempt, 0), attempt))
    spent = np.concatenate([_at(steps[each].times, durations.get(each)) for each in in_order])
    waited = np.concatenate([_at(steps[each].times, waits.get(each)) for each in in_order])
    waited = np.minimum(waited, spent)
    again = _done_again(np.concatenate([steps[each].values for each in in_order]))
    productive, waiting, lost = (
        _total(each) for each in ((spent - waited)[~again], waited[~again], spent[again])
    )
    until = run.last_seen_at if run.ended_at is None else run.ended_at
    # Steps come one after the other: where clocks are not known it took at least as long as they did.
    wall = max(until - run.started_at, productive + waiting + lost)
    return EffectiveTime(
        productive=productive / _NANOS,
        waiting=waiting / _NANOS,
        lost=lost / _NANOS,
        wall=wall / _NANOS,
        ratio=productive / wall if wall > 0 else None,
    )


def _total(nanoseconds: Times) -> int:
    return sum(nanoseconds.tolist())  # which may be too large for a column of them


def _starts(connection: Connection, run_id: str) -> dict[int, int]:
    attempt = schema.attempt.c
    rows = connection.execute(select(attempt.attempt, attempt.started_at).where(attempt.run_id == run_id))
    return {row.attempt: row.started_at for row in rows}


def _done_again(steps: Doubles) -> npt.NDArray[np.bool_]:
    """Which of these steps, in the order they were done, is followed by one that is not after it."""
    earliest_later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return steps >= earliest_later


@dataclass(frozen=True, slots=True)
class _Told:
    times: Times
    values: Doubles


def _by_attempt(connection: Connection, run_id: str, metric: c.Metric) -> dict[int, _Told]:
    found: dict[int, _Told] = {}
    for attempt, rank in lowest_ranks(connection, run_id, metric.name).items():
        for series in read_series(connection, run_id, metric.name, attempt=attempt, rank=rank):
            if len(series.times) and series.values is not None:
                found.setdefault(attempt, _Told(series.times, series.values.astype(np.float64)))
    return found


def _at(times: Times, told: _Told | None) -> Times:
    """Nanoseconds at the ends of the steps; 0 where none were told, as at a process's first step."""
    values = np.zeros(len(times), np.int64)
    if told is not None:
        _, ours, theirs = np.intersect1d(times, told.times, assume_unique=True, return_indices=True)
        # What cannot be a duration is none.
        known = np.nan_to_num(told.values[theirs], posinf=0.0, neginf=0.0)
        values[ours] = np.rint(np.clip(known, 0.0, _LONGEST_STEP) * _NANOS)
    return values
