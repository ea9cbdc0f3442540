"""Service-level indicators over runs: what makes a run good, bad, or not counted.

They say what is meant; whoever holds the runs counts them by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Final, Literal, get_args

Operator = Literal["gt", "gte", "lt", "lte"]
# Numbers that are known of an ended run: columns of its summary (`runs/summary.py` of the collector).
RunValue = Literal[
    "nonfinite_steps",
    "gpu_utilization",
    "collective_p95",
    "collective_p95_ratio",
    "memory_headroom",
    "step_cost",
    "step_cost_ratio",
    "quality",
    "quality_delta",
    "effective_time_ratio",
]
# Those that compare a run with others, or with one that is pinned, and what is compared.
COMPARISONS: Final[Mapping[RunValue, RunValue]] = {
    "collective_p95_ratio": "collective_p95",
    "step_cost_ratio": "step_cost",
    "quality_delta": "quality",
}
# What a run has many of, and how one of them is bad.
UnitFault = Literal["unhealthy", "nonfinite", "failed"]
UNIT_FAULTS: Final[Mapping[Literal["step", "checkpoint"], tuple[UnitFault, ...]]] = {
    "step": ("unhealthy", "nonfinite"),
    "checkpoint": ("failed",),
}
RUN_VALUES: Final[tuple[RunValue, ...]] = get_args(RunValue)
# Between what they can be; None is without bound.
RANGES: Final[Mapping[RunValue, tuple[int | None, int | None]]] = {
    "nonfinite_steps": (0, None),
    "gpu_utilization": (0, 1),
    "collective_p95": (0, None),
    "collective_p95_ratio": (0, None),
    "memory_headroom": (None, 1),
    "step_cost": (0, None),
    "step_cost_ratio": (0, None),
    "quality": (None, None),
    "quality_delta": (None, None),
    "effective_time_ratio": (0, 1),
}


@dataclass(frozen=True, slots=True)
class SuccessRate:
    """M1: runs that succeeded, of those that succeeded, failed or were lost.

    Cancelled, preempted and unfinished runs do not count, nor do runs that succeeded in less than
    ``min_duration``: smoke runs must not flatter the rate.
    """

    min_duration: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Convergence:
    """M2: runs that reached their target within the threshold, of those that have a target and a threshold.

    The threshold is the run's own deadline, else ``deadline``, else 1.5 x what the run ``baseline_run`` took to
    its target, or where neither is given the baseline that was frozen at the run's start. A run is not held
    against itself. However a run ended,
    it is bad if it had not reached its target: a cancelled one has not converged either. A run that goes on
    counts as soon as its result can no longer change: good once it reached the target in time, bad once the
    threshold passed.
    """

    deadline: timedelta | None = None
    baseline_run: str | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Runs whose every named field has one of the values."""

    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class CountRatio:
    """Ended runs that match, of all ended runs selected: OpenSLO's good (or bad) and total.

    ``inverted``: the matching ones are the bad ones. Succeeded runs shorter than ``min_duration`` do not count.
    """

    total: Selection
    matching: Selection
    inverted: bool = False
    min_duration: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Ended runs whose ``value`` compares so with ``bound``, of those of which it is known.

    Runs shorter than ``min_duration`` do not count: of a minute most is start-up. With ``baseline_run`` a value
    of `COMPARISONS` is held against this run's, as it is known now, and not against what is usual.
    """

    value: RunValue
    operator: Operator
    bound: Decimal
    min_duration: timedelta = timedelta(0)
    baseline_run: str | None = None


@dataclass(frozen=True, slots=True)
class UnitRatio:
    """Steps or checkpoints of ended runs that have no ``fault``, of all of which that is known."""

    unit: Literal["step", "checkpoint"]
    fault: UnitFault


Measure = SuccessRate | Convergence | CountRatio | Threshold | UnitRatio


def pinned_run(measure: Measure) -> str | None:
    """Return the run that others are held against by this measure, if one is pinned."""
    return measure.baseline_run if isinstance(measure, Convergence | Threshold) else None
