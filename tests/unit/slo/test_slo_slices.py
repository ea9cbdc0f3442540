"""Slices of time are judged by how good they were, and those in which nothing happened not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from slo_reports import NOW, objective

from gradwatch_slo.budget import budget_remaining
from gradwatch_slo.caveats import thin_budgets
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.render import render_json
from gradwatch_slo.render_csv import render_csv
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.schemas import load_schema
from gradwatch_slo.slices import Slicing, by_slice, edges, judged, step_of
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.windows import TimeWindow
from gradwatch_slo.wording import amount

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
HOURLY = Duration(1, "h")
COUNTS: dict[tuple[int, Group], Counts] = {
    (0, ()): Counts(9, 1),
    (1, ()): Counts(1, 1),
    (3, ()): Counts(4, 0),
    (7, ()): Counts(0, 3),
    (8, ()): Counts(3, 1),
}


def report(
    slicing: Slicing, target: str | Decimal, counts: dict[tuple[int, Group], Counts] = COUNTS
) -> ObjectiveReport:
    each = objective(target=Decimal(target), slicing=slicing)
    (only,) = reports_of(each, each.window.at(NOW), *judged(slicing, counts))
    return only


def test_a_slice_is_good_where_enough_of_its_events_are() -> None:
    # 90 %, 50 %, 100 %, 0 %, 75 %: three of five are good enough.
    found = report(Slicing(HOURLY, Decimal("0.75")), "0.6")
    assert (found.good, found.bad, found.sli, found.verdict) == (3, 2, 0.6, "met")
    assert found.summary == "2 of 5 slices were bad; the budget allows 2"
    assert found.events == Counts(3, 2)
    assert report(Slicing(HOURLY, Decimal("0.750001")), "0.6").bad == 3


def test_groups_have_their_own_slices() -> None:
    counts: dict[tuple[int, Group], Counts] = {
        (0, ("a",)): Counts(1, 0),
        (0, ("b",)): Counts(0, 1),
        (1, ("b",)): Counts(3, 1),
    }
    assert judged(Slicing(HOURLY, Decimal(1)), counts) == ({("a",): Counts(1, 0), ("b",): Counts(0, 2)}, {})
    assert judged(Slicing(HOURLY), counts) == (
        {("a",): Counts(1, 0), ("b",): Counts(3, 2)},
        {("a",): (0, 1), ("b",): (Fraction(5, 4), 2)},
    )


# --- Slices that are bad in part ---


def test_a_slice_may_be_as_good_as_its_events_are() -> None:
    # (0.9 + 0.5 + 1 + 0 + 0.75) / 5: 1.85 slices are lost.
    found = report(Slicing(HOURLY), "0.63")
    assert (found.good, found.bad, found.total) == (Fraction("3.15"), Fraction("1.85"), 5)
    assert found.summary == "1.85 of 5 slices were lost in all (6 of 23 runs failed); the budget allows 1.85"
    assert found.share == Fraction(63, 100)
    assert found.verdict == "met"
    assert found.budget_remaining == 0.0
    assert report(Slicing(HOURLY), "0.64").verdict == "uncertain"


def test_days_with_one_failure_each_are_judged_by_all_their_runs() -> None:
    days = {(day, ()): Counts(29, 1) for day in range(28)}
    found = report(Slicing(Duration(1, "d")), "0.99", days)
    (printed,) = json.loads(render_json([found]))["objectives"]
    told = {name: printed[name] for name in ("good", "bad", "total", "sli", "budget_remaining", "verdict")}
    assert told == {
        "good": pytest.approx(27.0667, abs=5e-5),
        "bad": pytest.approx(0.9333, abs=5e-5),
        "total": 28,
        "sli": pytest.approx(29 / 30),
        # 1 - 0.9333 / 0.28
        "budget_remaining": pytest.approx(-7 / 3),
        "verdict": "breached",
    }
    assert (
        found.summary == "0.9333 of 28 slices were lost in all (28 of 840 runs failed); the budget allows 0.28"
    )
    # Of 840 runs 8.4 would fail.
    assert found.p_value == binomial_upper_tail(28, 840, Decimal("0.99")) < 1e-6
    assert found.alerting
    (row,) = csv.DictReader(io.StringIO(render_csv([found])))
    assert (row["bad"], row["budget_allows"]) == (str(printed["bad"]), "0.28")


def test_many_bad_events_in_one_of_many_slices_are_no_alert_while_the_objective_is_met() -> None:
    quiet = {(day, ()): Counts(1, 0) for day in range(27)}
    found = report(Slicing(Duration(1, "d")), "0.95", {**quiet, (27, ()): Counts(900, 100)})
    assert (found.verdict, found.events) == ("met", Counts(927, 100))
    assert found.p_value < 1e-6
    assert not found.alerting


def test_bad_parts_of_slices_are_a_breach_only_if_two_events_are_bad() -> None:
    quiet = {(day, ()): Counts(1, 0) for day in range(4)}
    slicing = Slicing(Duration(1, "d"))
    assert report(slicing, "0.999", {**quiet, (4, ()): Counts(0, 1)}).verdict == "uncertain"
    two = report(slicing, "0.999", {**quiet, (4, ()): Counts(0, 2)})
    assert (two.bad, two.verdict, two.alerting) == (1, "breached", True)


def test_four_slices_are_too_few_whatever_happened_in_them() -> None:
    found = report(Slicing(HOURLY), "0.9", {(hour, ()): Counts(0, 9) for hour in range(4)})
    assert found.verdict == "insufficient data"


def test_what_is_lost_of_a_slice_is_never_told_as_nothing() -> None:
    found = report(Slicing(HOURLY), "0.9", {(0, ()): Counts(99_999, 1)})
    assert found.summary.startswith("0.00001 of 1 slice were lost in all")


@pytest.mark.parametrize(("lost", "told"), [("0.99999", "0.9999"), ("1", "1"), ("1.00001", "1.00001")])
def test_what_is_lost_reads_as_what_the_budget_allows_only_if_it_is(lost: str, told: str) -> None:
    assert amount(Fraction(lost), 1) == told
    assert amount(1, Fraction(lost)) == "1"


def test_one_failure_does_not_spend_the_budget_of_slices_with_many_events() -> None:
    busy = {(day, ()): Counts(29, 1) for day in range(28)}
    assert not list(thin_budgets([report(Slicing(Duration(1, "d")), "0.99", busy)]))
    (warning,) = thin_budgets([report(Slicing(Duration(1, "d"), Decimal("0.9")), "0.99", busy)])
    assert "28 events in the window, and one failure spends the budget" in warning


some_counts = st.builds(Counts, st.integers(0, 50), st.integers(0, 50)).filter(lambda each: each.total > 0)


@given(
    st.dictionaries(st.tuples(st.integers(0, 99), st.just(())), some_counts, min_size=1),
    st.decimals(0, "0.999999", places=6),
)
def test_what_is_told_of_slices_that_are_bad_in_part_agrees_with_itself(
    counts: dict[tuple[int, Group], Counts], target: Decimal
) -> None:
    found = report(Slicing(HOURLY), target, counts)
    assert found.total == len(counts)
    assert found.bad == sum(Fraction(each.bad, each.total) for each in counts.values())
    assert found.good + found.bad == found.total
    assert found.share == found.good / found.total
    assert found.budget_remaining == float(budget_remaining(found.bad, found.total, target))
    assert found.interval == wilson_interval(found.good, found.total)
    assert found.interval[0] <= float(found.share) <= found.interval[1]
    events = Counts(sum(each.good for each in counts.values()), sum(each.bad for each in counts.values()))
    assert found.events == events
    assert found.p_value == binomial_upper_tail(events.bad, events.total, target)
    assert (found.verdict == "met") == (found.total >= 5 and found.bad <= found.allowed)
    assert not (found.alerting and found.verdict == "met")
    printed = json.loads(render_json([found]))
    Draft202012Validator(load_schema("slo-report")).validate(printed)
    (told,) = printed["objectives"]
    assert told["sli"] == pytest.approx(told["good"] / told["total"])


# --- Where slices begin and end ---


def moments(slices: Sequence[int]) -> list[datetime]:
    return [datetime.fromtimestamp(0, UTC) + timedelta(microseconds=edge // 1000) for edge in slices]


def slices(length: str, rule: TimeWindow, at: datetime) -> list[datetime]:
    return moments(edges(Slicing(Duration.parse(length)), rule, rule.at(at), min(rule.at(at).end, at)))


def all_slices(length: str, rule: TimeWindow, at: datetime) -> list[datetime]:
    """Those of the whole window of a calendar."""
    window = rule.at(at)
    return moments(edges(Slicing(Duration.parse(length)), rule, window, window.end))


def test_slices_of_a_rolling_window_are_those_of_the_clock_that_lie_within() -> None:
    day = TimeWindow(Duration(1, "d"))
    at = datetime(2026, 3, 29, 12, 30, tzinfo=UTC)
    found = slices("6h", day, at)
    assert found == [at.replace(day=28, hour=18, minute=0) + number * timedelta(hours=6) for number in range(4)]


def test_days_of_a_calendar_are_those_of_its_time_zone_and_fill_the_month() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    monthly = TimeWindow(Duration(1, "M"), datetime(2026, 1, 1, tzinfo=berlin))
    for month, days in ((3, 31), (7, 31), (10, 31), (11, 30)):
        window = monthly.at(datetime(2026, month, days, 12, tzinfo=berlin).astimezone(UTC))
        found = all_slices("1d", monthly, window.start)
        assert (found[0], found[-1], len(found)) == (window.start, window.end, days + 1)
        assert {edge.astimezone(berlin).hour for edge in found} == {0}


@pytest.mark.parametrize(
    ("zone", "start"),
    [
        # Clocks go from 0 to 1, and in Berlin from 2 to 3, just when the week begins.
        ("America/Santiago", datetime(2026, 9, 6)),
        ("Africa/Cairo", datetime(2026, 4, 24)),
        ("America/Havana", datetime(2026, 3, 8)),
        ("Europe/Berlin", datetime(2026, 3, 29, 2, 30)),
    ],
)
def test_days_of_a_week_that_begins_when_clocks_are_skipped_are_its_seven_days(
    zone: str, start: datetime
) -> None:
    of_zone = start.replace(tzinfo=ZoneInfo(zone))
    weekly = TimeWindow(Duration(1, "w"), of_zone - 20 * timedelta(weeks=1))
    window = weekly.at(of_zone.astimezone(UTC) + DAY)
    found = all_slices("1d", weekly, window.start)
    assert (found[0], found[-1], len(found)) == (window.start, window.end, 8)
    on_the_wall = [edge.astimezone(of_zone.tzinfo).replace(tzinfo=None) for edge in found]
    assert on_the_wall == [start + HOUR, *(start + number * DAY for number in range(1, 8))]


def test_months_of_a_quarter_from_the_31st_begin_on_the_31st() -> None:
    quarterly = TimeWindow(Duration(1, "Q"), datetime(2026, 1, 31, tzinfo=UTC))
    found = all_slices("1M", quarterly, datetime(2026, 6, 1, tzinfo=UTC))
    assert [(edge.month, edge.day) for edge in found] == [(4, 30), (5, 31), (6, 30), (7, 31)]


def test_months_that_do_not_fill_the_quarter_begin_with_it() -> None:
    quarterly = TimeWindow(Duration(1, "Q"), datetime(2026, 1, 31, tzinfo=UTC))
    found = all_slices("2M", quarterly, datetime(2026, 6, 1, tzinfo=UTC))
    assert [(edge.month, edge.day) for edge in found] == [(4, 30), (6, 30)]


def test_months_of_weeks_begin_with_these() -> None:
    weeks = TimeWindow(Duration(10, "w"), datetime(2026, 1, 31, tzinfo=UTC))
    found = all_slices("1M", weeks, datetime(2026, 6, 1, tzinfo=UTC))
    # 70 days after 31 January.
    assert [(edge.month, edge.day) for edge in found] == [(4, 11), (5, 11), (6, 11)]


def test_days_of_a_window_of_hours_are_those_of_its_time_zone() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    of_hours = TimeWindow(Duration(48, "h"), datetime(2026, 3, 28, tzinfo=berlin))
    start = datetime(2026, 3, 27, 23, tzinfo=UTC)
    assert all_slices("1d", of_hours, start) == [start, start + DAY, start + 47 * HOUR]


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 29, 23), (10, 25, 25), (6, 1, 24)])
def test_hours_of_a_day_have_the_same_length_whatever_clocks_do(month: int, day: int, hours: int) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    daily = TimeWindow(Duration(1, "d"), datetime(2026, 1, 1, 0, 10, tzinfo=berlin))
    window = daily.at(datetime(2026, month, day, 12, tzinfo=berlin).astimezone(UTC))
    assert all_slices("1h", daily, window.start) == [
        window.start + number * HOUR for number in range(hours + 1)
    ]
    assert window.end == window.start + hours * HOUR


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
        assert Duration.parse(length).shift(found[-1], 1) > at - HOUR


@given(
    st.sampled_from([("1d", "1d"), ("1w", "1d"), ("4w", "1w"), ("1M", "1M"), ("1Q", "1M"), ("1Y", "1Q")]),
    st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)),
    st.sampled_from(
        ["Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "Africa/Cairo", "Pacific/Apia"]
    ),
    st.datetimes(datetime(1990, 1, 1), datetime(2050, 1, 1), timezones=st.just(UTC)),
)
def test_slices_that_fit_a_window_of_a_calendar_fill_it(
    lengths: tuple[str, str], start: datetime, zone: str, at: datetime
) -> None:
    rule = TimeWindow(Duration.parse(lengths[0]), start.replace(tzinfo=ZoneInfo(zone)))
    window = rule.at(at)
    found = all_slices(lengths[1], rule, at)
    # A day that a zone skipped is one without any moment.
    assert found == sorted(found)
    assert (found[0], found[-1]) == (window.start, window.end)


def test_minutes_of_many_years_are_not_listed() -> None:
    rule = TimeWindow(Duration(20, "Y"), datetime(2000, 1, 1, tzinfo=ZoneInfo("America/Santiago")))
    window = rule.at(NOW.replace(year=2010))
    found = edges(Slicing(Duration(1, "m")), rule, window, window.end)
    assert isinstance(found, range)
    assert (len(found) - 1) * timedelta(minutes=1) == window.end - window.start


@pytest.mark.parametrize(
    ("zone", "month", "step"),
    [
        ("Europe/Berlin", 6, DAY),
        ("Europe/Berlin", 10, HOUR),
        ("Australia/Lord_Howe", 10, HOUR / 2),
    ],
)
def test_days_are_made_of_the_longest_steps_that_clocks_leave(zone: str, month: int, step: timedelta) -> None:
    monthly = TimeWindow(Duration(1, "M"), datetime(2026, 1, 1, tzinfo=ZoneInfo(zone)))
    window = monthly.at(datetime(2026, month, 15, tzinfo=UTC))
    days = edges(Slicing(Duration(1, "d")), monthly, window, window.end)
    assert step_of(days) == step / timedelta(microseconds=1) * 1000
    minutes = edges(Slicing(Duration(7, "m")), monthly, window, window.end)
    assert step_of(minutes) == 7 * 60 * 10**9


def test_what_is_counted_by_steps_is_added_up_by_slices() -> None:
    counts: dict[tuple[int, Group], Counts] = {
        (0, ()): Counts(1, 0),
        (1, ()): Counts(0, 1),
        (2, ()): Counts(5, 5),
    }
    # Two steps, none, one.
    places = [1000 + 10 * steps for steps in (0, 2, 2, 3)]
    assert {end - start for start, end in pairwise(places)} == {0, 10, 20}
    assert by_slice(counts, 10, places) == {(0, ()): Counts(1, 1), (2, ()): Counts(5, 5)}
    assert by_slice(counts, 10, range(1000, 1040, 10)) == counts
