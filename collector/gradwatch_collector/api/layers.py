"""Gradient norms by layer over a whole attempt, from the stored interval aggregates and the shards' squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.runs.shards import Place, place_of, shard_norms
from gradwatch_collector.runs.telling import number
from gradwatch_collector.storage.reading import read_series
from gradwatch_collector.storage.rolled_up import PointRollup, read_rollups

_Reduce = Callable[[npt.NDArray[np.float64]], Any]
_FIELDS: dict[str, _Reduce] = {"count": np.sum, "sum": np.sum, "min": np.min, "max": np.max}


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """L2 norms of one parameter's gradient over the observed steps of all ranks; finite steps only.

    A sharded parameter has one norm a step, over all ranks.
    """

    layer: str
    optimizer: int | None
    steps_observed: int
    mean: float | None
    minimum: float | None
    maximum: float | None

    def json(self) -> dict[str, Any]:
        """Return the shape ``runs show`` gives."""
        return {
            "layer": self.layer,
            "optimizer": self.optimizer,
            "steps_observed": self.steps_observed,
            "mean": self.mean,
            "min": self.minimum,
            "max": self.maximum,
        }


def layer_summaries(connection: Connection, run_id: str, attempt: int) -> list[LayerSummary]:
    """Return the layers of an attempt in the order the agent reported them."""
    totals: dict[Place, dict[str, float]] = {}
    for field, reduce in _FIELDS.items():
        told = [
            (point.attributes, float(reduce(point.values.astype(np.float64))))
            for point in read_series(connection, run_id, c.LAYER_GRADIENT_NORM.name, field, attempt=attempt)
            if point.values is not None and point.values.size
        ]
        rolled_up = read_rollups(connection, run_id, c.LAYER_GRADIENT_NORM.name, field, attempt=attempt)
        told += [(rolled.attributes, _of_rollup(rolled, field)) for rolled in rolled_up]
        for attributes, value in told:
            place = place_of(attributes)
            held = totals.setdefault(place, {})
            held[field] = float(reduce(np.array([value, *([held[field]] if field in held else [])])))
    for place, found in shard_norms(connection, run_id, attempt).items():
        finite = found.norms[np.isfinite(found.norms)]
        totals[place] = {"count": finite.size}
        if finite.size:
            totals[place] |= {
                field: float(reduce(finite)) for field, reduce in _FIELDS.items() if field != "count"
            }
    return [_summary(layer, optimizer, held) for (layer, optimizer), held in totals.items()]


def _of_rollup(rolled: PointRollup, field: str) -> float:
    # What a field tells of an interval adds up over intervals, but for the least and the greatest.
    if field == "min":
        return float(np.fmin.reduce(rolled.minimum))
    return float(np.fmax.reduce(rolled.maximum)) if field == "max" else rolled.total


def _summary(layer: str, optimizer: int | None, held: dict[str, float]) -> LayerSummary:
    count = round(held.get("count", 0))
    if not count:
        return LayerSummary(layer, optimizer, 0, None, None, None)
    # Sum, least and greatest are optional in OTLP, and may be no numbers.
    told = {field: number(held.get(field)) for field in ("sum", "min", "max")}
    mean = None if told["sum"] is None else told["sum"] / count
    return LayerSummary(layer, optimizer, count, mean, told["min"], told["max"])
