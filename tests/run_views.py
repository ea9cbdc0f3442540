"""Views of runs as rules get them, from plain numbers: what a step or an export interval told, one a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.run_view import EventSeen, Layers, Number, RunView
from gradwatch_collector.findings.track import Track
from gradwatch_collector.runs.facts import RunRow
from gradwatch_slo.runs import Status
from tests.batches import at

RUNNING = RunRow(
    run_id="run", job="digits", model=None, dataset=None, team=None, tier="experiment", status=Status.RUNNING,
    reason=None, attempt=1, rank_count=1, started_at=at(0), ended_at=None, last_seen_at=at(1), last_step=None,
    last_loss=None, last_loss_nonfinite=False, host=None, commit=None, target=None, deadline_seconds=None,
    target_reached_at=None, baseline=None, outage_at=None, will_retry=False, cause_rank=None,
)  # fmt: skip


def number(
    values: Sequence[float], *, rank: int = 0, every: float = 1.0, start: float = 0.0, **point: Any
) -> Number:
    """A number told every so many seconds; keywords are attributes by their constant's name in conventions."""
    track = Track()
    if len(values):
        times = np.array([at(start + every * (place + 1)) for place in range(len(values))], np.int64)
        track.add(times, np.asarray(values, np.float64))
    attributes = {getattr(c, name): value for name, value in point.items()}
    return Number(rank, attributes, track.recent(), track.course())


def layers(values: Mapping[str, Sequence[float]], *, rank: int = 0) -> Layers:
    """Numbers by layer, one for each second."""
    matrix = np.array(list(values.values()), np.float64)
    times = np.array([at(second + 1) for second in range(matrix.shape[1])], np.int64)
    return Layers(rank, {}, list(values), times, matrix)


def event(seconds: float, *, rank: int = 0, **attributes: Any) -> EventSeen:
    """An event; keywords are attributes by their constant's name in conventions."""
    return EventSeen(rank, at(seconds), {getattr(c, name): value for name, value in attributes.items()})


def view(
    numbers: Mapping[c.Metric, Sequence[Number]] | None = None,
    *,
    seconds: float = 1_000,
    run: RunRow = RUNNING,
    **rest: Any,
) -> RunView:
    """A run at so many seconds; without a `training.step` of its own, steps are one a second."""
    told = {metric.name: tuple(each) for metric, each in (numbers or {}).items()}
    told.setdefault(c.STEP_INDEX.name, (number(range(int(seconds))),))
    return RunView(run=run, now=at(seconds), numbers=told, **rest)


def of_tier(tier: str) -> RunRow:
    """A running run of a tier."""
    return replace(RUNNING, tier=tier)
