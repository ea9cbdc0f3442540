"""How long a run's collective operations took (M6), over all its ranks and attempts."""

from __future__ import annotations

from collections import Counter
from typing import Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, ExponentialHistogramDataPoint
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.records import MetricIdentity
from gradwatch_collector.storage.reading import read_series, series_rows
from gradwatch_collector.storage.rolled_up import read_rollups

_METRIC: Final = c.COLLECTIVE_DURATION
_DELTA: Final = MetricIdentity(
    _METRIC.name, _METRIC.unit, _METRIC.kind, AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
)
_FIELD: Final = "buckets"
# What is in the names of reductions, and of no other operation.
_REDUCES: Final = "reduce"
# What the specification allows, and what a double can hold.
_SCALES: Final = range(-10, 21)
_LARGEST_POWER: Final = 1000


def collective_p95(connection: Connection, run_id: str) -> float | None:
    """Return the 95th percentile in seconds of what reduces, or without any of all operations.

    Reductions carry the gradients: a thousand short broadcasts would hide that they are slow. None without any
    operation, or if some were pruned: a distribution is not rolled up. DDP's figure of what computation did not
    hide is a part of another, and is left out. Right within half a bucket, 4.4 % at the agent's scale.
    """
    if read_rollups(connection, run_id, _DELTA, _FIELD):
        return None
    reductions, others = Counter[bytes](), Counter[bytes]()
    processes = {(row.attempt, row.rank) for row in series_rows(connection, run_id, _DELTA, _FIELD, None, None)}
    for attempt, rank in sorted(processes):  # one at a time: there may be thousands
        for series in read_series(connection, run_id, _DELTA, _FIELD, attempt=attempt, rank=rank):
            operation = str(series.attributes.get(c.COLLECTIVE))
            if operation != c.DDP_EXPOSED:
                (reductions if _REDUCES in operation else others).update(series.packed)
    return quantile(reductions or others, 0.95)


def quantile(points: Counter[bytes], share: float) -> float | None:
    """Return a quantile of encoded exponential histograms of positive values, each as often as it was sent.

    It is the middle of the bucket that holds it, on the scale of the coarsest of them.
    """
    decoded = [(ExponentialHistogramDataPoint.FromString(each), times) for each, times in points.items()]
    if not decoded or not all(point.scale in _SCALES for point, _ in decoded):
        return None
    scale, zeros = min(point.scale for point, _ in decoded), 0
    buckets: Counter[int] = Counter()
    for point, times in decoded:
        zeros += times * point.zero_count
        for place, count in enumerate(point.positive.bucket_counts, point.positive.offset):
            if count:
                # A bucket of a finer scale lies in one of a coarser.
                buckets[place >> (point.scale - scale)] += times * count
    total = zeros + buckets.total()
    reached = zeros
    for place in sorted(buckets) if reached < share * total else ():
        reached += buckets[place]
        if reached >= share * total:
            power = (place + 0.5) * 2.0**-scale
            return 2.0**power if abs(power) < _LARGEST_POWER else None
    return 0.0 if total else None
