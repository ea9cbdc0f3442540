"""The loss rises, and stays, above what it had come down to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, finite, rounded, sliding_medians
from gradwatch_collector.findings.losses import Descent, descent, own_losses
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import Number, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Divergence: the loss rose above its lowest level by ``gain`` of its fall and ``level`` of that level.

    Or by ``lost`` of its fall, if that was ``fall`` of that level or more. Two medians of 20 values one after
    the other did, within the newest 512, and by ``noise`` times what single values deviate by chance; and it is
    still above the lowest, by half as much. Losses of several optimizers may rise for good reasons: it takes
    ``rivalry`` times as much.
    """

    gain: float = 0.2
    level: float = 0.3
    lost: float = 0.5
    fall: float = 0.2
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
    medians = sliding_medians(finite(number.recent.values))
    # The least that the loss was over 20 values and the 20 after them, and where they begin.
    lasting = np.minimum(medians[:-LEAST], medians[LEAST:])
    places = np.flatnonzero(np.isfinite(number.recent.values))[: len(lasting)]
    earlier = np.searchsorted(loss.levels.after, loss.steps - len(number.recent) + places, side="right")
    lasting, places, earlier = (each[earlier > 0] for each in (lasting, places, earlier))
    if not len(lasting):
        return None
    start, lowest = loss.start, np.minimum.accumulate(loss.levels.values)[earlier - 1]
    fall = start - lowest
    bound = parameters.gain * fall + parameters.level * np.abs(lowest)
    bound = np.where(fall >= parameters.fall * np.abs(lowest), np.minimum(bound, parameters.lost * fall), bound)
    bound = np.maximum(times * bound, parameters.noise * loss.noise)
    above = lasting - lowest - bound
    most = int(np.argmax(above))
    if above[most] <= 0 or loss.now - lowest[most] <= bound[most] / 2:
        return None
    # Half of these 20 are high.
    first = places[int(np.argmax(above > 0))] + LEAST // 2
    since = int(number.recent.times[first])
    return Sighting(
        step=view.step_at(since),
        rank=number.rank,
        since=since,
        evidence={
            "loss": rounded(loss.now),
            "highest_loss": rounded(float(lasting[most])),
            "lowest_loss": rounded(float(lowest[most])),
            "loss_at_start": rounded(start),
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
