"""Ticks tell since when the collector has been there; moments in seconds, times a billion."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gradwatch_collector.runs.presence import Presence

SECOND = 1_000_000_000
LOST_AFTER = 30 * SECOND


def up_since(gaps: Iterable[int], *, failed: bool = False) -> float:
    """Since when a collector that came up at 0 was there; ``failed``: before its last tick others failed."""
    presence = Presence(0, 0)
    *before, last = (gap * SECOND for gap in gaps)
    for gap in before:
        presence = presence.tick(presence.heard_at + gap, LOST_AFTER, failed=False)
    return presence.tick(presence.heard_at + last, LOST_AFTER, failed=failed).up_since / SECOND


def test_a_collector_that_ticks_was_there_all_the_time() -> None:
    assert up_since([1] * 100) == 0


@pytest.mark.parametrize("gap", [15, 600])
def test_a_gap_of_half_the_limit_is_an_absence(gap: int) -> None:
    assert up_since([1] * 100 + [gap]) == 100 + gap
    assert up_since([1] * 100 + [14]) == 0


@pytest.mark.parametrize("gap", [15, 16, 45, 3600])
def test_ticks_that_always_take_long_are_no_absence(gap: int) -> None:
    assert up_since([gap] * 10) == gap


def test_one_slow_tick_in_twelve_is_no_absence() -> None:
    assert up_since(([1] * 11 + [16]) * 5) == 27


def test_an_absence_after_an_absence_counts() -> None:
    assert up_since([1] * 100 + [60] + [1] * 60 + [60]) == 280


def test_a_database_that_was_away_as_long_as_ticks_take_was_away_all_the_same() -> None:
    assert up_since([16] * 10, failed=True) == 160
    assert up_since([1] * 9 + [14], failed=True) == 0
