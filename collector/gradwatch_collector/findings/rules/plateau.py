"""A loss that has not come down from where it began."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.losses import descent, first_step, of_quality, only_loss
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Number, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A plateau: after ``steps`` steps the loss has fallen by less than ``gain`` of what it was at the start.

    No plateau is one whose learning rate is still on its way up, one that went on from a checkpoint, a loss
    below zero, one whose values deviate by more than ``noise`` of it, what several optimizers play against each
    other, and a run in which anything that tells of the model's quality has changed by ``progress`` of what it
    was.
    """

    steps: int = 100
    gain: float = limited(0.02, most=1.0)
    noise: float = 0.5
    progress: float = 0.1


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a loss that is as high as at the start."""
    number = only_loss(view)
    loss = descent(number)
    if loss is None or not loss.is_positive or loss.steps < parameters.steps or first_step(view) > 0:
        return None
    # Where it has been for a tenth of the time: by chance alone the lowest of many levels is ever lower.
    low = float(np.quantile(loss.levels.values, 0.1))
    if loss.start - low >= parameters.gain * loss.start or loss.noise > parameters.noise * loss.start:
        return None
    if _is_warming_up(view) or any(_progress(each) >= parameters.progress for each in of_quality(view)):
        return None
    return Sighting(
        step=view.run.last_step,
        since=view.run.started_at,
        evidence={
            "steps": int(loss.steps),
            "loss": rounded(loss.now),
            "loss_at_start": rounded(loss.start),
            "low_loss": rounded(low),
        },
    )


def _is_warming_up(view: RunView) -> bool:
    """Return whether the learning rate is higher than ever before, and was lower a tenth of the run ago."""
    rate = view.first(c.LEARNING_RATE)
    if rate is None:
        return False
    rates = finite(rate.course.mean)
    return len(rates) > 1 and float(rates[-1]) > 1.02 * float(np.max(rates[: -max(1, len(rates) // 10)]))


def _progress(number: Number) -> float:
    """Return by what share of its first value something that was logged has changed."""
    first, now = median(number.course.mean[:1]), median(number.recent.values[-3:])
    return abs(now - first) / abs(first) if first else 0.0


RULE = RunRule(
    name=c.RULE_PLATEAU,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The loss is where it began: the learning rate is far too small or much too large, weights began "
    "badly, gradients do not arrive, or labels do not belong to their inputs.",
    action="Try to learn one batch by heart: if that does not work either, look at initialisation, labels "
    "and the gradients of each layer; if it does, raise the learning rate step by step.",
)
