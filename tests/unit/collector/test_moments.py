"""Moments as text are exact to the nanosecond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.api.moments import exactly, parse_moment

NANOS = st.integers(0, 2**63 - 1)


@given(NANOS)
def test_a_moment_comes_back_as_it_was_written(nanos: int) -> None:
    assert parse_moment(exactly(nanos)) == parse_moment(str(nanos)) == nanos


@given(st.tuples(NANOS, NANOS))
def test_moments_sort_as_text(pair: tuple[int, int]) -> None:
    one, other = pair
    assert (exactly(one) < exactly(other)) == (one < other)


@pytest.mark.parametrize(
    "text",
    [
        "2025-06-15T15:06:40Z",
        "2025-06-15t15:06:40z",
        "2025-06-15 15:06:40.0Z",
        "2025-06-15T17:06:40+02:00",
        "2025-06-15T17:06:40 02:00",  # as it comes out of a URL
        "2025-06-15T13:36:40-01:30",
    ],
)
def test_rfc_3339_is_read_in_all_its_forms(text: str) -> None:
    assert parse_moment(text) == 1_750_000_000_000_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2025-06-15",
        "2025-06-15T15:06:40",
        "1969-12-31T23:59:59Z",
        "2025-02-30T00:00:00Z",
        "-1",
        "²",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_moment(text)
