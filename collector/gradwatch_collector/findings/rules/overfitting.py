"""A model that learns its training data by heart: what is held out gets worse while the rest gets better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, median, noise, rounded
from gradwatch_collector.findings.losses import only_loss, validation_loss
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Overfitting: the newest ``evaluations`` held-out losses are above the lowest by ``rise`` of it.

    And by ``noise`` times what they deviate by from one to the next by chance, while the training loss is not
    above what it was then.
    """

    rise: float = 0.08
    noise: float = 3.0
    evaluations: int = 3


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a held-out loss that rises while the training loss falls."""
    held_out, training = validation_loss(view), only_loss(view)
    if held_out is None or training is None:
        return None
    course = held_out.course
    known = np.isfinite(course.mean)
    values, times = course.mean[known], course.times[known]
    if len(values) <= parameters.evaluations:
        return None
    best = int(np.argmin(values))
    newest = held_out.recent.values[-parameters.evaluations :]
    lowest = float(values[best])
    rise = max(parameters.rise * abs(lowest), parameters.noise * noise(held_out.recent.values))
    if not np.all(newest > lowest + rise):
        return None
    then = median(training.course.mean[np.abs(training.course.times - times[best]).argsort()[:5]])
    now = median(training.recent.values[-LEAST:])
    if not now <= then:
        return None
    since = int(times[best])
    return Sighting(
        step=view.step_at(since),
        since=since,
        evidence={
            "held_out_loss": rounded(median(newest)),
            "lowest_held_out_loss": rounded(lowest),
            "training_loss": rounded(now),
            "training_loss_then": rounded(then),
        },
    )


RULE = RunRule(
    name=c.RULE_OVERFITTING,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The held-out loss has risen since its lowest while the training loss has not: the model learns "
    "its training data by heart.",
    action="Keep the checkpoint of the step in question and stop there; next time use more data, "
    "augmentation, dropout or weight decay, or a smaller model.",
)
