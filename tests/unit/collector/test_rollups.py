"""Roll-ups say of every 64 times what a look at all the numbers says."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradwatch_collector.storage.rollups import BUCKET, Statistic, reduce
from gradwatch_collector.storage.segments import DAY, Segment, cut, split_days

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3 * BUCKET))
ANYTHING = st.one_of(
    arrays.arrays(np.float64, SHAPES, elements=st.floats()),
    arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32)),
    arrays.arrays(np.int64, SHAPES, elements=st.integers(-(2**63), 2**63 - 1)),
)


def segment(values: npt.NDArray[Any]) -> Segment:
    return Segment(np.arange(values.shape[1], dtype=np.int64) * 7 + 3, values)


def dense(values: npt.NDArray[Any]) -> dict[Statistic, float | None]:
    """The statistics of the values of one point in one bucket, one by one."""
    finite = [float(value) for value in values if np.isfinite(value)]
    return {
        Statistic.COUNT: len(values),
        Statistic.NONFINITE: len(values) - len(finite),
        Statistic.LAST: float(values[-1]),
        Statistic.MINIMUM: min(finite, default=None),
        Statistic.MAXIMUM: max(finite, default=None),
        Statistic.MEAN: float(sum(map(Fraction, finite)) / len(finite)) if finite else None,
    }


@given(values=ANYTHING)
def test_every_bucket_is_what_a_dense_computation_says(values: npt.NDArray[Any]) -> None:
    reduced = reduce(segment(values))
    buckets = -(-values.shape[1] // BUCKET)
    for index in range(buckets):
        part = slice(index * BUCKET, (index + 1) * BUCKET)
        for point, told in enumerate(values):
            expected = dense(told[part])
            for statistic in Statistic:
                rolled = reduced.get(statistic)
                if rolled is None:
                    assert (statistic, expected[statistic]) == (Statistic.NONFINITE, 0)
                    continue
                assert rolled.values is not None
                assert rolled.times[index] == segment(values).times[part][-1]
                found = float(rolled.values[0 if statistic is Statistic.COUNT else point, index])
                check(statistic, found, expected, values.dtype)


def check(
    statistic: Statistic, found: float, expected: dict[Statistic, float | None], dtype: np.dtype[Any]
) -> None:
    value = expected[statistic]
    if value is None:
        assert np.isnan(found)
    elif statistic is Statistic.MEAN:
        low, high = expected[Statistic.MINIMUM], expected[Statistic.MAXIMUM]
        assert low is not None
        assert high is not None
        assert low <= found <= high
        digits, least = (1e-6, 1e-44) if dtype == np.float32 else (1e-13, 1e-320)
        assert found == pytest.approx(value, rel=0, abs=digits * max(abs(low), abs(high)) + least)
    else:
        np.testing.assert_array_equal(found, value)


@given(values=ANYTHING)
def test_what_is_kept_has_the_precision_of_what_it_was(values: npt.NDArray[Any]) -> None:
    for statistic, rolled in reduce(segment(values)).items():
        assert rolled.values is not None
        if statistic in (Statistic.COUNT, Statistic.NONFINITE):
            assert rolled.values.dtype == np.int64
        elif statistic is not Statistic.MEAN:
            assert rolled.values.dtype == values.dtype


def test_of_a_distribution_the_number_remains() -> None:
    told = Segment(np.arange(100, dtype=np.int64), None, (b"x",) * 100)
    ((statistic, rolled),) = reduce(told).items()
    assert rolled.values is not None
    assert (statistic, rolled.values.tolist(), rolled.times.tolist()) == (
        Statistic.COUNT,
        [[64, 36]],
        [63, 99],
    )


@given(
    times=st.lists(st.integers(0, 4 * DAY), min_size=1, max_size=50, unique=True).map(sorted),
    copies=st.integers(1, 20),
)
def test_a_row_is_of_one_day_and_has_at_most_256_times(times: list[int], copies: int) -> None:
    spread = sorted({time + n for time in times for n in range(copies)})
    whole = Segment(np.array(spread, np.int64), np.arange(len(spread), dtype=np.float32)[None, :])
    rows = list(cut(whole))
    assert [time for row in rows for time in row.times.tolist()] == spread
    for row in rows:
        assert len(row.times) <= 256
        assert row.times[0] // DAY == row.times[-1] // DAY
    assert len({int(day.times[0]) // DAY for day in split_days(whole)}) == len(list(split_days(whole)))
