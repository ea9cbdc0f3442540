"""Updates with gradients of parameters that are long gone, in asynchronous training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.findings.track import RECENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Stale: the median of the newest ``window`` values of a rank is ``staleness`` updates or more."""

    staleness: float = 5.0
    window: int = limited(10, least=1, most=RECENT)


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the rank whose gradients are the most out of date."""
    told = {
        number.rank: number
        for number in view.every(c.LOGGED)
        if number.attributes.get(c.METRIC_NAME) == c.GRADIENT_STALENESS
    }
    levels = {
        rank: median(values)
        for rank, number in told.items()
        if len(values := finite(number.recent.values[-parameters.window :])) >= parameters.window
    }
    rank = max(levels, key=lambda each: levels[each], default=None)
    if rank is None or levels[rank] < parameters.staleness:
        return None
    newest = told[rank].recent
    return Sighting(
        step=view.step_at(int(newest.times[-1])),
        rank=rank,
        evidence={
            "staleness": rounded(levels[rank]),
            "highest_staleness": rounded(float(np.max(finite(newest.values[-parameters.window :])))),
        },
    )


RULE = RunRule(
    name=c.RULE_STALE_GRADIENTS,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Gradients are applied to parameters many updates newer than those that they were computed from: "
    "a worker lags, or there are too many workers for one another.",
    action="Bound the staleness (wait for the slowest, drop what is too old), use fewer workers, or lower "
    "the learning rate with the staleness.",
)
