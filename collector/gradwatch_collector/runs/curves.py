"""A per-step number of a run over its steps, whether it is still there as it was sent or rolled up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.records import Attributes, Times
from gradwatch_collector.runs.shards import StepNorms, shard_norms
from gradwatch_collector.storage.reading import PlaceKey, PointSeries, lowest_ranks, read_series
from gradwatch_collector.storage.rolled_up import PointRollup, read_rollups

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One number of one process, oldest first: each entry is of one step, or of up to 64 that were rolled up.

    ``times``: Unix nanoseconds, of the last step of an entry, strictly increasing. The others are float64 of
    the same shape ``[n]``. ``steps``: which step that was. ``values``: what was told, the mean of the finite
    ones where rolled up, NaN where there is none. ``least`` and ``most``: of the finite ones, else NaN.
    ``finite`` and ``nonfinite``: how many values of either kind there are. ``last``: the newest, as it was.
    """

    attempt: int
    rank: int
    attributes: Attributes
    times: Times
    steps: Doubles
    values: Doubles
    least: Doubles
    most: Doubles
    finite: Doubles
    nonfinite: Doubles
    last: float


@dataclass(frozen=True, slots=True)
class Spread:
    """How the finite values of curves are spread. ``median`` takes rolled-up ones for their mean."""

    median: float
    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True)
class _Columns:
    times: Times
    mean: Doubles
    least: Doubles
    most: Doubles
    finite: Doubles
    nonfinite: Doubles
    last: Doubles


# By attempt and rank.
StepClock = Mapping[tuple[int, int], _Columns]


def read_step_clock(connection: Connection, run_id: str) -> StepClock:
    """Return when each process ended which step."""
    return {(told.attempt, told.rank): _columns(told) for told in _told(connection, run_id, c.STEP_INDEX)}


def read_curves(
    connection: Connection,
    run_id: str,
    metric: c.Metric,
    clock: StepClock | None = None,
    *,
    every_rank: bool = False,
) -> list[Curve]:
    """Return the curves of a metric, by attempt and first appearance.

    Of each attempt the lowest rank that told them, unless ``every_rank``. Without a ``clock``, and of a process
    that it does not know, steps are numbers from 0 on.
    """
    told = _told(connection, run_id, metric, every_rank=every_rank)
    return [_curve(each, (clock or {}).get((each.attempt, each.rank))) for each in told]


def read_gradient_norms(connection: Connection, run_id: str, clock: StepClock) -> list[Curve]:
    """Return the curves of the global gradient norm, put together where each rank tells of its shares only."""
    return read_curves(connection, run_id, c.GRADIENT_NORM, clock) or [
        _of_shards(attempt, optimizer, norms, clock)
        for attempt in sorted({attempt for attempt, _ in clock})
        for (_, optimizer), norms in shard_norms(connection, run_id, attempt, c.GRADIENT_SHARD_SQUARE).items()
        if len(norms.steps)
    ]


def _of_shards(attempt: int, optimizer: int | None, norms: StepNorms, clock: StepClock) -> Curve:
    rank = min(rank for of, rank in clock if of == attempt)
    known = clock[attempt, rank]
    at = np.minimum(np.searchsorted(known.last, norms.steps), len(known.times) - 1)
    steps, is_finite = norms.steps.astype(np.float64), np.isfinite(norms.norms)
    shown = np.where(is_finite, norms.norms, np.nan)
    finite = is_finite.astype(np.float64)
    return Curve(
        attempt,
        rank,
        {} if optimizer is None else {c.OPTIMIZER: optimizer},
        known.times[at],
        steps,
        shown,
        shown,
        shown,
        finite,
        1.0 - finite,
        float(norms.norms[-1]),
    )


def spread(curves: Iterable[Curve]) -> Spread | None:
    """Return how all finite values are spread; None if there is none."""
    listed = list(curves)
    if not listed:
        return None
    finite = np.concatenate([each.finite for each in listed])
    known = finite > 0
    if not known.any():
        return None
    values = np.concatenate([each.values for each in listed])[known]
    order = np.argsort(values)
    below = np.cumsum(finite[known][order])
    return Spread(
        median=float(values[order][np.searchsorted(below, below[-1] / 2)]),
        minimum=float(np.nanmin(np.concatenate([each.least for each in listed]))),
        maximum=float(np.nanmax(np.concatenate([each.most for each in listed]))),
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What is stored of one point: as it was sent, and rolled up, which is older."""

    attempt: int
    rank: int
    attributes: Attributes
    sent: PointSeries | None
    rolled_up: tuple[PointRollup, ...]


def _told(connection: Connection, run_id: str, metric: c.Metric, *, every_rank: bool = True) -> list[_Told]:
    if every_rank:
        return _told_by(connection, run_id, metric, None, None)
    lowest = lowest_ranks(connection, run_id, metric.name)
    return [each for place in lowest.items() for each in _told_by(connection, run_id, metric, *place)]


def _told_by(
    connection: Connection, run_id: str, metric: c.Metric, attempt: int | None, rank: int | None
) -> list[_Told]:
    # What is still there first: rolling up only ever moves numbers from there.
    series = read_series(connection, run_id, metric.name, attempt=attempt, rank=rank)
    sent = {each.key: each for each in series if each.values is not None}
    older: dict[PlaceKey, list[PointRollup]] = {}
    for each in read_rollups(connection, run_id, metric.name, attempt=attempt, rank=rank):
        older.setdefault(each.key, []).append(each)
    found = []
    for key in sorted(dict.fromkeys([*older, *sent]), key=lambda key: key[:2]):
        any_of = sent.get(key) or older[key][0]
        found.append(
            _Told(any_of.attempt, any_of.rank, any_of.attributes, sent.get(key), tuple(older.get(key, ())))
        )
    return found


def _curve(told: _Told, known: _Columns | None) -> Curve:
    columns = _columns(told)
    times = columns.times
    if known is None:
        steps = np.arange(len(times), dtype=np.float64)
    else:
        # From the first on, so that float64 is exact enough: a time of these years is not.
        steps = np.interp(times - known.times[0], known.times - known.times[0], known.last)
    return Curve(
        told.attempt,
        told.rank,
        told.attributes,
        times,
        steps,
        columns.mean,
        columns.least,
        columns.most,
        columns.finite,
        columns.nonfinite,
        float(columns.last[-1]),
    )


def _columns(told: _Told) -> _Columns:
    """Return rolled-up and sent values as one, by time; of the same time what is there as it was sent wins."""
    parts = [] if told.sent is None else [_of_sent(told.sent)]
    parts += [_of_rollup(each) for each in told.rolled_up]
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in _Columns.__slots__]
    _, order = np.unique(joined[0], return_index=True)
    return _Columns(*(column[order] for column in joined))


def _of_rollup(each: PointRollup) -> _Columns:
    finite = each.count - each.nonfinite
    return _Columns(each.times, each.mean, each.minimum, each.maximum, finite, each.nonfinite, each.last)


def _of_sent(sent: PointSeries) -> _Columns:
    assert sent.values is not None
    values = sent.values.astype(np.float64)
    is_finite = np.isfinite(values)
    shown = np.where(is_finite, values, np.nan)
    finite = is_finite.astype(np.float64)
    return _Columns(sent.times, shown, shown, shown, finite, 1.0 - finite, values)
