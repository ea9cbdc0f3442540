"""A metric of all layers over a whole run, small enough to look at: the largest value of each stretch.

What was rolled up is there, too: the largest value of each bucket, at the last of its times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch_collector.records import Attributes, Times
from gradwatch_collector.storage.reading import SetSeries, read_sets
from gradwatch_collector.storage.rolled_up import read_rolled_up_sets
from gradwatch_collector.storage.rollups import Statistic
from gradwatch_collector.storage.segments import Segment
from gradwatch_collector.storage.series import attribute_set

Cells = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """``rows``: attributes of the points, by first appearance. ``edges``: Unix nanoseconds, shape ``[n + 1]``.

    ``values``: the largest finite value of each row and stretch, shape ``[rows, n]``; NaN where there is none.
    ``nonfinite``: whether a NaN or an infinity was among them.
    """

    rows: tuple[Attributes, ...]
    edges: Times
    values: Cells
    nonfinite: npt.NDArray[np.bool_]


def heat_map(
    connection: Connection,
    run_id: str,
    metric: str,
    field: str = "value",
    *,
    stretches: int = 500,
    attempt: int | None = None,
    rank: int | None = None,
) -> HeatMap | None:
    """Return the metric over ``stretches`` equal times; None if the run has no such numbers.

    Several ranks that have the same point share its row. Where a stretch is shorter than what a roll-up is of,
    some have no value.
    """

    def rolled_up(statistic: Statistic) -> list[SetSeries]:
        return read_rolled_up_sets(connection, run_id, metric, statistic, field, attempt=attempt, rank=rank)

    stored = read_sets(connection, run_id, metric, field, attempt=attempt, rank=rank)
    largest = rolled_up(Statistic.MAXIMUM)
    sets = [
        each
        for each in (*stored, *largest)
        if any(part.values is not None and part.values.size for part in each.parts)
    ]
    if not sets:
        return None
    first = min(int(part.times[0]) for each in sets for part in each.parts)
    last = max(int(part.times[-1]) for each in sets for part in each.parts)
    edges = _edges(first, last + 1, stretches)
    # Where a bucket has finite values, too, its largest does not tell.
    doubtful = rolled_up(Statistic.NONFINITE) if largest else []
    rows, places = _rows([*sets, *doubtful])
    values = np.full((len(rows), stretches), -np.inf)
    nonfinite = np.zeros((len(rows), stretches), bool)
    for each, place in zip(sets, places, strict=False):
        for part in each.parts:
            _add(part, place, edges, values, nonfinite)
    for each, place in zip(doubtful, places[len(sets) :], strict=True):
        for part in each.parts:
            assert part.values is not None
            begins, cells = _cells(part, place, edges)
            nonfinite[cells] |= np.logical_or.reduceat(part.values > 0, begins, axis=1)
    return HeatMap(rows, edges, np.where(np.isneginf(values), np.nan, values), nonfinite)


def _edges(first: int, end: int, stretches: int) -> Times:
    # In whole numbers: a float64 is some 256 ns away from a time of these years.
    whole, rest = divmod(end - first, stretches)
    numbers = np.arange(stretches + 1, dtype=np.int64)
    edges: Times = first + whole * numbers + rest * numbers // stretches
    return edges


def _rows(sets: list[SetSeries]) -> tuple[tuple[Attributes, ...], list[npt.NDArray[np.intp]]]:
    found: dict[bytes, int] = {}
    attributes: list[Attributes] = []
    places = []
    for each in sets:
        place = []
        for point in each.points:
            key = attribute_set([point]).digest
            if key not in found:
                found[key] = len(attributes)
                attributes.append(point)
            place.append(found[key])
        places.append(np.array(place, np.intp))
    return tuple(attributes), places


def _cells(part: Segment, rows: npt.NDArray[np.intp], edges: Times) -> tuple[npt.NDArray[np.intp], Any]:
    """Return where in a part each of its stretches begins, and the cells of these."""
    stretch = np.searchsorted(edges, part.times, side="right") - 1
    begins = np.flatnonzero(np.diff(stretch, prepend=-1))
    return begins, np.ix_(rows, stretch[begins])


def _add(
    part: Segment, rows: npt.NDArray[np.intp], edges: Times, values: Cells, nonfinite: npt.NDArray[np.bool_]
) -> None:
    """Take the numbers of some times into the cells."""
    numbers: npt.NDArray[Any] | None = part.values
    if numbers is None or not numbers.size:
        return
    begins, cells = _cells(part, rows, edges)
    finite = np.isfinite(numbers)
    if not finite.all():
        nonfinite[cells] |= np.logical_or.reduceat(~finite, begins, axis=1)
        numbers = np.where(finite, numbers, -np.inf)
    values[cells] = np.maximum(values[cells], np.maximum.reduceat(numbers, begins, axis=1))
