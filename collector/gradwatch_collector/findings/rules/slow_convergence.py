"""A run that is far behind those before it, or about to miss the time granted to reach its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, median, rounded
from gradwatch_collector.findings.losses import descent, first_step, only_loss
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Levels, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Slow: the loss has fallen by less than ``progress`` of what ``runs`` or more earlier runs' had by then.

    After ``steps`` steps or more, at the same step and at the same time since the start alike, below none of
    them, and by ``noise`` times what single values deviate by chance. Or: ``granted`` of the deadline, or of
    what predecessors' time to the target allows, is over, and the target was not reached.
    """

    progress: float = limited(0.5, most=1.0)
    runs: int = 3
    steps: int = 100
    noise: float = 2.0
    granted: float = limited(0.9, most=1.0)


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run that will miss its target's time, or whose loss is far behind."""
    evidence = _late(view, parameters) or _behind(view, parameters)
    return None if evidence is None else Sighting(step=view.run.last_step, evidence=evidence)


def _late(view: RunView, parameters: Parameters) -> Mapping[str, Any] | None:
    run = view.run
    granted = run.deadline_seconds
    if granted is None and run.baseline is not None:
        granted = run.baseline / 1e9
    if run.target is None or run.target_reached_at is not None or granted is None:
        return None
    elapsed = ((run.ended_at or view.now) - run.started_at) / 1e9
    if elapsed < parameters.granted * granted:
        return None
    return {"target": run.target, "elapsed_seconds": rounded(elapsed), "granted_seconds": rounded(granted)}


def _behind(view: RunView, parameters: Parameters) -> Mapping[str, Any] | None:
    number = only_loss(view)
    loss = descent(number)
    if number is None or loss is None or loss.steps < parameters.steps:
        return None
    now = min(loss.now, median(loss.recent[-2 * LEAST : -LEAST]))
    step, elapsed = first_step(view) + loss.steps, float(number.recent.times[-1] - view.run.started_at)
    by_step = [levels for each in view.precedents if len(levels := each.before(step))]
    by_time = [levels for each in view.precedents if len(levels := each.until(elapsed))]
    if not all(_is_behind(now, levels, loss.noise, parameters) for levels in (by_step, by_time)):
        return None
    return {
        "loss": rounded(now),
        "loss_of_others": rounded(median([each.values[-1] for each in by_step])),
        "loss_at_start": rounded(median([each.values[0] for each in by_step])),
        "runs": len(by_step),
        "steps": int(step),
    }


def _is_behind(now: float, others: list[Levels], noise: float, parameters: Parameters) -> bool:
    """Return whether a loss is far behind those of others, each of them up to the same moment."""
    if len(others) < parameters.runs:
        return False
    start = median([each.values[0] for each in others])
    theirs = np.array([np.min(each.values) for each in others])
    expected = start - median(theirs)
    return bool(
        start - now < parameters.progress * expected
        and now > np.max(theirs)
        and now - median(theirs) > parameters.noise * noise
    )


RULE = RunRule(
    name=c.RULE_SLOW_CONVERGENCE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The run learns more slowly than those of its job before it, or than its target allows: another "
    "learning rate or batch size, other data, or slower steps.",
    action="Compare it with the last good run (`gradwatch runs compare`): configuration, commit, learning "
    "rate, step time; stop it if the target is out of reach.",
)
