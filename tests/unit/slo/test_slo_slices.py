"""Slices of time are judged by how good they were, and those in which nothing happened not at all."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slo_reports import NOW, objective

from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.slices import Slicing, judged, whole

HOUR = timedelta(hours=1)
COUNTS: dict[tuple[int, Group], Counts] = {
    (0, ()): Counts(9, 1),
    (1, ()): Counts(1, 1),
    (3, ()): Counts(4, 0),
    (7, ()): Counts(0, 3),
    (8, ()): Counts(3, 1),
}


def report(slicing: Slicing, target: str) -> ObjectiveReport:
    each = objective(target=Decimal(target), slicing=slicing)
    (only,) = reports_of(each, each.window.at(NOW), *judged(slicing, COUNTS))
    return only


def test_a_slice_is_good_where_enough_of_its_events_are() -> None:
    # 90 %, 50 %, 100 %, 0 %, 75 %: three of five are good enough.
    found = report(Slicing(HOUR, Decimal("0.75")), "0.6")
    assert (found.good, found.bad, found.sli, found.verdict) == (3, 2, 0.6, "met")
    assert found.summary == "2 of 5 slices were bad; the budget allows 2"


def test_a_slice_may_be_as_good_as_its_events_are() -> None:
    # (0.9 + 0.5 + 1 + 0 + 0.75) / 5: 1.85 slices are lost, one of them is whole.
    found = report(Slicing(HOUR), "0.63")
    assert (found.good, found.bad, found.total) == (4, 1, 5)
    assert found.share == Fraction(63, 100)
    assert found.verdict == "met"
    assert found.budget_remaining == 0.0
    assert report(Slicing(HOUR), "0.64").verdict == "uncertain"


def test_groups_have_their_own_slices() -> None:
    counts: dict[tuple[int, Group], Counts] = {(0, ("a",)): Counts(1, 0), (0, ("b",)): Counts(0, 1)}
    found, lost = judged(Slicing(HOUR, Decimal(1)), counts)
    assert found == {("a",): Counts(1, 0), ("b",): Counts(0, 1)}
    assert lost == {("a",): 0, ("b",): 1}


@pytest.mark.parametrize(
    ("start", "end", "numbers"), [(0, 100, (0, 10)), (1, 99, (1, 9)), (-9, 9, (0, 0)), (93, 94, (10, 10))]
)
def test_only_whole_slices_are_judged(start: int, end: int, numbers: tuple[int, int]) -> None:
    assert whole(start, end, 0, 10) == numbers


@given(st.integers(-1000, 1000), st.integers(0, 1000), st.integers(-50, 50), st.integers(1, 60))
def test_the_whole_slices_lie_within_and_no_other_does(
    start: int, lasts: int, origin: int, length: int
) -> None:
    first, after = whole(start, start + lasts, origin, length)
    inside = [
        number
        for number in range(-2000, 2000)
        if start <= origin + number * length and origin + (number + 1) * length <= start + lasts
    ]
    assert inside == list(range(first, after))
