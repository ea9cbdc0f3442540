"""Per-layer statistics of one export interval: count, sum, min, max and an exponential histogram."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final

from gradwatch.conventions import EXPONENTIAL_HISTOGRAM_SCALE
from gradwatch.telemetry import Attributes, HistogramPoint

_PER_OCTAVE: Final = 2**EXPONENTIAL_HISTOGRAM_SCALE
# Upper bounds of the buckets of one octave, as mantissas in [0.5, 1]: a lookup is exact at every power of
# two and for subnormals, where a logarithm is not.
_BOUNDS: Final = tuple(2.0 ** (i / _PER_OCTAVE - 1) for i in range(_PER_OCTAVE))


def bucket_index(value: float) -> int:
    """Index i of the bucket (base^i, base^(i+1)] that holds a positive finite value.

    Base and mapping are those of OpenTelemetry's exponential histogram, base = 2^(2^-scale).
    """
    mantissa, exponent = math.frexp(value)
    return (exponent - 1) * _PER_OCTAVE + bisect_left(_BOUNDS, mantissa) - 1


class LayerAggregate:
    """Norms of one layer since the last export. NaN and Inf are left out: they are events and a counter."""

    __slots__ = ("_buckets", "_count", "_maximum", "_minimum", "_sum", "_zeros")

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._minimum = math.inf
        self._maximum = -math.inf
        self._zeros = 0
        self._buckets: dict[int, int] = {}

    def add(self, norm: float) -> None:
        """Count one norm."""
        if not math.isfinite(norm):
            return
        self._count += 1
        self._sum += norm
        if norm < self._minimum:
            self._minimum = norm
        if norm > self._maximum:
            self._maximum = norm
        if norm == 0.0:
            self._zeros += 1
        else:
            index = bucket_index(norm)
            self._buckets[index] = self._buckets.get(index, 0) + 1

    def point(self, start: int, time: int, attributes: Attributes) -> HistogramPoint | None:
        """The interval as one data point; None when nothing was counted."""
        if not self._count:
            return None
        offset = min(self._buckets, default=0)
        width = max(self._buckets) - offset + 1 if self._buckets else 0
        return HistogramPoint(
            start, time, attributes, self._count, self._sum, self._minimum, self._maximum, self._zeros,
            offset, [self._buckets.get(offset + i, 0) for i in range(width)],
        )  # fmt: skip
