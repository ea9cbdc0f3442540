"""Per-step numbers of a run as curves of a bounded length; the shape is ``schemas/curve-list.schema.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.api.shapes import Json, timestamp
from gradwatch_collector.runs.curves import (
    Curve,
    Doubles,
    StepClock,
    read_curves,
    read_gradient_norms,
    read_step_clock,
)
from gradwatch_collector.runs.nonfinite_steps import Steps, nonfinite_steps, nonfinite_told

MAX_POINTS: Final = 2_000
FEW_POINTS: Final = 400
# In one answer: a fleet's run has a curve of each rank and device.
MAX_CURVES: Final = 64
_DIGITS: Final = 6
# One number a step, or thereabouts; those of single layers are a heat map.
METRICS: Final = {
    metric.name: metric
    for metric in c.METRICS
    if metric.kind == "gauge" and c.LAYER_NAME not in metric.attributes and metric is not c.STEP_INDEX
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvesQuery:
    """``metrics``: names of `METRICS`. ``points``: of a curve, at most. ``every_rank``: not the lowest only."""

    run_id: str
    metrics: Sequence[str]
    points: int = FEW_POINTS
    every_rank: bool = False


def list_curves(connection: Connection, query: CurvesQuery) -> Json:
    """Return ``{"run_id": ..., "curves": [...], ...}``, by metric, attempt and rank.

    A curve has a point for each step, or for each of ``query.points`` stretches of steps: the last step of it,
    the mean, the least and the greatest finite value, and how many values were not finite. Gradient norms are
    told of in some steps only: beside them stands in which steps of an attempt gradients are known to be bad.
    """
    clock = read_step_clock(connection, query.run_id)
    found = [
        (METRICS[name], curve)
        for name in dict.fromkeys(query.metrics)
        for curve in _read(connection, query, METRICS[name], clock)
    ]
    return {
        "run_id": query.run_id,
        "curves": [_curve_json(metric, curve, query.points) for metric, curve in found[:MAX_CURVES]],
        "left_out": max(0, len(found) - MAX_CURVES),
        "nonfinite_gradients": list(
            _nonfinite_gradients(
                connection, query.run_id, [curve for metric, curve in found if metric is c.GRADIENT_NORM], clock
            )
        ),
    }


def _nonfinite_gradients(
    connection: Connection, run_id: str, norms: Sequence[Curve], clock: StepClock
) -> Iterator[Json]:
    # A loss that is not finite has such gradients, seen or not.
    losses = read_curves(connection, run_id, c.LOSS, clock) if norms else []
    for attempt in sorted({norm.attempt for norm in norms}):
        told = nonfinite_told(connection, run_id, attempt)
        bad = nonfinite_steps((each for each in (*losses, *norms) if each.attempt == attempt), told.steps)
        known = nonfinite_json(bad)
        if known is not None:
            yield {"attempt": attempt, **known}


def nonfinite_json(steps: Steps) -> Json | None:
    """Return the first and the last of some steps, and how many there are; None without any."""
    return {"first": int(steps[0]), "last": int(steps[-1]), "count": len(steps)} if len(steps) else None


def _read(connection: Connection, query: CurvesQuery, metric: c.Metric, clock: StepClock) -> list[Curve]:
    if metric is c.GRADIENT_NORM:
        return read_gradient_norms(connection, query.run_id, clock)
    return read_curves(connection, query.run_id, metric, clock, every_rank=query.every_rank)


def _curve_json(metric: c.Metric, curve: Curve, points: int) -> Json:
    begins = _begins(len(curve.times), points)
    finite = np.add.reduceat(curve.finite, begins)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(curve.finite > 0, curve.values * curve.finite, 0.0), begins) / finite
    ends = np.append(begins[1:], len(curve.times)) - 1
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "attempt": curve.attempt,
        "rank": curve.rank if curve.rank >= 0 else None,
        "labels": curve.attributes,
        "first_time": timestamp(int(curve.times[0])),
        "last_time": timestamp(int(curve.times[-1])),
        "steps": _rounded(curve.steps[ends]),
        "values": _rounded(means),
        "least": _rounded(np.fmin.reduceat(curve.least, begins)),
        "most": _rounded(np.fmax.reduceat(curve.most, begins)),
        "nonfinite": np.add.reduceat(curve.nonfinite, begins).astype(np.int64).tolist(),
        "nonfinite_steps": nonfinite_json(nonfinite_steps([curve])),
    }


def _begins(count: int, most: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return where each of at most so many stretches of about one length begins."""
    stretches = min(count, most)
    return np.arange(stretches) * count // stretches


def _rounded(values: Doubles) -> list[float | None]:
    return [shown(value) for value in values.tolist()]


def shown(value: float) -> float | None:
    """Return a number with as many digits as a picture can show; None if it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
