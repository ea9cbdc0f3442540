"""A device that idles because training waits for its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, between, by_rank, export_seconds, finite, total
from gradwatch_collector.findings.levels import rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_slo.runs import Status

# Seconds: durations are what senders say.
_LONGEST: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Starved is who waits for its data.

    Attributes:
        share: For more than this share of the time.
        least: And for so many seconds a step.
        intervals: Over so many export intervals.
        steps: And so many steps; the longest wait is left out, for it may be of the start of an epoch.
    """

    share: float = limited(0.3, most=1.0)
    least: float = 0.001
    intervals: float = 2.0
    steps: int = 8


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run of which a rank waits for its data for much of its time; of several the worst."""
    if view.run.status is not Status.RUNNING:
        return None
    waits, seconds = by_rank(view.every(c.DATA_WAIT)), parameters.intervals * export_seconds(view)
    found: list[tuple[float, float, float, int, int]] = []
    for rank, durations in by_rank(view.every(c.STEP_DURATION)).items():
        if rank in waits and len(durations.recent) >= parameters.steps:
            window = _window(durations, seconds, parameters.steps)
            starved = _starved(durations, waits[rank], window, parameters)
            if starved is not None:
                found.append((*starved, rank, window[0]))
    if not found:
        return None
    share, wait, step, rank, since = max(found)
    return Sighting(
        rank=rank,
        step=view.step_at(since),
        since=max(since, view.run.started_at),
        evidence={"share": rounded(share), "wait_seconds": rounded(wait), "step_seconds": rounded(step)},
    )


def _window(durations: Number, seconds: float, steps: int) -> tuple[int, int]:
    lasted = finite(durations.recent).values[-steps:]
    until = int(durations.recent.times[-1])
    return until - int(min(max(seconds, 1.01 * float(np.sum(lasted))), _LONGEST) * SECOND), until


def _starved(
    durations: Number, waits: Number, window: tuple[int, int], parameters: Parameters
) -> tuple[float, float, float] | None:
    """Return share of the time, wait and duration of a step; None where it is not starved."""
    lasted, steps = total(durations, *window)
    waited, _ = total(waits, *window)
    if steps < parameters.steps or not lasted > 0:
        return None
    longest = float(np.max(finite(between(waits.recent, *window)).values, initial=0.0))
    steady, wait = (waited - longest) / lasted, waited / steps
    # And it goes on: a queue that had to be filled once is no lasting lack.
    middle = (window[0] + window[1]) // 2
    late, late_waited = total(durations, middle, window[1])[0], total(waits, middle, window[1])[0]
    if steady < parameters.share or wait < parameters.least or late_waited < parameters.share * late:
        return None
    return waited / lasted, wait, lasted / steps


RULE = RunRule(
    name=c.RULE_DATA_STARVATION,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Batches come more slowly than training takes them: too few loader workers, work that could be done "
    "once and kept, a slow or remote disk.",
    action="Raise `num_workers` and `prefetch_factor` of the DataLoader, set `pin_memory` and "
    "`persistent_workers`, move decoding out of the loop, or put the data on a local disk.",
)
