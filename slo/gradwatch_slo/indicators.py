"""Service-level indicators over runs: what makes a run good, bad, or not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from gradwatch_slo.runs import REASON_PREEMPTED, Status
from gradwatch_slo.standing import Standing


class Quality(Enum):
    """What a run adds to an objective."""

    GOOD = auto()
    BAD = auto()
    NOT_COUNTED = auto()


@dataclass(frozen=True, slots=True)
class SuccessRate:
    """M1: runs that succeeded, of those that succeeded, failed or were lost.

    Cancelled, preempted and unfinished runs do not count, nor do runs that succeeded in less than
    ``min_duration``: smoke runs must not flatter the rate.
    """

    min_duration: timedelta = timedelta(0)

    def judge(self, standing: Standing) -> Quality:
        """Return what the run adds."""
        if standing.ended is None:
            return Quality.NOT_COUNTED
        if standing.status is Status.SUCCEEDED:
            short = standing.ended - standing.started < self.min_duration
            return Quality.NOT_COUNTED if short else Quality.GOOD
        if standing.status is Status.CANCELLED or standing.run.reason == REASON_PREEMPTED:
            return Quality.NOT_COUNTED
        return Quality.BAD


@dataclass(frozen=True, slots=True)
class Convergence:
    """M2: runs that reached their target within the threshold, of those that have a target and a threshold.

    The threshold is the run's own deadline, else ``deadline``, else the job's baseline. However a run ended, it
    is bad if it had not reached its target: a cancelled one has not converged either. A run that goes on counts
    as soon as its result can no longer change: good once it reached the target in time, bad once the threshold
    passed at ``as_of``.
    """

    deadline: timedelta | None = None

    def judge(self, standing: Standing, as_of: datetime, baselines: Mapping[str, timedelta]) -> Quality:
        """Return what the run adds; ``baselines`` as :func:`~gradwatch_slo.baseline.baseline_thresholds`."""
        run = standing.run
        thresholds = (run.deadline, self.deadline, baselines.get(run.run_id))
        threshold = next((known for known in thresholds if known is not None), None)
        if run.target is None or threshold is None:
            return Quality.NOT_COUNTED
        if standing.reached is not None:
            return Quality.GOOD if standing.reached - standing.started <= threshold else Quality.BAD
        if standing.ended is not None or as_of - standing.started > threshold:
            return Quality.BAD
        return Quality.NOT_COUNTED


@dataclass(frozen=True, slots=True)
class Selection:
    """Runs whose every named field has one of the values; ``status`` is the run's standing."""

    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def matches(self, standing: Standing) -> bool:
        """Return whether the run is selected."""
        return all(
            (standing.status if name == "status" else getattr(standing.run, name)) in values
            for name, values in self.fields
        )


@dataclass(frozen=True, slots=True)
class CountRatio:
    """Ended runs that match, of all ended runs selected: OpenSLO's good (or bad) and total.

    ``inverted``: the matching ones are the bad ones. Succeeded runs shorter than ``min_duration`` do not count.
    """

    total: Selection
    matching: Selection
    inverted: bool = False
    min_duration: timedelta = timedelta(0)

    def judge(self, standing: Standing) -> Quality:
        """Return what the run adds."""
        if standing.ended is None or not self.total.matches(standing):
            return Quality.NOT_COUNTED
        if standing.status is Status.SUCCEEDED and standing.ended - standing.started < self.min_duration:
            return Quality.NOT_COUNTED
        return Quality.BAD if self.matching.matches(standing) is self.inverted else Quality.GOOD


Measure = SuccessRate | Convergence | CountRatio
