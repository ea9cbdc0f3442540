"""Numbers are added, divided and averaged as they are written."""

from __future__ import annotations

import statistics
import sys
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.written import mean, median, rounded, written

decimals = st.decimals(-1000, 1000, places=4)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(decimals, decimals)
def test_what_is_written_as_a_decimal_differs_by_one(one: Decimal, other: Decimal) -> None:
    assert rounded(written(float(one)) - written(float(other))) == float(one - other)


@given(finite)
def test_a_number_is_itself(value: float) -> None:
    assert rounded(written(value)) == value


@given(st.lists(decimals, min_size=1))
def test_a_mean_and_a_median_are_those_of_the_decimals(values: list[Decimal]) -> None:
    told = [float(value) for value in values]
    assert mean((value, 1) for value in told) == float(statistics.mean(map(Fraction, values)))
    assert median(told) == float(statistics.median(map(Fraction, values)))


@given(st.lists(st.tuples(decimals.map(float), st.integers(1, 9)), min_size=1))
def test_a_value_that_is_there_several_times_counts_as_often(values: list[tuple[float, int]]) -> None:
    assert mean(values) == mean((value, 1) for value, count in values for _ in range(count))


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_all_numbers_there_is_the_last(sign: int) -> None:
    assert rounded(sign * 2 * written(sys.float_info.max)) == sign * sys.float_info.max
