"""Norms of sharded layers: every rank sends the squared norm of its share, and their sum is the layer's.

The clocks of ranks differ, so shares meet by step: they carry the time of the step they belong to, or, for an
optimizer that is not the first, a time within it. A step counts if all ranks that ever reported the layer
did so in it; ranks that thin their sampling differently have the rarer one's steps in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.records import Attributes
from gradwatch_collector.runs.telling import integer
from gradwatch_collector.storage.reading import PointSeries, read_series

Place = tuple[str, int | None]
_Steps = dict[int, float]


@dataclass(frozen=True, slots=True)
class StepNorms:
    """L2 norms put together from all ranks' shares, in the order of their steps; both of shape ``[n]``."""

    steps: npt.NDArray[np.int64]
    norms: npt.NDArray[np.float64]


def shard_norms(
    connection: Connection, run_id: str, attempt: int, metric: c.Metric = c.LAYER_GRADIENT_SHARD_SQUARE
) -> dict[Place, StepNorms]:
    """Return the norms of every sharded layer, by (layer, optimizer); of `c.GRADIENT_SHARD_SQUARE` of all."""
    clocks = {
        point.rank: point for point in read_series(connection, run_id, c.STEP_INDEX.name, attempt=attempt)
    }
    shares: dict[Place, dict[int, _Steps]] = {}
    for point in read_series(connection, run_id, metric.name, attempt=attempt):
        clock = clocks.get(point.rank)
        if clock is not None:
            by_step = shares.setdefault(place_of(point.attributes), {}).setdefault(point.rank, {})
            by_step.update(_by_step(point, clock))
    return {place: _norms(list(ranks.values())) for place, ranks in shares.items()}


def place_of(attributes: Attributes) -> Place:
    """Return the layer and the optimizer that a point is about, whatever its sender called them."""
    return str(attributes.get(c.LAYER_NAME)), integer(attributes.get(c.OPTIMIZER))


def _by_step(point: PointSeries, clock: PointSeries) -> _Steps:
    assert point.values is not None
    assert clock.values is not None
    at = np.searchsorted(clock.times, point.times)
    known = at < len(clock.times)
    steps = clock.values[at[known]].astype(np.int64)
    return dict(zip(steps.tolist(), point.values[known].astype(np.float64).tolist(), strict=True))


def _norms(ranks: list[_Steps]) -> StepNorms:
    common = sorted(set(ranks[0]).intersection(*ranks[1:]))
    squares = np.array([sum(steps[step] for steps in ranks) for step in common], np.float64)
    return StepNorms(np.array(common, np.int64), np.sqrt(squares))
