"""Numbers are added, divided and averaged as they are written."""

from __future__ import annotations

import statistics
import sys
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.written import difference, mean, median, place, ratio, rounded, written

decimals = st.decimals(-1000, 1000, places=4)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(decimals, decimals)
def test_what_is_written_as_a_decimal_differs_by_one(one: Decimal, other: Decimal) -> None:
    assert difference(float(one), float(other)) == float(one - other)


@given(st.fractions(1, 1000, max_denominator=3000), st.decimals("0.01", 100, places=3))
def test_a_ratio_that_is_a_decimal_is_that_whatever_digits_were_cut(usual: Fraction, times: Decimal) -> None:
    assert ratio(float(usual * Fraction(times)), float(usual)) == float(times)


@given(st.fractions(-9, 9, max_denominator=3000), st.decimals(-9, 9, places=3))
def test_a_difference_that_is_a_decimal_is_that_whatever_digits_were_cut(
    before: Fraction, more: Decimal
) -> None:
    assert difference(float(before + Fraction(more)), float(before)) == pytest.approx(float(more), abs=0)


@given(finite)
def test_a_number_is_itself(value: float) -> None:
    assert rounded(written(value)) == value


@given(st.lists(decimals, min_size=1))
def test_a_mean_and_a_median_are_those_of_the_decimals(values: list[Decimal]) -> None:
    told = [float(value) for value in values]
    exact = statistics.mean(map(Fraction, values))
    assert abs(Fraction(mean((value, 1) for value in told)) - exact) <= place(exact)
    assert median(told) == float(statistics.median(map(Fraction, values)))


@pytest.mark.parametrize("values", [(0.8,) * 7, (0.7, 0.9), (0.1, 0.2, 0.3, 0.4), (1 / 3, 2 / 3, 0.5)])
def test_a_mean_that_is_a_decimal_is_that(values: tuple[float, ...]) -> None:
    assert mean((value, 1) for value in values) in (0.8, 0.25, 0.5)


@given(st.lists(st.tuples(decimals.map(float), st.integers(1, 9)), min_size=1))
def test_a_value_that_is_there_several_times_counts_as_often(values: list[tuple[float, int]]) -> None:
    assert mean(values) == mean((value, 1) for value, count in values for _ in range(count))


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_all_numbers_there_is_the_last(sign: int) -> None:
    assert rounded(sign * 2 * written(sys.float_info.max)) == sign * sys.float_info.max
