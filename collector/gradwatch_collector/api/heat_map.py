"""A metric of all layers over a whole run, small enough to look at: the largest value of each stretch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch_collector.records import Attributes, Times
from gradwatch_collector.storage.reading import SetSeries, read_sets
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

    Several ranks that have the same point share its row.
    """
    sets = [
        each
        for each in read_sets(connection, run_id, metric, field, attempt=attempt, rank=rank)
        if any(part.values is not None and part.values.size for part in each.parts)
    ]
    if not sets:
        return None
    first = min(int(part.times[0]) for each in sets for part in each.parts)
    last = max(int(part.times[-1]) for each in sets for part in each.parts)
    edges = np.linspace(first, last + 1, stretches + 1).astype(np.int64)
    rows, places = _rows(sets)
    values = np.full((len(rows), stretches), -np.inf)
    nonfinite = np.zeros((len(rows), stretches), bool)
    for each, place in zip(sets, places, strict=True):
        for part in each.parts:
            _add(part, place, edges, values, nonfinite)
    return HeatMap(rows, edges, np.where(np.isneginf(values), np.nan, values), nonfinite)


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


def _add(
    part: Segment, rows: npt.NDArray[np.intp], edges: Times, values: Cells, nonfinite: npt.NDArray[np.bool_]
) -> None:
    """Take the numbers of some times into the cells."""
    numbers: npt.NDArray[Any] | None = part.values
    if numbers is None or not numbers.size:
        return
    stretch = np.searchsorted(edges, part.times, side="right") - 1
    begins = np.flatnonzero(np.diff(stretch, prepend=-1))
    cells = np.ix_(rows, stretch[begins])
    finite = np.isfinite(numbers)
    if not finite.all():
        nonfinite[cells] |= np.logical_or.reduceat(~finite, begins, axis=1)
        numbers = np.where(finite, numbers, -np.inf)
    values[cells] = np.maximum(values[cells], np.maximum.reduceat(numbers, begins, axis=1))
