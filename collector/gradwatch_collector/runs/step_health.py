"""Which observed steps had a healthy gradient (M3): a global norm that is finite, not zero, and not far off.

Norms of different models have nothing in common, and one model's fall over a training by any factor. So a norm
is held against the median of those before it. What is normal from one batch to the next stays within a small
factor of that; ten times as much in one step is what people call a spike (F1), and a thousandth of it no longer
moves the weights (F2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.runs.curves import Curve, read_curves
from gradwatch_collector.runs.shards import shard_norms
from gradwatch_collector.storage.reading import lowest_ranks
from gradwatch_collector.storage.rolled_up import read_rollups

Doubles = npt.NDArray[np.float64]
# Medians that are computed at once: 8 MB of numbers.
_AT_ONCE: Final = 16_384


@dataclass(frozen=True, slots=True)
class Band:
    """What is healthy, as multiples of the median of the last ``window`` finite norms above zero before a step.

    While there are fewer than ``fewest`` of them, any finite norm above zero is.
    """

    lowest: float = 1e-3
    highest: float = 10.0
    window: int = 64
    fewest: int = 16


HEALTHY: Final = Band()


@dataclass(frozen=True, slots=True)
class StepHealth:
    """Steps whose gradient was read, and how many of them were unhealthy; None where that is not known."""

    observed: int | None
    unhealthy: int | None


def step_health(connection: Connection, run_id: str, band: Band = HEALTHY) -> StepHealth:
    """Judge every observed step of a run over all its attempts; with several optimizers, the steps of each.

    What ranks tell of is the same norm, so the lowest that told counts; shares of sharded gradients are put
    together. Of numbers that were rolled up the least and the greatest are left: unless these tell that the
    whole bucket was healthy but for what was not finite, nobody knows.
    """
    curves = read_curves(connection, run_id, c.GRADIENT_NORM)
    if curves:
        found = [_of_curve(curve, band) for curve in curves]
    elif read_rollups(connection, run_id, c.GRADIENT_SHARD_SQUARE.name):
        found = []  # shares of a step that is rolled up cannot be put together
    else:
        found = [
            StepHealth(len(norms.norms), unhealthy(norms.norms, band))
            for attempt in lowest_ranks(connection, run_id, c.GRADIENT_SHARD_SQUARE.name)
            for norms in shard_norms(connection, run_id, attempt, c.GRADIENT_SHARD_SQUARE).values()
        ]
    return StepHealth(_sum([each.observed for each in found]), _sum([each.unhealthy for each in found]))


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if numbers and len(known) == len(numbers) else None


def _of_curve(curve: Curve, band: Band) -> StepHealth:
    counts = curve.finite + curve.nonfinite
    bad = unhealthy(curve.values, band) if (counts == 1).all() else unhealthy_in_buckets(curve, band)
    return StepHealth(int(counts.sum()), bad)


def unhealthy(norms: Doubles, band: Band = HEALTHY) -> int:
    """Return how many norms of consecutive observed steps are not healthy. What is not finite may be NaN."""
    usual = norms[np.isfinite(norms) & (norms > 0)]
    bad = len(norms) - len(usual)
    for start in range(band.fewest, len(usual), _AT_ONCE):
        judged = usual[start : start + _AT_ONCE]
        medians = _medians_before(usual, start, len(judged), band.window)
        bad += int(((judged < band.lowest * medians) | (judged > band.highest * medians)).sum())
    return bad


def _medians_before(values: Doubles, start: int, count: int, window: int) -> Doubles:
    """Return, for each of ``count`` values from ``start`` on, the median of up to ``window`` before it."""
    partial = [np.median(values[:at]) for at in range(start, min(start + count, window))]
    first = start + len(partial)
    if len(partial) == count:
        return np.array(partial)
    before = values[first - window : start + count - 1]
    whole = np.median(np.lib.stride_tricks.sliding_window_view(before, window), axis=1)
    return np.concatenate([partial, whole])


def unhealthy_in_buckets(curve: Curve, band: Band) -> int | None:
    """Return what is certain of buckets of which the least and the greatest are known; None if that is not all.

    Whatever the median before a step was, it lies between the least and the greatest of the entries that it was
    taken from.
    """
    counted = np.cumsum(curve.finite)
    known = np.flatnonzero(curve.finite > 0)
    least, most = curve.least[known], curve.most[known]
    if (least <= 0).any():
        return None
    # The entries from which on there were `window` finite norms before each entry.
    since = np.searchsorted(counted[known], (counted - curve.finite)[known] - band.window, side="right")
    for at, first in enumerate(since.tolist()):
        low, high = least[first : at + 1].min(), most[first : at + 1].max()
        if least[at] < band.lowest * high or most[at] > band.highest * low:
            return None
    return int(curve.nonfinite.sum())
