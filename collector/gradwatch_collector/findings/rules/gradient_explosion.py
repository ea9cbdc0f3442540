"""Gradients many times larger than the run's, more than once: a single bad batch is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Number, RunView
from gradwatch_collector.findings.track import RECENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """An explosion: ``times`` norms within the newest ``window`` are above ``ratio`` times the usual one.

    Usual is the median of the run's norms, or of its first ones where these were larger. There have to be
    ``least`` norms first.
    """

    ratio: float = limited(10.0, least=1.0)
    times: int = 3
    window: int = limited(20, least=1, most=RECENT)
    least: int = 10


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the first optimizer whose gradients have exploded."""
    told = view.every(c.GRADIENT_NORM)
    for number in told:
        if number.rank == told[0].rank and (found := _explosion(view, number, parameters)) is not None:
            return found
    return None


def _explosion(view: RunView, number: Number, parameters: Parameters) -> Sighting | None:
    usual = _usual(number)
    norms, times = number.recent.values[-parameters.window :], number.recent.times[-parameters.window :]
    high = np.isfinite(norms) & (norms > parameters.ratio * usual)
    if np.sum(number.course.finite) < parameters.least + parameters.times or usual <= 0:
        return None
    if np.sum(high) < parameters.times:
        return None
    first = int(times[int(np.argmax(high))])
    largest = float(np.max(finite(norms)))
    layer, grown = _layer(view, number.attributes)
    return Sighting(
        step=view.step_at(first),
        layer=layer,
        since=first,
        evidence={
            "norm": rounded(largest),
            "usual_norm": rounded(usual),
            "ratio": rounded(largest / usual),
            "high_norms": int(np.sum(high)),
            "layer_ratio": rounded(grown),
            "clip_ratio": _clip_ratio(view, number.attributes, first),
        },
    )


def _usual(number: Number) -> float:
    """Return the run's median norm, or the first ones' where larger: gradients fall as a loss does."""
    return max(median(number.course.mean), median(number.course.mean[:5]))


def _layer(view: RunView, attributes: Mapping[str, Any]) -> tuple[str | None, float]:
    """Return the layer whose largest norm has grown most over the intervals before, and how many times."""
    optimizer = attributes.get(c.OPTIMIZER)
    for layers in view.layers.get(f"{c.LAYER_GRADIENT_NORM.name} max", ()):
        if layers.attributes.get(c.OPTIMIZER) == optimizer and layers.values.shape[1] > 1:
            grown = [_growth(each) for each in layers.values]
            if np.any(np.isfinite(grown)):
                most = int(np.nanargmax(grown))
                return layers.names[most], grown[most]
    return None, float("nan")


def _growth(norms: Doubles) -> float:
    """Return how many times its median over all intervals a layer's largest of the newest three is."""
    newest, usual = finite(norms[-3:]), median(norms)
    return float(np.max(newest) / usual) if len(newest) and usual > 0 else float("nan")


def _clip_ratio(view: RunView, attributes: Mapping[str, Any], since: int) -> float | None:
    """Return what clipping left of the gradients since then, at the least."""
    for number in view.every(c.CLIP_RATIO):
        if number.attributes.get(c.OPTIMIZER) == attributes.get(c.OPTIMIZER):
            ratios = finite(number.recent.values[number.recent.times >= since])
            return rounded(float(np.min(ratios))) if len(ratios) else None
    return None


RULE = RunRule(
    name=c.RULE_GRADIENT_EXPLOSION,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The gradient norm is many times what it was: a learning rate that is too high, a layer without "
    "normalisation, or a stretch of bad data.",
    action="Look at the layer and step; lower the learning rate or warm it up longer, and clip gradients. Go "
    "back to the last good checkpoint if the loss has risen too.",
)
