"""The model's inputs are not what they were at the run's start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Number, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A shift: the mean moved by ``mean`` standard deviations, or the standard deviation by ``factor``.

    That each of the newest ``times`` batches that were looked at did, from each of the first ``reference``, and
    by ``chance`` times more than how far apart these are by chance.
    """

    reference: int = 4
    times: int = 2
    mean: float = 0.3
    factor: float = limited(1.35, least=1.0)
    chance: float = 1.0


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the first input that has shifted."""
    spreads = {_place(each): each for each in view.every(c.INPUT_STDDEV)}
    for mean in view.every(c.INPUT_MEAN):
        spread = spreads.get(_place(mean))
        if spread is not None and (found := _shift(view, mean, spread, parameters)) is not None:
            return found
    return None


def _place(number: Number) -> tuple[int, str]:
    # As text: a sender may name an input by a list.
    return number.rank, str(number.attributes.get(c.INPUT_NAME))


def _shift(view: RunView, mean: Number, spread: Number, parameters: Parameters) -> Sighting | None:
    means, spreads = (_ends(each.course.mean, each.recent.values, parameters) for each in (mean, spread))
    if means is None or spreads is None or min(map(np.min, spreads)) <= 0:
        return None
    unit = median(spreads[0])
    moved = _gap(*means, parameters.chance) / unit
    widened = _gap(np.log(spreads[0]), np.log(spreads[1]), parameters.chance)
    if moved < parameters.mean and widened < np.log(parameters.factor):
        return None
    since = int(mean.recent.times[-parameters.times])
    return Sighting(
        step=view.step_at(since),
        rank=mean.rank,
        since=since,
        evidence={
            "input": _place(mean)[1],
            "mean": rounded(median(means[1])),
            "mean_at_start": rounded(median(means[0])),
            "stddev": rounded(median(spreads[1])),
            "stddev_at_start": rounded(unit),
        },
    )


def _ends(course: Doubles, recent: Doubles, parameters: Parameters) -> tuple[Doubles, Doubles] | None:
    """Return what was told first and last of an input, None while there is not enough of both."""
    if len(course) < parameters.reference + parameters.times:
        return None
    first, newest = finite(course[: parameters.reference]), finite(recent[-parameters.times :])
    return (first, newest) if len(first) and len(newest) else None


def _gap(first: Doubles, newest: Doubles, chance: float) -> float:
    """Return how far apart two groups of values are, beyond so many times as far as the first lie apart."""
    apart = max(np.min(newest) - np.max(first), np.min(first) - np.max(newest))
    return float(apart - chance * (np.max(first) - np.min(first)))


RULE = RunRule(
    name=c.RULE_INPUT_SHIFT,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The model is fed something else than at the run's start: another source or shard, a changed "
    "preprocessing or unit, normalisation left out, or a broken reader.",
    action="Compare batches before and after the step; check which files the loader reads by then, and with "
    "which transforms.",
)
