"""Runs that fall silent together are one outage, by number, share and moment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.outages import LEAST_RUNS, WINDOW, quiet_after, silent_together

SECOND = 1_000_000_000


def quiet(*seconds: float) -> dict[str, int]:
    return {f"r{index}": int(at * SECOND) for index, at in enumerate(seconds)}


def test_five_runs_within_ten_seconds_are_an_outage_and_four_are_not() -> None:
    assert silent_together(quiet(0, 3, 5, 9, 10), 5, 1) == {"r0", "r1", "r2", "r3", "r4"}
    assert silent_together(quiet(0, 3, 5, 9), 4, 1) == set()
    assert silent_together(quiet(0, 3, 5, 9, 10.1), 5, 1) == set()


@pytest.mark.parametrize(("live", "together"), [(24, 5), (25, 0), (100, 0)])
def test_it_takes_more_than_a_fifth_of_the_live_runs(live: int, together: int) -> None:
    assert len(silent_together(quiet(0, 1, 2, 3, 4), live, 1)) == together


def test_nothing_is_said_before_the_first_is_overdue() -> None:
    assert silent_together(quiet(1, 2, 3, 4, 5), 5, 1 * SECOND) == set()
    assert len(silent_together(quiet(1, 2, 3, 4, 5), 5, 1 * SECOND + 1)) == 5


def test_a_run_that_was_silent_long_before_is_not_part_of_it() -> None:
    assert silent_together(quiet(0, 60, 61, 62, 63, 64), 6, 70 * SECOND) == {"r1", "r2", "r3", "r4", "r5"}


@pytest.mark.parametrize(("lost_after", "quiet_for"), [(30, 20), (300, 290), (4, 2)])
def test_others_are_looked_at_a_window_early(lost_after: int, quiet_for: int) -> None:
    assert quiet_after(lost_after * SECOND) == quiet_for * SECOND


@given(st.lists(st.integers(0, 60 * SECOND), max_size=30), st.integers(0, 100), st.integers(0, 60 * SECOND))
def test_whoever_is_in_an_outage_has_four_others_within_the_window(
    moments: list[int], others: int, overdue: int
) -> None:
    runs = {f"r{index}": at for index, at in enumerate(moments)}
    together = silent_together(runs, len(runs) + others, overdue)
    for run_id in together:
        near = [each for each in together if abs(runs[each] - runs[run_id]) <= WINDOW]
        assert len(near) >= LEAST_RUNS
    brute = any(
        first < overdue
        and (count := sum(first <= at <= first + WINDOW for at in moments)) >= LEAST_RUNS
        and count * 5 > len(runs) + others
        for first in moments
    )
    assert bool(together) == brute
