"""Gradients that are mostly chance: their norm is another one in each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, noise, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Noisy: the logarithm of the norm deviates by ``deviation`` from step to step, over ``window`` norms.

    1.0 is a norm that is mostly between a third and three times its level.
    """

    deviation: float = 1.0
    window: int = 50


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the first optimizer whose gradient norm is noisy."""
    told = view.every(c.GRADIENT_NORM)
    for number in told:
        norms = finite(number.recent.values[-2 * parameters.window :])
        norms = norms[norms > 0]
        if number.rank != told[0].rank or len(norms) < parameters.window:
            continue
        deviation = noise(np.log(norms))
        if deviation >= parameters.deviation:
            return Sighting(
                step=view.step_at(int(number.recent.times[-1])),
                evidence={"log_deviation": rounded(deviation), "norms": len(norms)},
            )
    return None


RULE = RunRule(
    name=c.RULE_NOISY_GRADIENTS,
    severity=Severity.INFO,
    detect=detect,
    parameters=Parameters(),
    cause="The gradient norm jumps from step to step: batches are too small to say where the loss falls, or "
    "their samples differ very much.",
    action="Use larger batches or accumulate gradients; if that is not possible, a lower learning rate.",
)
