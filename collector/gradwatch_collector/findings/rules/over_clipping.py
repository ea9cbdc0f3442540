"""Clipping that cuts nearly all gradients to a small part: the bound decides how large steps are, not they."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_collector.findings.track import RECENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Over-clipping: ``share`` of the newest ``window`` clipped steps were cut to below ``ratio``.

    ``window`` of them are needed.
    """

    ratio: float = limited(0.1, most=1.0)
    share: float = limited(0.9, most=1.0)
    window: int = limited(50, least=1, most=RECENT)


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the first optimizer that clips too hard."""
    told = view.every(c.CLIP_RATIO)
    for number in told:
        if number.rank == told[0].rank and (found := _clipped(view, number, parameters)) is not None:
            return found
    return None


def _clipped(view: RunView, number: Number, parameters: Parameters) -> Sighting | None:
    ratios = finite(number.recent.values[-parameters.window :])
    if len(ratios) < parameters.window:
        return None
    low = float(np.mean(ratios < parameters.ratio))
    if low < parameters.share:
        return None
    return Sighting(
        step=view.step_at(int(number.recent.times[-1])),
        evidence={
            "clip_ratio": rounded(median(ratios)),
            "clipped_steps": rounded(low),
            "of_steps": len(ratios),
        },
    )


RULE = RunRule(
    name=c.RULE_OVER_CLIPPING,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Nearly every gradient is clipped to a small part of its norm: the bound is far below the usual "
    "norm, so that clipping decides how large steps are.",
    action="Set the bound to where the norm's upper tail begins (`gradwatch runs show` tells the norm), or "
    "lower the learning rate if gradients have grown.",
)
