"""Per-layer statistics of one export interval: count, sum, min, max and an exponential histogram.

Whole blocks of rows are aggregated by a few tensor operations, which let go of Python's lock: one value at a
time would hold up training for longer than reading the gradients did.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import torch

from gradwatch.conventions import EXPONENTIAL_HISTOGRAM_SCALE
from gradwatch.telemetry import Attributes, HistogramPoint

_PER_OCTAVE: Final = 2**EXPONENTIAL_HISTOGRAM_SCALE
# Upper bounds of the buckets of one octave, as mantissas in [0.5, 1]: a lookup is exact at every power of
# two and for subnormals, where a logarithm is not.
_BOUNDS: Final = tuple(2.0 ** (i / _PER_OCTAVE - 1) for i in range(_PER_OCTAVE))
# Below torch's grain of 32 768 elements an operation stays on this thread and takes a fraction of a ms.
_BLOCK: Final = 16_384
# float64 exponents lie within 2^11, so that a bucket's index fits below a layer's number.
_LAYER_STRIDE: Final = 1 << 16


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

    def add(self, value: float) -> None:
        """Count one value of 0 or more."""
        if math.isfinite(value):
            zero = value == 0.0
            self.merge(1, value, value, value, int(zero))
            if not zero:
                self.count_bucket(bucket_index(value), 1)

    def merge(self, count: int, total: float, minimum: float, maximum: float, zeros: int) -> None:
        """Take in the statistics of ``count`` more values."""
        self._count += count
        self._sum += total
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)
        self._zeros += zeros

    def count_bucket(self, index: int, count: int) -> None:
        """Count ``count`` values in the bucket of this index."""
        self._buckets[index] = self._buckets.get(index, 0) + count

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


def aggregate_rows(
    norms: array[float], aggregates: list[LayerAggregate], pace: Callable[[], None] = lambda: None
) -> None:
    """Count rows of ``len(aggregates)`` values, one for each aggregate, laid end to end."""
    width = len(aggregates)
    rows_at_once = max(1, _BLOCK // width)
    # Said in full: a default device or dtype of the user's must not reach in here.
    matrix = torch.frombuffer(norms, dtype=torch.float64).view(-1, width)
    bounds = torch.tensor(_BOUNDS, dtype=torch.float64, device="cpu")
    for start in range(0, len(matrix), rows_at_once):
        _aggregate_block(matrix[start : start + rows_at_once], bounds, aggregates, pace)


def _aggregate_block(
    block: torch.Tensor, bounds: torch.Tensor, aggregates: list[LayerAggregate], pace: Callable[[], None]
) -> None:
    finite = block.isfinite()
    counts = finite.sum(0).tolist()
    sums = block.where(finite, 0.0).sum(0).tolist()
    minima = block.where(finite, math.inf).amin(0).tolist()
    maxima = block.where(finite, -math.inf).amax(0).tolist()
    zeros = (block == 0.0).sum(0).tolist()
    pace()
    for layer, aggregate in enumerate(aggregates):
        if counts[layer]:
            aggregate.merge(counts[layer], sums[layer], minima[layer], maxima[layer], zeros[layer])
    mantissa, exponent = block.frexp()
    index = (exponent.long() - 1) * _PER_OCTAVE + torch.searchsorted(bounds, mantissa.contiguous()) - 1
    index += torch.arange(block.shape[1], device="cpu") * _LAYER_STRIDE + _LAYER_STRIDE // 2
    pace()
    buckets, in_bucket = torch.unique(index[finite & (block != 0.0)], return_counts=True)
    pace()
    for bucket, count in zip(buckets.tolist(), in_bucket.tolist(), strict=True):
        layer, shifted = divmod(bucket, _LAYER_STRIDE)
        aggregates[layer].count_bucket(shifted - _LAYER_STRIDE // 2, count)
