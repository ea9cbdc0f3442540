"""Gradient norms by layer over the steps of an attempt, small enough to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.api.heat_map import HeatMap, heat_map
from gradwatch_collector.runs.curves import Doubles, StepClock
from gradwatch_collector.runs.shards import Place, StepNorms, shard_norms

STRETCHES: Final = 120


@dataclass(frozen=True, slots=True)
class LayerMap:
    """``layers``: names, by first appearance. ``ends``: last step of each stretch, float64 of shape ``[n]``.

    ``values``: the largest finite norm of each layer and stretch, shape ``[layers, n]``; NaN where there is
    none. ``nonfinite``: whether a NaN or an infinity was among them. ``is_timed``: no steps are known, and
    ``ends`` are seconds.
    """

    layers: tuple[str, ...]
    ends: Doubles
    values: Doubles
    nonfinite: npt.NDArray[np.bool_]
    is_timed: bool = False


def layer_map(
    connection: Connection, run_id: str, attempt: int, clock: StepClock, stretches: int = STRETCHES
) -> LayerMap | None:
    """Return the largest norms of each of at most so many stretches; None for a run without layers."""
    told = heat_map(connection, run_id, c.LAYER_GRADIENT_NORM.name, "max", stretches=stretches, attempt=attempt)
    if told is not None:
        return _of_times(told, attempt, clock)
    shares = {
        place: found for place, found in shard_norms(connection, run_id, attempt).items() if len(found.steps)
    }
    return _of_steps(shares, stretches) if shares else None


def _of_times(told: HeatMap, attempt: int, clock: StepClock) -> LayerMap:
    # A short run has fewer reports than there are stretches.
    seen = np.flatnonzero(np.isfinite(told.values).any(axis=0) | told.nonfinite.any(axis=0))
    moments = told.edges[seen + 1]
    rank = min((rank for of, rank in clock if of == attempt), default=None)
    if rank is None:
        ends = (moments - told.edges[0]) / 1e9
    else:
        known = clock[attempt, rank]
        ends = np.interp(moments - known.times[0], known.times - known.times[0], known.last)
    names = tuple(str(row.get(c.LAYER_NAME)) for row in told.rows)
    return LayerMap(names, ends, told.values[:, seen], told.nonfinite[:, seen], is_timed=rank is None)


def _of_steps(shares: Mapping[Place, StepNorms], stretches: int) -> LayerMap:
    steps = np.unique(np.concatenate([found.steps for found in shares.values()]))
    ends = np.array([stretch[-1] for stretch in np.array_split(steps, min(len(steps), stretches))])
    values = np.full((len(shares), len(ends)), np.nan)
    nonfinite = np.zeros(values.shape, bool)
    for row, found in enumerate(shares.values()):
        column = np.searchsorted(ends, found.steps)
        is_finite = np.isfinite(found.norms)
        np.fmax.at(values[row], column[is_finite], found.norms[is_finite])
        nonfinite[row, column[~is_finite]] = True
    return LayerMap(tuple(layer for layer, _ in shares), ends.astype(np.float64), values, nonfinite)
