"""Mixed precision whose loss scale falls and falls, since step after step overflows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_collector.findings.track import RECENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A collapse: the scale was lowered ``times`` in the newest ``window`` steps, or is below ``least``.

    A scaler that begins at 65 536 finds what fits in some five to ten steps, and later lowers it once in
    thousands.
    """

    times: int = 12
    window: int = limited(100, least=1, most=RECENT)
    least: float = 1.0


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a loss scale that is too low, or on its way there."""
    for number in view.every(c.LOSS_SCALE):
        if (found := _collapse(view, number, parameters)) is not None:
            return found
    return None


def _collapse(view: RunView, number: Number, parameters: Parameters) -> Sighting | None:
    known = np.isfinite(number.recent.values)
    scales, times = number.recent.values[known], number.recent.times[known]
    if not len(scales):
        return None
    fell = np.flatnonzero(scales[1:] < scales[:-1]) + 1
    newest = fell[fell >= len(scales) - parameters.window]
    if len(newest) < parameters.times and not 0 <= scales[-1] < parameters.least:
        return None
    first = int(times[newest[0]]) if len(newest) else int(times[-1])
    highest = finite(number.course.most)
    return Sighting(
        step=view.step_at(first),
        rank=number.rank,
        since=first,
        evidence={
            "loss_scale": rounded(float(scales[-1])),
            "highest_loss_scale": rounded(float(np.max(highest))) if len(highest) else None,
            "times_lowered": len(newest),
            "in_steps": min(len(scales), parameters.window),
            "skipped_steps": _skipped(view, number.rank),
        },
    )


def _skipped(view: RunView, rank: int) -> int | None:
    """Return how many steps the scaler has skipped so far."""
    for number in view.every(c.SKIPPED_STEPS):
        if number.rank == rank:
            with np.errstate(over="ignore", invalid="ignore"):
                counted = float(np.nansum(number.course.mean * number.course.finite))
            return int(counted) if np.isfinite(counted) else None
    return None


RULE = RunRule(
    name=c.RULE_LOSS_SCALE_COLLAPSE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Steps overflow in float16 again and again: the scaler skips them and lowers the loss scale, "
    "until small gradients become zero.",
    action="Train in bfloat16, or keep what overflows (softmax, norms, losses, large sums) in float32; look "
    "for the layer with the largest outputs, and lower the learning rate.",
)
