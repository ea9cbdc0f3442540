"""Batches as the receiver decodes them, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.records import Batch, EventRecord, Frame, MetricIdentity, Source
from gradwatch_collector.storage.series import attribute_set

SECOND = 1_000_000_000
START = 1_750_000_000 * SECOND


def at(seconds: float) -> int:
    """Unix nanoseconds, that many seconds into the test's time."""
    return START + int(seconds * SECOND)


def source(
    run_id: str = "run",
    *,
    rank: int = 0,
    attempt: int | None = None,
    instance: str = "one",
    **attributes: Any,
) -> Source:
    """A process of job ``digits``; keywords such as ``tier`` become resource attributes ``training.tier``."""
    resource = {c.SERVICE_NAME: "digits", **{f"training.{name}": value for name, value in attributes.items()}}
    if attempt is not None:
        resource[c.RUN_ATTEMPT] = attempt
    return Source(run_id, attempt, rank, instance, resource)


def event(definition: c.Event, seconds: float, sequence: int = 0, **attributes: Any) -> EventRecord:
    """One of our events; keywords are values by the name of the constant in conventions."""
    named = {getattr(c, name): value for name, value in attributes.items()}
    return EventRecord(definition.name, at(seconds), sequence, 9, None, {c.EVENT_SEQUENCE: sequence, **named})


def scalar(metric: c.Metric, seconds: Sequence[float], values: Sequence[float], **attributes: Any) -> Frame:
    """A per-step scalar at several times."""
    return frame(metric, [attributes], seconds, [values])


def frame(
    metric: c.Metric,
    points: Sequence[Mapping[str, Any]],
    seconds: Sequence[float],
    values: Sequence[Sequence[float]],
    field: str = "value",
) -> Frame:
    """A frame of ``values[point][time]``."""
    return Frame(
        MetricIdentity(metric.name, metric.unit, metric.kind),
        field,
        attribute_set([dict(point) for point in points]),
        np.array([at(s) for s in seconds], dtype=np.int64),
        np.array(values, dtype=np.float64),
    )


def batch(sender: Source, *events: EventRecord, frames: Sequence[Frame] = ()) -> Batch:
    """One request of one process."""
    return Batch(sender, tuple(frames), events)
