"""Per-layer statistics of one export interval: count, sum, min, max and an exponential histogram.

Blocks of rows are aggregated by tensor operations that let go of Python's lock and cost 6 ns a value together:
one value at a time would hold up training for longer than reading the gradients did. None of them is spread
over torch's threads, which would be a second set of them in this process (``searchsorted`` is from 200 values
on).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from gradwatch.conventions import EXPONENTIAL_HISTOGRAM_SCALE
from gradwatch.telemetry import Attributes, HistogramPoint

_PER_OCTAVE: Final = 2**EXPONENTIAL_HISTOGRAM_SCALE
# Upper bounds of the buckets of one octave, as mantissas in [0.5, 1]: a lookup is exact at every power of
# two and for subnormals, where a logarithm is not.
_BOUNDS: Final = tuple(2.0 ** (i / _PER_OCTAVE - 1) for i in range(_PER_OCTAVE))
# Buckets that are counted together, half a megabyte. Layers whose norms stay within a factor of 1000 need 80.
_MOST_BUCKETS: Final = 1 << 16

_SMALLEST_NORMAL: Final = 2.0**-1022
_LARGEST: Final = math.nextafter(math.inf, 0.0)
_OCTAVES_OF_SUBNORMALS: Final = 54
# A float64 is its exponent over 52 bits of mantissa. Its first 16 bits, sign, exponent and 4 bits of mantissa,
# name a cell: 16 to an octave, so that none holds more than one bound of the 8 buckets.
_CELL: Final = 48
_CELLS: Final = 1 << (52 - _CELL)
_EXPONENTS: Final = 2048
_BIAS: Final = 1023


def bucket_index(value: float) -> int:
    """Index i of the bucket (base^i, base^(i+1)] that holds a positive finite value.

    Base and mapping are those of OpenTelemetry's exponential histogram, base = 2^(2^-scale).
    """
    mantissa, exponent = math.frexp(value)
    return (exponent - 1) * _PER_OCTAVE + bisect_left(_BOUNDS, mantissa) - 1


class LayerStatistics(NamedTuple):
    """Of the finite norms of one layer; in the order in which a ``HistogramPoint`` has them."""

    total: int
    sum: float
    minimum: float
    maximum: float
    zeros: int
    offset: int
    buckets: Sequence[int]


class LayerAggregate:
    """Values since the last export, one at a time. NaN and Inf are left out: they are events and a counter."""

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
        if not math.isfinite(value):
            return
        self._count += 1
        self._sum += value
        self._minimum = min(self._minimum, value)
        self._maximum = max(self._maximum, value)
        if value:
            index = bucket_index(value)
            self._buckets[index] = self._buckets.get(index, 0) + 1
        else:
            self._zeros += 1

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
    blocks: Sequence[torch.Tensor], pace: Callable[[], None] = lambda: None
) -> list[LayerStatistics | None]:
    """Statistics of every column of float64 matrices of one width on the CPU; None where nothing is finite.

    A block should have at most ``columns.BLOCK`` values. ``pace`` is called between operations on one.
    """
    plain, summaries = [], []
    for block in blocks:
        summary = _plain_summary(block)
        plain.append(summary is not None)
        summaries.append(_summary(block) if summary is None else summary)
        pace()
    stacked = torch.stack(summaries)
    counts, sums, zeros = stacked[:, :3].sum(0)
    minima, least = stacked[:, 3:5].amin(0)
    maxima = stacked[:, 5].amax(0)
    positive = counts > zeros
    # Every layer has as many buckets as its own values span, one layer's after the other's.
    first = torch.where(positive, _bucket_indices(least.where(positive, 1.0)), 0)
    last = torch.where(positive, _bucket_indices(maxima.where(positive, 1.0)), first - 1)
    ends = (last - first + 1).cumsum(0)
    places = ends - last - 1
    width = int(ends[-1])
    if width > _MOST_BUCKETS and len(counts) > 1:
        half = len(counts) // 2
        halves = [block[:, :half] for block in blocks], [block[:, half:] for block in blocks]
        return [layer for part in halves for layer in aggregate_rows(part, pace)]
    pace()
    in_bucket = torch.zeros(width, dtype=torch.int64, device="cpu")
    for block, is_plain in zip(blocks, plain, strict=True):
        if is_plain:
            index = _normal_bucket_indices(block).add_(places)
        else:
            counted = block.isfinite() & (block > 0.0)
            index = _bucket_indices(block.masked_select(counted)).add_(places.masked_select(counted))
        in_bucket += torch.bincount(index.view(-1), minlength=width)
        pace()
    buckets = in_bucket.tolist()
    found: list[LayerStatistics | None] = []
    begin = 0
    columns = (counts.long(), sums, minima, maxima, zeros.long(), first, ends)
    for count, total, least_one, most, none, offset, end in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        statistics = LayerStatistics(count, total, least_one, most, none, offset, buckets[begin:end])
        found.append(statistics if count else None)
        begin = end
        pace()
    return found


def _plain_summary(block: torch.Tensor) -> torch.Tensor | None:
    """Count, sum, zeros, minimum, least positive value and maximum of every column.

    None if there are zeros, subnormals, NaNs or infinities, which take more looking.
    """
    sums, minima = block.sum(0), block.amin(0)
    if not bool(((minima >= _SMALLEST_NORMAL) & (sums <= _LARGEST)).all()):
        return None
    counts = torch.full_like(sums, len(block))
    return torch.stack([counts, sums, torch.zeros_like(sums), minima, minima, block.amax(0)])


def _summary(block: torch.Tensor) -> torch.Tensor:
    """The same of a block with anything in it."""
    finite = block.isfinite()
    known = block.where(finite, math.inf)
    return torch.stack(
        [
            finite.sum(0, dtype=torch.float64),
            block.where(finite, 0.0).sum(0),
            (block == 0.0).sum(0, dtype=torch.float64),
            known.amin(0),
            known.where(block > 0.0, math.inf).amin(0),
            block.where(finite, -math.inf).amax(0),
        ]
    )


def _bucket_indices(values: torch.Tensor) -> torch.Tensor:
    """``bucket_index`` of positive finite values."""
    small = values < _SMALLEST_NORMAL
    normal = values.where(~small, values * 2.0**_OCTAVES_OF_SUBNORMALS)
    return _normal_bucket_indices(normal).sub_(small * (_OCTAVES_OF_SUBNORMALS * _PER_OCTAVE))


def _normal_bucket_indices(values: torch.Tensor) -> torch.Tensor:
    """``bucket_index`` of positive normal values, by integer arithmetic on their bits."""
    bits = values.contiguous().view(torch.int64)
    moved = _moves().index_select(0, (bits >> _CELL).view(-1)).view(bits.shape)
    return moved.add_(bits).bitwise_right_shift_(_CELL)


@lru_cache(maxsize=1)
def _moves() -> torch.Tensor:
    """What to add to the bits of a value in each cell, so that the first 16 bits become its bucket's index."""
    fractions = [int(math.ldexp(bound, 53)) - (1 << 52) for bound in _BOUNDS]
    moves = []
    for cell in range(_CELLS):
        begin = cell << _CELL
        below = bisect_left(fractions, begin)
        index = below - 1 - _BIAS * _PER_OCTAVE
        if below < len(fractions) and fractions[below] < begin + (1 << _CELL):
            # The value after the bound is the first of the next bucket.
            moves.append(((index + 1) << _CELL) - (fractions[below] + 1))
        else:
            moves.append((index << _CELL) - begin)
    # An octave further is 16 cells, and 8 buckets. Said in full: a default device or dtype must not reach in.
    octaves = torch.arange(_EXPONENTS, dtype=torch.int64, device="cpu") * ((_PER_OCTAVE - _CELLS) << _CELL)
    first = torch.tensor(moves, dtype=torch.int64, device="cpu")
    return (octaves[:, None] + first).view(-1)
