"""What a set of outcomes is worth: what was found, missed and false, where NaNs were born, how late it was."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gym.fault import STRONG, WEAK
from gym.faults import KINDS
from gym.outcome import Found, Outcome

LOUD: Final = ("page", "ticket")


@dataclass(frozen=True, slots=True)
class Recall:
    """How many of the runs with a fault were found."""

    found: int
    total: int

    @property
    def share(self) -> float | None:
        """None of no runs."""
        return self.found / self.total if self.total else None

    def __str__(self) -> str:
        share = self.share
        return "none" if share is None else f"{self.found} of {self.total} ({100 * share:.0f} %)"


def finding_of(outcome: Outcome) -> Found | None:
    """Return the finding that names the fault of a run, the earliest of several; None if it was missed.

    What was there before the fault came does not name it.
    """
    assert outcome.planned.fault is not None
    expected = KINDS[outcome.planned.fault].expected
    right = [found for found in outcome.findings if found.rule in expected and not _is_early(outcome, found)]
    return min(right, key=lambda found: float("inf") if found.seen is None else found.seen, default=None)


def unexpected(outcome: Outcome) -> list[Found]:
    """Return what was found of a run and is not true of it; info, which raises no alert, included."""
    kind = KINDS[outcome.planned.fault] if outcome.planned.fault is not None else None
    right = kind.expected | kind.companions if kind else frozenset()
    return [each for each in outcome.findings if each.rule not in right or _is_early(outcome, each)]


def _is_early(outcome: Outcome, found: Found) -> bool:
    """Return whether it was found before there was a fault to be found."""
    fault, truth = outcome.planned.fault, outcome.injection
    if fault is None or truth is None or KINDS[fault].from_start:
        return False
    return found.seen is not None and found.seen < truth.time


def recall(outcomes: Iterable[Outcome], strength: str) -> Recall:
    """Return how many of the faults of one strength were found."""
    of_it = [outcome for outcome in outcomes if outcome.planned.strength == strength]
    return Recall(sum(finding_of(outcome) is not None for outcome in of_it), len(of_it))


def birthplaces(outcomes: Iterable[Outcome]) -> Recall:
    """Return how many of the NaNs that were found were said to be born where they were."""
    with_one = [each for each in outcomes if each.injection is not None and each.injection.born_in is not None]
    return Recall(sum(is_birthplace_right(each) for each in with_one), len(with_one))


def is_birthplace_right(outcome: Outcome) -> bool:
    """Return whether a finding says both where in the step a NaN was born and in which layer.

    For one that is born in a backward pass the layer is the parameter whose gradient was the first bad one.
    """
    found, truth = finding_of(outcome), outcome.injection
    if found is None or truth is None or found.born_in != truth.born_in:
        return False
    if truth.born_in == "backward" and truth.layer is not None and found.layer is not None:
        return found.layer.rpartition(".")[0] == truth.layer
    return found.layer == truth.layer


@dataclass(frozen=True, slots=True)
class Delay:
    """How long after its fault a finding was there. ``steps``: None where the finding names no step."""

    steps: int | None
    seconds: float


def delays(outcomes: Iterable[Outcome]) -> Iterator[Delay]:
    """Yield the delay of each fault that came in a run's course and was found."""
    for outcome in outcomes:
        fault, truth = outcome.planned.fault, outcome.injection
        if fault is None or truth is None or KINDS[fault].from_start:
            continue
        found = finding_of(outcome)
        if found is not None and found.seen is not None:
            yield Delay(None if found.step is None else found.step - truth.step, found.seen - truth.time)


@dataclass(frozen=True, slots=True)
class Alarms:
    """What was found of healthy runs: runs, and findings by severity."""

    runs: int
    by_severity: Counter[str]
    rules: Counter[str]


def false_alarms(outcomes: Iterable[Outcome]) -> Alarms:
    """Return what was found of runs in which nothing is wrong."""
    healthy = [outcome for outcome in outcomes if outcome.planned.fault is None]
    found = [found for outcome in healthy for found in outcome.findings]
    return Alarms(len(healthy), Counter(each.severity for each in found), Counter(each.rule for each in found))


def confusion(outcomes: Sequence[Outcome]) -> dict[str, Counter[str]]:
    """Return for each fault (`healthy` for none) in how many of its runs each rule was found."""
    matrix: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        row = matrix.setdefault(outcome.planned.fault or "healthy", Counter())
        row.update({found.rule for found in outcome.findings})
    return matrix


def untrue(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the runs that were not what they should have been, so that nothing follows from them.

    A healthy run that failed, or a fault that never came.
    """
    return [
        outcome
        for outcome in outcomes
        if (any(outcome.exit_codes) if outcome.planned.fault is None else outcome.injection is None)
    ]


def median(numbers: Iterable[float]) -> float | None:
    """None of no numbers."""
    known = list(numbers)
    return statistics.median(known) if known else None


def summary(outcomes: Sequence[Outcome], interval: float) -> dict[str, str]:
    """Return the figures of a set in words. ``interval``: seconds between two exports."""
    late, alarms, born = list(delays(outcomes)), false_alarms(outcomes), birthplaces(outcomes)
    seconds = [delay.seconds for delay in late]
    steps = median(delay.steps for delay in late if delay.steps is not None)
    in_time = sum(each <= 3 * interval for each in seconds)
    loud = ", ".join(f"{alarms.by_severity[severity]} {severity}s" for severity in LOUD)
    return {
        "strong faults found": str(recall(outcomes, STRONG)),
        "weak faults found": str(recall(outcomes, WEAK)),
        f"found of {alarms.runs} healthy runs": f"{loud}, {alarms.by_severity['info']} infos",
        "NaNs whose birthplace is right": str(born),
        "delay, median": "unknown"
        if steps is None or not seconds
        else f"{steps:.0f} steps, {statistics.median(seconds):.1f} s (longest {max(seconds):.1f} s)",
        f"found within 3 export intervals of {interval:.0f} s": f"{in_time} of {len(seconds)}",
    }
