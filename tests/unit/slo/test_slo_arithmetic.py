from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from gradwatch_slo.budget import budget_allows, budget_remaining, burn_rate
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.verdict import Verdict, alerts, verdict

targets = st.decimals(min_value=0, max_value="0.999999", places=6)
small_totals = st.integers(0, 60)


@st.composite
def counts(draw: st.DrawFn, totals: st.SearchStrategy[int] = small_totals) -> tuple[int, int]:
    total = draw(totals)
    return draw(st.integers(0, total)), total


def exact_tail(bad: int, total: int, target: Decimal) -> Fraction:
    good = Fraction(target)
    return sum(
        (math.comb(total, k) * (1 - good) ** k * good ** (total - k) for k in range(bad, total + 1)),
        Fraction(0),
    )


@given(counts(), targets)
def test_the_tail_equals_its_sum_in_fractions(count: tuple[int, int], target: Decimal) -> None:
    assert binomial_upper_tail(*count, target) == pytest.approx(float(exact_tail(*count, target)), rel=1e-12)


@given(counts(st.integers(1, 5_000_000)), st.sampled_from(["0.5", "0.8", "0.9", "0.99", "0.999", "0.9999"]))
def test_the_tail_agrees_with_scipy_for_millions_of_events(count: tuple[int, int], target: str) -> None:
    expected = binom.sf(count[0] - 1, count[1], float(1 - Decimal(target)))
    assert binomial_upper_tail(*count, Decimal(target)) == pytest.approx(expected, rel=1e-8, abs=1e-290)


@given(
    st.integers(10_000, 5_000_000), st.floats(-6, 6), st.sampled_from(["0.5", "0.9", "0.99", "0.999", "0.9999"])
)
def test_the_tail_agrees_with_scipy_where_verdicts_are_decided(
    total: int, deviations: float, target: str
) -> None:
    failure = float(1 - Decimal(target))
    spread = math.sqrt(total * failure * (1 - failure))
    bad = min(total, max(0, round(total * failure + deviations * spread)))
    expected = binom.sf(bad - 1, total, failure)
    assert binomial_upper_tail(bad, total, Decimal(target)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("bad", "total", "target", "tail"),
    [
        (0, 0, "0.99", 1),
        (0, 30, "0.99", 1),
        (1, 0, "0.99", 0),
        (5, 5, "0", 1),
        (1, 1, "0.95", 0.05),
        (2, 2, "0.9", 0.01),
        # 1 - 0.99^30 - 30 x 0.01 x 0.99^29
        (2, 30, "0.99", 0.036148),
    ],
)
def test_tails_worked_by_hand(bad: int, total: int, target: str, tail: float) -> None:
    assert binomial_upper_tail(bad, total, Decimal(target)) == pytest.approx(tail, abs=5e-7)


@pytest.mark.parametrize(("total", "least"), [(5, 2), (10, 3), (20, 4), (60, 7)])
def test_the_least_count_that_breaches_95_percent(total: int, least: int) -> None:
    target = Decimal("0.95")
    assert verdict(least, total, target) is Verdict.BREACHED
    assert verdict(least - 1, total, target) is not Verdict.BREACHED


@given(counts(st.integers(0, 10**6)))
def test_the_interval_agrees_with_scipy_and_holds_the_share(count: tuple[int, int]) -> None:
    bad, total = count
    low, high = wilson_interval(total - bad, total)
    assert 0 <= low <= high <= 1
    if total == 0:
        assert (low, high) == (0, 1)
        return
    assert low <= (total - bad) / total <= high
    expected = binomtest(total - bad, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(counts(), targets)
def test_the_budget_is_exact(count: tuple[int, int], target: Decimal) -> None:
    bad, total = count
    allowed, remaining = budget_allows(total, target), budget_remaining(bad, total, target)
    assert allowed <= total * (1 - Fraction(target)) < allowed + 1
    assert (remaining >= 0) == (bad <= allowed)
    if total:
        assert remaining * total * (1 - Fraction(target)) == total * (1 - Fraction(target)) - bad
    else:
        assert remaining == 1


@pytest.mark.parametrize(
    ("total", "target", "allowed"),
    # In binary floats 100 x (1 - 0.9) is 9.999..., 1000 x (1 - 0.999) is 1.0000000000000009.
    [(100, "0.9", 10), (1000, "0.999", 1), (30, "0.99", 0), (99, "0.99", 0), (100, "0.99", 1), (7, "0", 7)],
)
def test_budgets_that_binary_floats_get_wrong(total: int, target: str, allowed: int) -> None:
    assert budget_allows(total, Decimal(target)) == allowed
    assert budget_remaining(allowed, total, Decimal(target)) == (
        1 - Fraction(allowed) / (total * (1 - Fraction(target)))
    )


@pytest.mark.parametrize(
    ("bad", "total", "target", "expected"),
    [
        (0, 0, "0.99", "insufficient data"),
        (4, 4, "0.99", "insufficient data"),
        (0, 5, "0.99", "met"),
        (1, 5, "0.99", "uncertain"),
        (2, 5, "0.99", "breached"),
        (3, 30, "0.99", "breached"),
        (10, 100, "0.9", "met"),
        (11, 100, "0.9", "uncertain"),
        (1, 10, "0.9", "met"),
        # P(X >= 1 | 5, 0.001) = 0.005 is surprising, but one event is no pattern.
        (1, 5, "0.999", "uncertain"),
    ],
)
def test_verdicts_worked_by_hand(bad: int, total: int, target: str, expected: str) -> None:
    assert verdict(bad, total, Decimal(target)) == expected


@given(st.integers(0, 200), targets)
def test_one_more_bad_event_never_improves_a_verdict(total: int, target: Decimal) -> None:
    order = [Verdict.MET, Verdict.UNCERTAIN, Verdict.BREACHED]
    verdicts = [verdict(bad, total, target) for bad in range(total + 1)]
    if total < 5:
        assert set(verdicts) == {Verdict.INSUFFICIENT_DATA}
    else:
        ranks = [order.index(each) for each in verdicts]
        assert ranks == sorted(ranks)


@given(counts(st.integers(0, 200)), targets)
def test_the_verdict_is_met_exactly_while_the_budget_lasts(count: tuple[int, int], target: Decimal) -> None:
    bad, total = count
    if total >= 5:
        assert (verdict(bad, total, target) is Verdict.MET) == (bad <= budget_allows(total, target))


@pytest.mark.parametrize(
    ("bad", "p_value", "alerting"), [(2, 0.0099, True), (2, 0.01, False), (1, 0.001, False), (0, 1.0, False)]
)
def test_an_alert_needs_two_bad_events_and_a_small_p_value(bad: int, p_value: float, alerting: bool) -> None:
    assert alerts(bad, p_value) is alerting


@given(counts(st.integers(0, 200)), targets)
def test_what_is_met_is_never_surprising_enough_for_an_alert(count: tuple[int, int], target: Decimal) -> None:
    if alerts(count[0], binomial_upper_tail(*count, target)):
        assert budget_remaining(*count, target) < 0


@given(counts(st.integers(0, 200)), targets)
def test_a_burn_rate_is_what_is_spent_of_the_budget_of_the_same_events(
    count: tuple[int, int], target: Decimal
) -> None:
    bad, total = count
    rate = burn_rate(bad, total, target)
    if total == 0:
        assert rate is None
    else:
        assert rate == 1 - budget_remaining(bad, total, target)
        assert 0 <= rate <= 1 / (1 - Fraction(target))
