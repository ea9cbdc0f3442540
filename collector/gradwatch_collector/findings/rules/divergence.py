"""The loss rises, and stays, above what it had come down to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, median, rounded
from gradwatch_collector.findings.losses import Descent, descent, own_losses
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import Number, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Divergence: the loss rose above its lowest level by ``gain`` of its fall and ``level`` of that level.

    The newest two medians of 20 values did, and by ``noise`` times what single values deviate by chance. Losses
    of several optimizers may rise for good reasons: it takes ``rivalry`` times as much.
    """

    gain: float = 0.2
    level: float = 0.3
    noise: float = 3.0
    rivalry: float = 8.0


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the first loss that has risen for good."""
    losses = own_losses(view)
    for number in losses:
        loss = descent(number)
        times = parameters.rivalry if len(losses) > 1 else 1.0
        if loss is not None and (found := _rise(view, number, loss, times, parameters)) is not None:
            return found
    return None


def _rise(
    view: RunView, number: Number, loss: Descent, times: float, parameters: Parameters
) -> Sighting | None:
    recent = loss.recent
    newest = [median(recent[-LEAST:]), median(recent[-2 * LEAST : -LEAST])]
    before = loss.levels.before(loss.steps - 2 * LEAST)
    if not len(before) or not np.all(np.isfinite(newest)):
        return None
    start, lowest = float(before.values[0]), float(np.min(before.values))
    bound = times * (parameters.gain * (start - lowest) + parameters.level * abs(lowest))
    if min(newest) - lowest <= max(bound, parameters.noise * loss.noise):
        return None
    since = int(number.recent.times[-2 * LEAST :][0])
    return Sighting(
        step=view.step_at(since),
        rank=number.rank,
        since=since,
        evidence={
            "loss": rounded(loss.now),
            "lowest_loss": rounded(lowest),
            "loss_at_start": rounded(start),
            "noise": rounded(loss.noise),
        },
    )


RULE = RunRule(
    name=c.RULE_DIVERGENCE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The loss has lastingly risen above what it had reached: a learning rate that is too high, a "
    "change of the data or of their labels, or an unstable optimizer state.",
    action="Compare gradient norm, learning rate and inputs before and after the step; go back to the last "
    "good checkpoint, and go on with a lower learning rate or without the data in question.",
)
