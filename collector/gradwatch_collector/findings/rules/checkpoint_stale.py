"""A run that would lose much: its last good checkpoint is old."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, step_ends
from gradwatch_collector.findings.levels import rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import CheckpointSeen, RunView
from gradwatch_collector.runs.checkpoints import FAILED, SAVED
from gradwatch_slo.runs import Status

# Two intervals are the least that a rhythm shows in.
_LEAST_GOOD: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """When the last good checkpoint is too old.

    Attributes:
        intervals: How many times the longest interval between two good ones so far. Who saves only what is
            better than before saves ever less often.
        seconds: And at least so old.
        failures: Or so many attempts failed since.
    """

    intervals: float = 3.0
    seconds: float = 900.0
    failures: int = 3


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run whose last good checkpoint is much older than any was; not one that never saved any."""
    if view.run.status is not Status.RUNNING or not view.checkpoints:
        return None
    good = view.good_checkpoints()
    last = good[-1] if good else None
    attempts = [each for each in view.checkpoints if each.state in (SAVED, FAILED)]
    failed = len(list(takewhile(lambda each: each.state == FAILED, reversed(attempts))))
    rank = view.checkpoints[-1].rank if last is None else last.rank
    # By the saver's own clock, as far as its steps have come: one that hangs loses nothing more.
    now = step_ends(view).get(rank)
    age = None if last is None or now is None else (now - last.time) / SECOND
    longest = _longest_interval(good)
    too_old = (
        age is not None
        and longest is not None
        and age > max(parameters.seconds, parameters.intervals * longest)
    )
    if not too_old and failed < parameters.failures:
        return None
    return Sighting(
        rank=rank,
        step=view.run.last_step,
        evidence={
            "age_seconds": None if age is None else round(age),
            "longest_interval_seconds": None if longest is None else rounded(longest),
            "last_good": None if last is None else last.name,
            "last_good_step": None if last is None else last.step,
            "failed_since": failed,
        },
    )


def _longest_interval(good: Sequence[CheckpointSeen]) -> float | None:
    """Return the longest time in seconds between two good ones; of many ranks' parts the first tells."""
    first: dict[object, int] = {}
    for each in good:
        first.setdefault((each.name, each.step), each.time)
    times = sorted(first.values())
    if len(times) < _LEAST_GOOD:
        return None
    return max(later - earlier for earlier, later in pairwise(times)) / SECOND


RULE = RunRule(
    name=c.RULE_CHECKPOINT_STALE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Saving fails, was left out, or is waited for in vain; or what was saved is corrupt.",
    action="Look at the run's checkpoints with `gradwatch runs show RUN` and at what they fail of: a crash "
    "now costs all that was done since the last good one.",
)
