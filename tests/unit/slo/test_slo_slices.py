"""Slices of time are judged by how good they were, and those in which nothing happened not at all."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st
from slo_reports import NOW, objective

from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.slices import Slicing, by_slice, edges, judged
from gradwatch_slo.windows import TimeWindow

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
    found = report(Slicing(Duration(1, "h"), Decimal("0.75")), "0.6")
    assert (found.good, found.bad, found.sli, found.verdict) == (3, 2, 0.6, "met")
    assert found.summary == "2 of 5 slices were bad; the budget allows 2"


def test_a_slice_may_be_as_good_as_its_events_are() -> None:
    # (0.9 + 0.5 + 1 + 0 + 0.75) / 5: 1.85 slices are lost, one of them is whole.
    found = report(Slicing(Duration(1, "h")), "0.63")
    assert (found.good, found.bad, found.total) == (4, 1, 5)
    assert found.summary == "1.85 of 5 slices were lost in all; the budget allows 1"
    assert found.share == Fraction(63, 100)
    assert found.verdict == "met"
    assert found.budget_remaining == 0.0
    assert report(Slicing(Duration(1, "h")), "0.64").verdict == "uncertain"


def test_groups_have_their_own_slices() -> None:
    counts: dict[tuple[int, Group], Counts] = {(0, ("a",)): Counts(1, 0), (0, ("b",)): Counts(0, 1)}
    found, lost = judged(Slicing(Duration(1, "h"), Decimal(1)), counts)
    assert found == {("a",): Counts(1, 0), ("b",): Counts(0, 1)}
    assert lost == {("a",): 0, ("b",): 1}


def slices(length: str, rule: TimeWindow, at: datetime) -> list[datetime]:
    return edges(Slicing(Duration.parse(length)), rule, rule.at(at), min(rule.at(at).end, at))


def test_slices_of_a_rolling_window_are_those_of_the_clock_that_lie_within() -> None:
    day = TimeWindow(Duration(1, "d"))
    at = datetime(2026, 3, 29, 12, 30, tzinfo=UTC)
    found = slices("6h", day, at)
    assert found == [at.replace(day=28, hour=18, minute=0) + number * timedelta(hours=6) for number in range(4)]


def test_days_of_a_calendar_are_those_of_its_time_zone_and_fill_the_month() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    monthly = TimeWindow(Duration(1, "M"), datetime(2026, 1, 1, tzinfo=berlin))
    for month, days in ((3, 31), (7, 31), (10, 31), (11, 30)):
        last = datetime(2026, month, days, 12, tzinfo=berlin).astimezone(UTC)
        window = monthly.at(last)
        found = edges(Slicing(Duration(1, "d")), monthly, window, window.end)
        assert (found[0], found[-1], len(found)) == (window.start, window.end, days + 1)
        assert {edge.astimezone(berlin).hour for edge in found} == {0}


@given(
    st.sampled_from(["5m", "90m", "7h", "1d", "1w"]),
    st.booleans(),
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),
)
def test_slices_follow_each_other_within_the_window(length: str, is_rolling: bool, at: datetime) -> None:
    anchor = datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    rule = TimeWindow(Duration(2, "w"), None if is_rolling else anchor)
    window = rule.at(at)
    found = slices(length, rule, at)
    assert found == sorted(set(found))
    assert all(window.start <= edge <= at for edge in found)
    if len(found) > 1:
        # No further one has room.
        assert Duration.parse(length).shift(found[-1], 1) > at - timedelta(hours=1)


def test_what_is_counted_by_steps_is_added_up_by_slices() -> None:
    begin, hour = NOW, timedelta(hours=1)
    counts: dict[tuple[int, Group], Counts] = {
        (0, ()): Counts(1, 0),
        (1, ()): Counts(0, 1),
        (2, ()): Counts(5, 5),
    }
    found = by_slice(counts, begin, hour, [begin, begin + 2 * hour, begin + 4 * hour])
    assert found == {(0, ()): Counts(1, 1), (1, ()): Counts(5, 5)}
