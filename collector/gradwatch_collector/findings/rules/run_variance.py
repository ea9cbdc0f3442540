"""Runs of one configuration that end with models of different quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView
from gradwatch_slo.runs import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Varying: among ``runs`` or more of one configuration, half of them spread over ``spread`` of the median.

    Half of them are those between the quartiles, so that one failure is no spread.
    """

    runs: int = 5
    spread: float = 0.2


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run whose predecessors of the same configuration (`config=` of `watch`) ended far apart."""
    configuration = view.resource.get(c.CONFIG_HASH)
    qualities = finite(
        [
            float(quality)
            for each in view.predecessors
            if each.run.status is Status.SUCCEEDED and each.resource.get(c.CONFIG_HASH) == configuration
            if (quality := each.summary.get("quality")) is not None
        ]
    )
    if configuration is None or len(qualities) < parameters.runs:
        return None
    lower, middle, upper = np.percentile(qualities, (25, 50, 75))
    # Qualities of losses are negative.
    spread = (upper - lower) / abs(middle) if middle else 0.0
    if spread < parameters.spread:
        return None
    return Sighting(
        since=view.run.started_at,
        evidence={
            "runs": len(qualities),
            "spread": rounded(float(spread)),
            "median_quality": rounded(float(middle)),
            "worst_quality": rounded(float(np.min(qualities))),
            "best_quality": rounded(float(np.max(qualities))),
            "deterministic": flag if isinstance(flag := view.resource.get(c.DETERMINISTIC), bool) else None,
        },
    )


RULE = RunRule(
    name=c.RULE_RUN_VARIANCE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Runs with the same hyper-parameters end with models of very different quality: chance decides, "
    "by seeds, by the order of data, or by operations that are not deterministic.",
    action="Seed all generators, try `torch.use_deterministic_algorithms(True)`, and judge a change by "
    "several runs and not by one.",
)
