"""The model's inputs are not what they were."""

from __future__ import annotations

from collections.abc import Callable
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

    That each of the newest ``times`` batches that were looked at did, from all of the first half of the time
    till then (at least the first ``reference``), and by ``chance`` times more than these lie apart, the oddest
    of them left out where there are more. What drifts ever further, as what a generator makes for its critic
    does, is no shift.
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


@dataclass(frozen=True, slots=True)
class _Ends:
    """What was told of an input: at first ``least`` to ``most``, around ``middle``; then ``newest``."""

    least: float
    most: float
    middle: float
    newest: Doubles

    def apart(self, chance: float, scale: Callable[[Doubles], Doubles] = np.asarray) -> float:
        """Return how far the newest lie from the first, beyond so many times as far as these lie apart."""
        least, most = scale(np.array([self.least, self.most]))
        newest = scale(self.newest)
        return float(max(np.min(newest) - most, least - np.max(newest)) - chance * (most - least))


@np.errstate(over="ignore", invalid="ignore")  # the largest of floats may lie apart by more than a float
def _shift(view: RunView, mean: Number, spread: Number, parameters: Parameters) -> Sighting | None:
    means, spreads = (_ends(each, parameters) for each in (mean, spread))
    if means is None or spreads is None or min(spreads.least, np.min(spreads.newest)) <= 0:
        return None
    moved = means.apart(parameters.chance) / spreads.middle
    widened = spreads.apart(parameters.chance, np.log)
    if not (moved >= parameters.mean or widened >= np.log(parameters.factor)):
        return None
    since = int(mean.recent.times[-parameters.times])
    return Sighting(
        step=view.step_at(since),
        rank=mean.rank,
        since=since,
        evidence={
            "input": _place(mean)[1],
            "mean": rounded(median(means.newest)),
            "mean_at_start": rounded(means.middle),
            "stddev": rounded(median(spreads.newest)),
            "stddev_at_start": rounded(spreads.middle),
        },
    )


def _ends(number: Number, parameters: Parameters) -> _Ends | None:
    """Return the first and the newest of a number, None while there is not enough of both."""
    course, recent = number.course, number.recent
    if (course.finite + course.nonfinite).sum() < parameters.reference + parameters.times:
        return None
    half = (course.times[0] + recent.times[-parameters.times]) / 2
    early = (course.times <= half) | (np.arange(len(course)) * course.width < parameters.reference)
    known, newest = early & (course.finite > 0), finite(recent.values[-parameters.times :])
    if not known.any() or not len(newest):
        return None
    if known.sum() > parameters.reference:
        distances = np.abs(course.mean - median(course.mean[known]))
        known[np.argmax(np.where(known, distances, -1.0))] = False
    return _Ends(
        least=float(np.min(course.least[known])),
        most=float(np.max(course.most[known])),
        middle=median(course.mean[known]),
        newest=newest,
    )


RULE = RunRule(
    name=c.RULE_INPUT_SHIFT,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The model is fed something else than before: another source or shard, a changed "
    "preprocessing or unit, normalisation left out, or a broken reader.",
    action="Compare batches before and after the step; check which files the loader reads by then, and with "
    "which transforms.",
)
