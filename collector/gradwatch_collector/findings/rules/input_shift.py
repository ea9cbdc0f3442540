"""The model's inputs are not what they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import finite, median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Course, Doubles, Number, RunView
from gradwatch_collector.records import Times

_LEAST_SPREAD: Final = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A shift: the mean moved by ``mean`` standard deviations, or the standard deviation by ``factor``.

    That each of ``times`` batches in a row that were looked at did, from all of the first half of the time
    till then (at least the first ``reference``), and by ``chance`` times more than these lie apart, the two
    oddest of them left out where there are more. It lasts until one is back where all was before it.
    What drifts ever further, as what a generator makes for its critic does, is no shift.
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
class _Course:
    """A number by stretches with a finite value, all of shape ``[n]``, oldest first.

    ``least``, ``most``: on the scale on which it is judged; ``mean``: as told.
    """

    times: Times
    counts: Doubles
    mean: Doubles
    least: Doubles
    most: Doubles


@dataclass(frozen=True, slots=True)
class _Usual:
    """Where the first stretches lie: ``least`` to ``most``, their ``middle``; numbers, or of shape ``[n]``."""

    least: Any
    most: Any
    middle: Any

    def apart(self, least: Any, most: Any, chance: float) -> Any:
        """Return how far others lie from them, beyond so many times as far as they lie apart themselves."""
        return np.maximum(least - self.most, self.least - most) - chance * (self.most - self.least)


@np.errstate(over="ignore", invalid="ignore")  # the largest of floats may lie apart by more than a float
def _shift(view: RunView, mean: Number, spread: Number, parameters: Parameters) -> Sighting | None:
    means, spreads = _course(mean.course, np.asarray), _course(spread.course, _log)
    count = min(len(means.times), len(spreads.times))
    in_a_row = math.ceil(parameters.times / mean.course.width)
    # By how many stretches each stretch is judged.
    half = np.searchsorted(means.times, (means.times[:1] + means.times[:count]) / 2, side="right")
    by = np.maximum(half, math.ceil(parameters.reference / mean.course.width)) - 1
    judged = np.flatnonzero(by < np.arange(count))
    if not len(judged):
        return None
    usual = [_usual(each, by[judged], parameters) for each in (means, spreads)]
    shifted = _is_shift(
        usual, [(each.least[judged], each.most[judged]) for each in (means, spreads)], parameters
    )
    runs = np.convolve(shifted, np.ones(in_a_row, int), "valid") == in_a_row
    if not runs.any():
        return None
    first = int(np.argmax(runs))
    before = [_Usual(each.least[first], each.most[first], each.middle[first]) for each in usual]
    newest = [finite(each.recent.values[-parameters.times :]) for each in (mean, spread)]
    if not all(map(len, newest)):
        return None
    scaled = newest[0], _log(newest[1])
    if not _is_shift(before, [(np.min(each), np.max(each)) for each in scaled], parameters):
        return None
    since = int(means.times[judged[first]])
    return Sighting(
        step=view.step_at(since),
        rank=mean.rank,
        since=since,
        evidence={
            "input": _place(mean)[1],
            "mean": rounded(median(newest[0])),
            "mean_at_start": rounded(float(before[0].middle)),
            "stddev": rounded(median(newest[1])),
            "stddev_at_start": rounded(float(before[1].middle)),
        },
    )


def _is_shift(usual: Sequence[_Usual], seen: Sequence[tuple[Any, Any]], parameters: Parameters) -> Any:
    """Return whether means and spreads, from the least to the most, lie apart from what they usually are."""
    moved, widened = (each.apart(*told, parameters.chance) for each, told in zip(usual, seen, strict=True))
    unit = usual[1].middle
    return (unit > 0) & ((moved >= parameters.mean * unit) | (widened >= math.log(parameters.factor)))


def _course(course: Course, scale: Callable[[Doubles], Doubles]) -> _Course:
    known = course.finite > 0
    return _Course(
        times=course.times[known],
        counts=course.finite[known],
        mean=course.mean[known],
        least=scale(course.least[known]),
        most=scale(course.most[known]),
    )


def _log(spreads: Doubles) -> Doubles:
    # A constant batch has none, and that is far from any.
    return np.log(np.maximum(spreads, _LEAST_SPREAD))


def _usual(course: _Course, last: npt.NDArray[np.int64], parameters: Parameters) -> _Usual:
    """Return where the stretches lie up to each of ``last``, the most and the least of many left out."""
    many = np.cumsum(course.counts)[last] > parameters.reference
    most, least = _greatest(course.most), _greatest(-course.least)
    return _Usual(
        least=-np.where(many, least[1][last], least[0][last]),
        most=np.where(many, most[1][last], most[0][last]),
        middle=(np.cumsum(course.mean) / np.arange(1, len(course.mean) + 1))[last],
    )


def _greatest(values: Doubles) -> tuple[Doubles, Doubles]:
    """Return the greatest and the second greatest value up to each."""
    first, second = np.maximum.accumulate(values), np.full_like(values, -np.inf)
    second[1:] = np.maximum.accumulate(np.minimum(values[1:], first[:-1]))
    return first, second


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
