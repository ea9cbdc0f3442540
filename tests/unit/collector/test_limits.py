"""What a token may send, by a clock that stands still until a test moves it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.auth.limits import UNLIMITED, Limits, Rates
from gradwatch_collector.otlp.errors import LimitedError


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admitted(limits: Limits, rates: Rates, name: str = "ci") -> bool:
    try:
        limits.admit(name, rates)
    except LimitedError:
        return False
    return True


def exhaust(limits: Limits, rates: Rates, name: str = "ci") -> None:
    for _ in range(1_000):
        if not admitted(limits, rates, name):
            return
    pytest.fail("a limit that lets everything through")


def test_ten_seconds_worth_may_come_at_once_and_then_so_many_a_second(clock: Clock) -> None:
    limits, rates = Limits(clock=clock), Rates(requests=2)
    assert [admitted(limits, rates) for _ in range(21)] == [True] * 20 + [False]
    clock.seconds += 1
    assert [admitted(limits, rates) for _ in range(3)] == [True, True, False]


def test_whoever_waits_as_long_as_told_is_let_in(clock: Clock) -> None:
    limits, rates = Limits(clock=clock), Rates(bytes=100)
    limits.admit("ci", rates)
    limits.charge("ci", rates, 5_000)
    with pytest.raises(LimitedError, match="token 'ci' sends more than it may") as refused:
        limits.admit("ci", rates)
    assert refused.value.retry_after == pytest.approx(40, abs=0.01)
    clock.seconds += refused.value.retry_after - 0.1
    assert not admitted(limits, rates)
    clock.seconds += 0.1
    assert admitted(limits, rates)


def test_what_is_refused_costs_nothing(clock: Clock) -> None:
    limits, rates = Limits(clock=clock), Rates(requests=1)
    exhaust(limits, rates)
    assert not any(admitted(limits, rates) for _ in range(50))
    clock.seconds += 1
    assert admitted(limits, rates)


def test_one_tokens_greed_is_not_anothers_loss(clock: Clock) -> None:
    limits, rates = Limits(clock=clock), Rates(requests=1)
    exhaust(limits, rates, "greedy")
    assert admitted(limits, rates, "modest")


def test_a_tokens_own_limit_wins_over_the_collectors(clock: Clock) -> None:
    limits = Limits(Rates(requests=1), clock)
    assert sum(admitted(limits, Rates(requests=3), "own") for _ in range(100)) == 30
    assert sum(admitted(limits, UNLIMITED, "default") for _ in range(100)) == 10


def test_without_limits_everything_is_let_in(clock: Clock) -> None:
    limits = Limits(clock=clock)
    limits.charge("ci", UNLIMITED, 1 << 40)
    assert all(admitted(limits, UNLIMITED) for _ in range(1_000))


@given(
    rate=st.floats(0.1, 1e6),
    sent=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e7)), max_size=50),
)
def test_in_the_long_run_nobody_sends_more_than_rate_burst_and_one_request(
    rate: float, sent: list[tuple[float, float]]
) -> None:
    clock = Clock()
    limits, rates = Limits(clock=clock), Rates(bytes=rate)
    started, total = clock.seconds, 0
    for pause, size in sent:
        clock.seconds += pause
        if admitted(limits, rates):
            earned = rate * (clock.seconds - started + 10)
            assert total <= earned * (1 + 1e-9)
            limits.charge("ci", rates, int(size))
            total += int(size)
