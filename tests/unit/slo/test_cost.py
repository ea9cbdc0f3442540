"""What a run cost, to the last digit, and what is not known."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_slo.cost import CPU_HOST, UNNAMED_DEVICE, Held, PriceTable, cost_of, hours_held

HOUR = 3600 * 1_000_000_000
PRICES = PriceTable("EUR", {"H100": Decimal("2.49"), "A100": Decimal("1.1")}, cpu_host=Decimal("0.3"))

moments = st.integers(0, 1_000 * HOUR)


def held(what: str, started: float, ended: float, which: str = "0") -> Held:
    return Held(what, which, int(started * HOUR), int(ended * HOUR))


@st.composite
def stretches(draw: st.DrawFn) -> list[Held]:
    drawn = draw(
        st.lists(st.tuples(st.sampled_from(["H100", "A100"]), st.sampled_from("ab"), moments, moments))
    )
    return [Held(what, which, min(one, other), max(one, other)) for what, which, one, other in drawn]


def test_a_run_costs_its_hours_times_their_price() -> None:
    # Two H100 for 1.5 h, one A100 for 20 min: 3 x 2.49 + 1.1 / 3.
    found = cost_of(
        [held("H100", 0, 1.5, "0"), held("H100", 0, 1.5, "1"), Held("A100", "2", 0, HOUR // 3)], PRICES
    )
    assert found.amount == Fraction("7.47") + Fraction("1.1") / 3
    assert found.hours == {"H100": 3, "A100": Fraction(1, 3)}
    assert (found.currency, found.unpriced) == ("EUR", ())


def test_ten_hours_at_ten_cents_are_exactly_one() -> None:
    prices = PriceTable("EUR", {"card": Decimal("0.1")})
    assert cost_of([held("card", hour, hour + 1, str(hour)) for hour in range(10)], prices).amount == 1


@pytest.mark.parametrize("unknown", ["B200", UNNAMED_DEVICE])
def test_what_has_no_price_makes_the_whole_unknown_and_is_named(unknown: str) -> None:
    found = cost_of([held("H100", 0, 1), held(unknown, 0, 1)], PRICES)
    assert (found.amount, found.unpriced) == (None, (unknown,))
    assert found.hours[unknown] == 1


def test_hosts_have_a_price_of_their_own_or_none() -> None:
    assert cost_of([held(CPU_HOST, 0, 2)], PRICES).amount == Fraction("0.6")
    assert cost_of([held(CPU_HOST, 0, 2)], PriceTable("EUR", {})).amount is None


def test_a_price_of_nothing_is_a_price() -> None:
    assert cost_of([held("own", 0, 2)], PriceTable("EUR", {"own": Decimal(0)})).amount == 0


def test_nothing_held_and_no_prices_are_unknown_and_not_free() -> None:
    assert cost_of([], PRICES).amount is None
    assert cost_of([held("H100", 0, 1)], None).amount is None


@given(stretches())
def test_the_same_thing_held_twice_at_a_time_is_paid_once(taken: list[Held]) -> None:
    assert hours_held([*taken, *taken]) == hours_held(taken)


@given(stretches(), st.integers(0, 1_000 * HOUR))
def test_where_a_stretch_is_cut_changes_nothing(taken: list[Held], cut: int) -> None:
    pieces = []
    for each in taken:
        middle = min(max(cut, each.started), each.ended)
        pieces += [
            Held(each.what, each.which, each.started, middle),
            Held(each.what, each.which, middle, each.ended),
        ]
    assert cost_of(pieces, PRICES).amount == cost_of(taken, PRICES).amount


@given(stretches())
def test_hours_are_at_most_their_sum_and_at_least_the_longest_and_cost_what_they_say(taken: list[Held]) -> None:
    found = cost_of(taken, PRICES)
    for what, hours in found.hours.items():
        lengths = [Fraction(each.ended - each.started, HOUR) for each in taken if each.what == what]
        assert max(lengths) <= hours <= sum(lengths)
    if taken:
        assert found.amount == sum(
            hours * Fraction(PRICES.devices[what]) for what, hours in found.hours.items()
        )
    assert list(found.hours.values()) == sorted(found.hours.values(), reverse=True)
