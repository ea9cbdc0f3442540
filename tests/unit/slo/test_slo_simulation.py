"""What alerts would have done over a history: exactly, and by chance as often as sampling says."""

from __future__ import annotations

import dataclasses
import operator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from slo_reports import objective

from gradwatch_slo.counts import Counts
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Operator, UnitRatio
from gradwatch_slo.links import BurnRateAlert
from gradwatch_slo.simulation import Episode, History, Simulated, simulate
from gradwatch_slo.slices import Slicing
from gradwatch_slo.statistics import binomial_upper_tail
from gradwatch_slo.verdict import alerts
from gradwatch_slo.windows import TimeWindow

HOUR = timedelta(hours=1)
FIRST = 492_000
BEGAN = datetime(1970, 1, 1, tzinfo=UTC) + FIRST * HOUR
DAY = TimeWindow(Duration(1, "d"))
STEPS = UnitRatio("step", "unhealthy")


def history(counts: dict[int, Counts], hours: int) -> History:
    """Hours numbered from 0."""
    return History.of({FIRST + hour: each for hour, each in counts.items()}, FIRST, FIRST + hours)


def only(each: Any, past: History) -> Simulated:
    (found,) = simulate(each, past)
    return found


def policy(
    name: Operator, threshold: int, look_back: Duration, alert_after: Duration | None = None
) -> BurnRateAlert:
    """An alert policy that is named by how it compares."""
    return BurnRateAlert(
        policy=name,
        severity="ticket",
        operator=name,
        threshold=Decimal(threshold),
        look_back=look_back,
        alert_after=alert_after,
        targets=(),
        when_breaching=True,
        when_no_data=False,
    )


def test_an_alert_fires_from_the_hour_that_surprises_until_it_has_left_the_window() -> None:
    # Three of ten at a 90 % target: p = 0.07; four of twelve: 0.026; five of fourteen: 0.009.
    counts = {0: Counts(7, 3), 5: Counts(1, 1), 9: Counts(1, 1), 15: Counts(2, 0)}
    found = only(objective(window=DAY), history(counts, 60))
    assert binomial_upper_tail(4, 12, Decimal("0.9")) > 0.01 > binomial_upper_tail(5, 14, Decimal("0.9"))
    # With the two good ones it is five of sixteen, p = 0.017.
    assert found.episodes == (Episode(BEGAN + 10 * HOUR, BEGAN + 16 * HOUR, bad=5, total=14),)


def test_an_alert_that_still_fires_has_no_end() -> None:
    (episode,) = only(objective(window=DAY), history({3: Counts(0, 4)}, 10)).episodes
    assert (episode.start, episode.end) == (BEGAN + 4 * HOUR, None)


def test_a_calendar_window_begins_anew() -> None:
    midnight = TimeWindow(Duration(1, "d"), BEGAN.replace(hour=0))
    (episode,) = only(objective(window=midnight), history({0: Counts(0, 4)}, 48)).episodes
    assert BEGAN.hour == 0
    assert episode.end == BEGAN + 25 * HOUR


events = st.dictionaries(st.integers(0, 79), st.builds(Counts, st.integers(0, 9), st.integers(0, 9)))


@given(events, st.sampled_from(["0.5", "0.9", "0.99"]))
def test_an_alert_holds_whenever_the_window_says_so(counts: dict[int, Counts], target: str) -> None:
    found = only(objective(window=DAY, target=Decimal(target)), history(counts, 80))
    for hour in range(80):
        window = sum((counts.get(each, Counts()) for each in range(hour - 23, hour + 1)), Counts())
        now = BEGAN + (hour + 1) * HOUR
        fires = any(each.start <= now and (each.end is None or now < each.end) for each in found.episodes)
        p_value = binomial_upper_tail(window.bad, window.total, Decimal(target))
        assert fires == alerts(window.bad, p_value)


def test_what_fires_by_chance_is_what_probability_says() -> None:
    # Four events a day in a window of a day. Two bad ones are too few: P(X >= 2 | 4, 0.1) = 0.052. Three are
    # enough: P(X >= 3 | 4, 0.1) = 4 x 0.001 x 0.9 + 0.0001 = 0.0037, which is how often they come.
    days = 365
    past = history({24 * day: Counts(4, 0) for day in range(days)}, 24 * days)
    found = only(objective(window=DAY), past)
    assert found.episodes == ()
    assert found.by_chance == pytest.approx(0.0037 * 365.25, rel=0.15)
    assert found.quiet == pytest.approx((1 - 0.0037) ** days, abs=0.07)


def test_where_nothing_was_counted_nothing_fires() -> None:
    found = only(objective(window=DAY), history({}, 30))
    assert (found.episodes, found.by_chance, found.quiet) == ((), 0.0, 1.0)


def test_what_counts_many_events_burns_its_budget_over_two_look_backs() -> None:
    steps = objective(STEPS, unit="step", target=Decimal("0.999"))
    # 28 days: 13.44 x 0.001 within an hour pages, 0.933 x 0.001 within three days is a ticket.
    counts = {hour: Counts(1_000, 0) for hour in range(200)} | {100: Counts(900, 100)}
    by_rule = {each.rule: each.episodes for each in simulate(steps, history(counts, 200))}
    assert list(by_rule) == [
        "2 % of the budget in 1 h",
        "5 % of the budget in 6 h",
        "10 % of the budget in 24 h",
        "10 % of the budget in 72 h",
    ]
    assert by_rule["2 % of the budget in 1 h"] == (
        Episode(BEGAN + 101 * HOUR, BEGAN + 102 * HOUR, bad=100, total=1_000),
    )
    # It ends with the short look-back of six hours.
    assert by_rule["10 % of the budget in 72 h"] == (
        Episode(BEGAN + 101 * HOUR, BEGAN + 107 * HOUR, bad=100, total=72_000),
    )


def test_a_policy_fires_after_it_has_held_for_long_enough() -> None:
    held = policy("gte", 2, Duration(2, "h"), Duration(3, "h"))
    counts = {hour: Counts(80, 20) for hour in range(4, 9)} | {20: Counts(80, 20)}
    exact, asked = simulate(objective(window=DAY, alerts=(held,)), history(counts, 40))
    assert (exact.rule, asked.rule) == ("exact test", "policy gte")
    # At twice the rate from the end of hour 4 to that of hour 9 (the look-back ends later); three hours after.
    (episode,) = asked.episodes
    assert (episode.start, episode.end) == (BEGAN + 8 * HOUR, BEGAN + 11 * HOUR)


def test_a_window_of_minutes_is_refused() -> None:
    with pytest.raises(ValueError, match="its window of 5m is shorter than the hours"):
        only(objective(window=TimeWindow(Duration(5, "m"))), history({}, 3))


def test_what_was_before_fills_the_window_and_is_not_told() -> None:
    # Forty good ones before: three bad ones are nothing special then.
    counts = {0: Counts(0, 5), 20: Counts(40, 0), 30: Counts(0, 3)}
    whole = history(counts, 40)
    assert only(objective(window=DAY), whole).episodes[0].start == BEGAN + HOUR
    asked = dataclasses.replace(whole, lead=24)
    assert only(objective(window=DAY), asked).episodes == ()
    assert (asked.start, asked.length, asked.counts) == (BEGAN + 24 * HOUR, 16 * HOUR, Counts(0, 3))


def test_an_alert_that_fired_before_what_is_asked_and_still_does_is_told() -> None:
    # Four bad ones at once fire for a day; asked from the middle of it, at its end, and from just after.
    whole = history({0: Counts(0, 4)}, 60)
    told = {
        lead: only(objective(window=DAY), dataclasses.replace(whole, lead=lead)).episodes
        for lead in (0, 1, 12, 23, 24)
    }
    end = BEGAN + 25 * HOUR
    assert told.pop(0) == (Episode(BEGAN + HOUR, end, bad=4, total=4),)
    assert told.pop(24) == ()
    assert set(told.values()) == {(Episode(None, end, bad=4, total=4),)}
    (for_ever,) = only(
        objective(window=DAY), dataclasses.replace(history({0: Counts(0, 4)}, 9), lead=3)
    ).episodes
    assert (for_ever.start, for_ever.end) == (None, None)


def test_a_look_back_of_a_month_is_a_month_of_the_calendar() -> None:
    january = datetime(2026, 1, 1, tzinfo=UTC)
    first = (january - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR
    past = History.of({first: Counts(0, 4)}, first, first + 40 * 24)
    _, monthly = simulate(objective(window=DAY, alerts=(policy("gte", 1, Duration(1, "M")),)), past)
    assert monthly.episodes[0].end == datetime(2026, 2, 1, 1, tzinfo=UTC)


def test_of_a_history_shorter_than_the_window_nobody_knows_what_comes_by_chance() -> None:
    assert only(objective(window=DAY), history({0: Counts(5, 0)}, 23)).by_chance is None
    assert only(objective(window=DAY), history({0: Counts(5, 0)}, 24)).by_chance is not None


def test_rates_are_compared_exactly_and_as_the_rules_do() -> None:
    hour = Duration(1, "h")
    # 3 of 10 at a target of 90 % is a rate of 3, which no product of floats is.
    each = objective(window=DAY, alerts=(policy("gte", 3, hour), policy("gt", 3, hour)))
    fired = {found.rule: len(found.episodes) for found in simulate(each, history({2: Counts(7, 3)}, 30))}
    assert (fired["policy gte"], fired["policy gt"]) == (1, 0)
    # 5.6 x 0.001 of 10 000 are 56, which is not above.
    steps = objective(STEPS, unit="step", target=Decimal("0.999"))
    for bad, times in ((56, 0), (57, 1)):
        by_rule = {found.rule: found for found in simulate(steps, history({9: Counts(10_000 - bad, bad)}, 30))}
        assert len(by_rule["5 % of the budget in 6 h"].episodes) == times


@given(
    st.sampled_from(get_args(Operator)), st.decimals(0, 10, places=2), st.integers(0, 12), st.integers(1, 12)
)
@example("gte", Decimal("1.5"), 1, 10)
@example("lt", Decimal("1.5"), 1, 10)
@example("gt", Decimal("1.5"), 1, 10)
@example("lte", Decimal("1.5"), 2, 10)
def test_a_policy_fires_whenever_the_burn_rate_compares_as_it_says(
    name: Operator, threshold: Decimal, bad: int, total: int
) -> None:
    bad = min(bad, total)
    asked = dataclasses.replace(policy(name, 0, Duration(1, "h")), threshold=threshold)
    _, found = simulate(objective(window=DAY, alerts=(asked,)), history({2: Counts(total - bad, bad)}, 30))
    rate = Fraction(bad, total) / Fraction(1, 10)
    compare = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}[name]
    assert bool(found.episodes) is compare(rate, Fraction(threshold))


@pytest.mark.parametrize(
    ("name", "threshold", "fires"),
    [
        ("gt", "13.4400000000000001", True),
        ("gt", "1e30", False),
        ("gte", "1e30", False),
        ("lt", "1e30", True),
        ("lte", "-1e30", False),
        ("gte", "-1e30", True),
    ],
)
def test_no_number_that_may_be_written_is_too_fine_or_too_large(
    name: Operator, threshold: str, fires: bool
) -> None:
    asked = dataclasses.replace(policy(name, 0, Duration(1, "h")), threshold=Decimal(threshold))
    strict = objective(window=DAY, target=Decimal("0.999999999999"), alerts=(asked,))
    _, found = simulate(strict, history({2: Counts(10**6, 3)}, 30))
    assert bool(found.episodes) is fires


def test_of_many_events_only_the_alerts_are_simulated_that_are_made_of_them() -> None:
    # Over a day no standard rule fits, and the exact test is for runs.
    steps, past = objective(STEPS, unit="step", window=DAY), history({2: Counts(0, 9)}, 30)
    with pytest.raises(ValueError, match="it has no alert on how fast it burns its budget"):
        only(steps, past)
    asked = dataclasses.replace(steps, alerts=(policy("gte", 3, Duration(1, "h")),))
    assert only(asked, past).rule == "policy gte"


def test_slices_of_time_are_not_simulated() -> None:
    with pytest.raises(ValueError, match="it judges slices of time"):
        only(objective(window=DAY, slicing=Slicing(Duration(1, "h"))), history({}, 3))
