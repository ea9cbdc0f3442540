"""Steps that take longer since a version changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND
from gradwatch_collector.findings.levels import median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Number, RunView
from gradwatch_collector.records import Attributes
from gradwatch_collector.runs.telling import number, text

_VERSIONS: Final = {
    "torch": c.TORCH_VERSION,
    "cuda": c.CUDA_VERSION,
    "python": c.PYTHON_VERSION,
    "commit": c.GIT_COMMIT,
}
# What makes steps take longer for other reasons.
_CONDITIONS: Final = (c.DEVICE_NAME, c.WORLD_SIZE, c.CONFIG_HASH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Slower is by ``ratio`` or more than the median of ``predecessors`` or more, after so many ``steps``."""

    ratio: float = limited(1.25, least=1.0)
    predecessors: int = 3
    steps: int = 200


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run whose steps are slower than its predecessors' of other versions on the same devices."""
    same: list[float] = []
    other: list[tuple[float, Mapping[str, str]]] = []
    for each in view.predecessors:
        seconds = _seconds_of(each)
        if seconds is not None and _is_comparable(view.resource, each.resource):
            changed = _changed(each.resource, view.resource)
            if changed:
                other.append((seconds, changed))
            else:
                same.append(seconds)
    if len(other) < parameters.predecessors:
        return None
    mine = _own_seconds(view, parameters.steps)
    if mine is None:
        return None
    usual = median([seconds for seconds, _ in other])
    # Others of the very same versions that were as fast as ever: it is not the version.
    if mine < parameters.ratio * usual or (same and min(same) < parameters.ratio * usual):
        return None
    return Sighting(
        evidence={
            "step_seconds": rounded(mine),
            "usual_seconds": rounded(usual),
            "ratio": rounded(mine / usual),
            "predecessors": len(other),
            "changed": dict(other[0][1]),
        },
    )


def _own_seconds(view: RunView, steps: int) -> float | None:
    """Return how long a step usually takes without its wait for data; a slow start has no part in it."""
    durations = view.first(c.STEP_DURATION)
    if durations is None or float(np.sum(durations.course.finite)) < steps:
        return None
    waits = next((each for each in view.every(c.DATA_WAIT) if each.rank == durations.rank), None)
    lasted, waited = _median(durations), 0.0 if waits is None else _median(waits)
    return lasted - waited if lasted > waited else None


def _median(told: Number) -> float:
    means: Doubles = told.course.mean[told.course.finite > 0]
    return median(means) if len(means) else 0.0


def _seconds_of(each: Predecessor) -> float | None:
    """Return the mean duration of its steps, waiting for data left out."""
    steps, share = number(each.summary.get("steps")), number(each.summary.get("effective_time_ratio"))
    if each.run.ended_at is None or not steps or not share or steps <= 0 or share <= 0:
        return None
    seconds = (each.run.ended_at - each.run.started_at) / SECOND
    return seconds * share / steps if seconds > 0 else None


def _is_comparable(one: Attributes, other: Attributes) -> bool:
    return all(one.get(name) == other.get(name) for name in _CONDITIONS)


def _changed(before: Attributes, now: Attributes) -> Mapping[str, str]:
    """Return what is known of both and differs, newest last."""
    told = {
        name: (text(before.get(attribute), 40), text(now.get(attribute), 40))
        for name, attribute in _VERSIONS.items()
    }
    return {name: f"{old} -> {new}" for name, (old, new) in told.items() if old and new and old != new}


RULE = RunRule(
    name=c.RULE_STEP_TIME_REGRESSION,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="A new version of torch, CUDA or Python, or a commit, made each step slower: a kernel that is no "
    "longer chosen, a graph break, or work that was added to the loop.",
    action="Run the version before once more on the same host; compare the phases of a step with `gradwatch "
    "runs compare`, and profile one step of each.",
)
