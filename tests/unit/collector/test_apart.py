"""Numbers and times that differ look different."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.reports import apart, wording


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ([60, 120, 3600], ["1m00s", "2m00s", "1h00m"]),
        ([2.3, 2.325, 2.35], ["2.300 s", "2.325 s", "2.350 s"]),
        ([74.5, 75, 75.5, 76], ["74.5 s", "75.0 s", "75.5 s", "76.0 s"]),
        ([0.0123, 0.012301], ["12.300 ms", "12.301 ms"]),
        ([1e-5, 1.0001e-5], ["10.000 µs", "10.001 µs"]),
        ([0.0, 0.0], ["0 s", "0 s"]),
        ([7200.0, 7210.0], ["7200 s", "7210 s"]),
        ([], []),
    ],
)
def test_times_that_would_look_alike_have_one_unit_and_more_digits(
    seconds: list[float], told: list[str]
) -> None:
    assert apart.durations(seconds) == told


def test_numbers_that_would_look_alike_have_more_digits() -> None:
    assert apart.numbers([0.899999, 0.9]) == ["0.899999", "0.900000"]
    assert apart.numbers([1.5, 2]) == ["1.5", "2"]
    assert apart.numbers([float("nan"), 1.00001, 1.00002]) == ["NaN", "1", "1"]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_any_numbers_are_told_apart(values: list[float]) -> None:
    assert len(set(apart.numbers(values))) >= len(set(values))


@given(st.floats(0, 1e6), st.sampled_from([1e-6, 1e-3, 0.02, 0.025, 0.5, 1, 20, 3600]), st.integers(1, 8))
def test_the_ticks_of_any_axis_are_told_apart(least: float, step: float, count: int) -> None:
    ticks = [(round(least / step) + index) * step for index in range(count)]
    told = apart.durations(ticks)
    assert len(set(told)) == count
    assert told == list(map(wording.duration, ticks)) or len({each.split()[1] for each in told}) == 1
