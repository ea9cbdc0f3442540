"""What is known of a run once it is over: the numbers that objectives are about, from what is stored of it.

Everything is over all attempts and ranks. None is not known: never told, or pruned so that it cannot be told
any more. Nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.runs.checkpoints import attempted
from gradwatch_collector.runs.collectives import collective_p95
from gradwatch_collector.runs.cost import devices_used, run_cost
from gradwatch_collector.runs.curves import Curve, read_curves
from gradwatch_collector.runs.effective_time import effective_time
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.runs.quality import quality
from gradwatch_collector.runs.step_health import step_health
from gradwatch_collector.runs.telling import integer
from gradwatch_collector.runs.written import mean
from gradwatch_collector.storage import schema
from gradwatch_slo.cost import PriceTable

_CPU = "cpu"
_STEPS_PRICED = 1_000
_Process = tuple[int, int]  # attempt and rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run, by itself.

    ``steps``: all that were done, those done again included; of ``observed_steps`` the gradient was read, and
    ``unhealthy_steps`` of these were outside of the band (`step_health.py`). ``nonfinite_steps`` had a loss or
    gradient that was not finite; those that the loss scaler skipped are apart. ``gpu_utilization``: time
    average of each device the run used, and of these the mean. ``collective_p95`` in seconds.
    ``memory_headroom``: the least that any device had left at its peak, as a share. ``step_cost``: of 1 000
    steps, in ``currency``, the price table's. ``quality``: more is better (`quality.py`).
    ``effective_time_ratio``: see `effective_time.py`.
    """

    steps: int | None
    observed_steps: int | None
    unhealthy_steps: int | None
    nonfinite_steps: int | None
    skipped_steps: int | None
    checkpoints: int
    failed_checkpoints: int
    gpu_utilization: float | None
    collective_p95: float | None
    memory_headroom: float | None
    step_cost: float | None
    currency: str | None
    quality: float | None
    effective_time_ratio: float | None


def summarise(connection: Connection, run: RunRow, prices: PriceTable | None) -> Summary:
    """Read what is stored of a run that has ended; best at one moment."""
    run_id = run.run_id
    steps, nonfinite = _steps(connection, run_id), _nonfinite(connection, run_id)
    if steps is not None and nonfinite is not None:
        steps = max(steps, nonfinite)  # the newest of them may not have been told of
    health = step_health(connection, run_id)
    checkpoints, failed = attempted(connection, run_id)
    cost = run_cost(connection, run_id, prices).amount if prices is not None else None
    step_cost = float(cost * _STEPS_PRICED / steps) if cost is not None and steps else None
    effective = effective_time(connection, run)
    return Summary(
        steps=steps,
        observed_steps=health.observed,
        unhealthy_steps=health.unhealthy,
        nonfinite_steps=nonfinite,
        skipped_steps=_most_by_rank(_counted(connection, run_id, c.SKIPPED_STEPS)),
        checkpoints=checkpoints,
        failed_checkpoints=failed,
        gpu_utilization=_gpu_utilization(connection, run_id),
        collective_p95=collective_p95(connection, run_id),
        memory_headroom=_memory_headroom(connection, run_id),
        step_cost=step_cost,
        currency=None if step_cost is None or prices is None else prices.currency,
        quality=quality(connection, run_id, run.target),
        effective_time_ratio=None if effective is None else effective.ratio,
    )


def _steps(connection: Connection, run_id: str) -> int | None:
    told = read_curves(connection, run_id, c.STEP_INDEX)
    return sum(int(curve.finite.sum()) for curve in told) if told else None


def _nonfinite(connection: Connection, run_id: str) -> int | None:
    """Return how many steps were; a process that died may have told its events and not its counter any more."""
    counted = _counted(connection, run_id, c.NONFINITE)
    event = schema.event.c
    rows = connection.execute(
        select(event.attempt, event.rank, event.attributes).where(
            event.run_id == run_id, event.name == c.NONFINITE_STEP.name
        )
    )
    for row in rows:
        place = row.attempt, row.rank
        counted[place] = max(counted.get(place, 0), integer(row.attributes.get(c.NONFINITE_STEPS)) or 1)
    return _most_by_rank(counted)


def _counted(connection: Connection, run_id: str, metric: c.Metric) -> dict[_Process, int]:
    """Return the sums of a counter that was sent as deltas."""
    sums: dict[_Process, float] = {}
    for curve in read_curves(connection, run_id, metric, every_rank=True):
        place = curve.attempt, curve.rank
        # Rolled-up values are means, and none where nothing was finite.
        sums[place] = sums.get(place, 0.0) + float(np.nansum(curve.values * curve.finite))
    return {place: round(count) for place, count in sums.items()}


def _most_by_rank(counted: dict[_Process, int]) -> int | None:
    """Return the sum over attempts of the rank that saw most: gradients are shared, and so is what is seen."""
    if not counted:
        return None
    most: dict[int, int] = {}
    for (attempt, _), count in counted.items():
        most[attempt] = max(count, most.get(attempt, 0))
    return sum(most.values())


def _gpu_utilization(connection: Connection, run_id: str) -> float | None:
    used = devices_used(connection, run_id)
    by_device: dict[tuple[int, str], list[Curve]] = {}
    for curve in read_curves(connection, run_id, c.HW_GPU_UTILIZATION, every_rank=True):
        device = str(curve.attributes.get(c.DEVICE))
        # Every process sees all devices of its host. What it holds memory on is its own.
        if device in used.get((curve.attempt, curve.rank), {device}):
            by_device.setdefault((curve.rank, device), []).append(curve)
    averages = [average for each in by_device.values() if (average := _average(each)) is not None]
    return mean((average, 1) for average in averages) if averages else None


def _average(curves: Iterable[Curve]) -> float | None:
    """Return the mean of all finite values, which are told at regular intervals."""
    told = [
        (value, int(count))
        for each in curves
        for value, count in zip(each.values.tolist(), each.finite.tolist(), strict=True)
        if count
    ]
    return mean(told) if told else None


def _memory_headroom(connection: Connection, run_id: str) -> float | None:
    """Return the least of all processes: of their devices, of the host for those that used none."""
    curves = read_curves(connection, run_id, c.DEVICE_MEMORY_HEADROOM, every_rank=True)
    with_devices = {(each.attempt, each.rank) for each in curves if each.attributes.get(c.DEVICE) != _CPU}
    least = [
        float(np.min(known))
        for each in curves
        if each.attributes.get(c.DEVICE) != _CPU or (each.attempt, each.rank) not in with_devices
        if len(known := each.least[each.finite > 0])
    ]
    return min(least, default=None)
