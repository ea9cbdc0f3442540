"""Gradients that are mostly chance: their norm is another one in each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, finite, levels_of, median, noise, rounded
from gradwatch_collector.findings.losses import Descent, descent, only_loss
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Levels, RunView
from gradwatch_collector.findings.track import RECENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Noisy: from one to the next of ``window`` steps the logarithm of the norm deviates by ``deviation``.

    1.0 is a norm that is mostly between a third and three times its level. Or that of the loss deviates by
    ``loss_deviation``. Neither once the loss is below ``level`` of what it was at the start: of little, chance
    is all that is left. Or the loss deviates by ``factor`` times as much as that of ``runs`` or more earlier
    runs did where it was as high, in ``steps`` steps or more.
    """

    deviation: float = 1.0
    loss_deviation: float = 0.8
    level: float = limited(0.05, most=1.0)
    window: int = limited(50, least=2, most=RECENT // 2)
    factor: float = limited(2.0, least=1.0)
    runs: int = 3
    steps: int = 160


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See gradients that are noisy by themselves, or by their effect on the loss."""
    loss = descent(only_loss(view))
    evidence = None
    if loss is None or not loss.is_positive or loss.now >= parameters.level * loss.start:
        evidence = _by_norm(view, parameters) or _by_loss(loss, parameters)
    evidence = evidence or _by_others(view, parameters)
    return None if evidence is None else Sighting(step=view.run.last_step, evidence=evidence)


def _by_norm(view: RunView, parameters: Parameters) -> Mapping[str, Any] | None:
    told = view.every(c.GRADIENT_NORM)
    for number in told:
        deviation = _log_deviation(number.recent.values, parameters)
        if number.rank == told[0].rank and deviation >= parameters.deviation:
            return {"log_deviation_of_norm": rounded(deviation)}
    return None


def _by_loss(loss: Descent | None, parameters: Parameters) -> Mapping[str, Any] | None:
    if loss is None or not loss.is_positive:
        return None
    deviation = _log_deviation(loss.recent, parameters)
    return {"log_deviation_of_loss": rounded(deviation)} if deviation >= parameters.loss_deviation else None


def _log_deviation(told: Doubles, parameters: Parameters) -> float:
    """Return what the logarithms of the newest values deviate by; 0.0 while there are too few."""
    values = finite(told[-2 * parameters.window :])
    values = values[values > 0]
    return noise(np.log(values)) if len(values) >= parameters.window else 0.0


def _by_others(view: RunView, parameters: Parameters) -> Mapping[str, Any] | None:
    number = only_loss(view)
    if number is None or len(view.precedents) < parameters.runs:
        return None
    recent = number.recent
    own = levels_of(recent.times, recent.values, np.ones(len(recent)))
    usual = np.array([_usual_noise(each, own) for each in view.precedents])
    # At a level that few of them were at nothing is usual.
    known = np.sum(usual > 0, axis=0) >= parameters.runs
    if np.sum(known) * LEAST < parameters.steps:
        return None
    theirs = np.nanmedian(usual[:, known], axis=0)
    ratio = median(own.noise[known] / theirs)
    if ratio < parameters.factor:
        return None
    return {
        "loss_deviation": rounded(median(own.noise[known])),
        "loss_deviation_of_others": rounded(median(theirs)),
        "ratio": rounded(ratio),
        "runs": len(view.precedents),
    }


def _usual_noise(precedent: Levels, own: Levels) -> Doubles:
    """Return the noise of an earlier run's loss where it was as high as this one's, NaN where it never was."""
    if not len(precedent):
        return np.full(len(own), np.nan)
    order = np.argsort(precedent.values)
    levels, noise_there = precedent.values[order], precedent.noise[order]
    return np.interp(own.values, levels, noise_there, left=np.nan, right=np.nan)


RULE = RunRule(
    name=c.RULE_NOISY_GRADIENTS,
    severity=Severity.INFO,
    detect=detect,
    parameters=Parameters(),
    cause="The gradient norm jumps from step to step: batches are too small to say where the loss falls, or "
    "their samples differ very much.",
    action="Use larger batches or accumulate gradients; if that is not possible, a lower learning rate.",
)
