"""What requests may hold together is bounded, and everything is given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.otlp.errors import UnavailableError
from gradwatch_collector.otlp.memory import Holding, Memory


def test_who_would_make_it_too_much_is_asked_to_come_again() -> None:
    memory = Memory(1000)
    with Holding(memory) as first:
        first.grow(memory.limit - 10)
        with Holding(memory) as second:
            second.grow(10)
            with pytest.raises(UnavailableError, match="too much is arriving at once"):
                second.grow(1)
            with pytest.raises(UnavailableError):
                first.grow(1)
        first.grow(10)


def test_one_alone_is_never_refused() -> None:
    memory = Memory(1000)
    with Holding(memory) as alone:
        alone.grow(memory.limit)
        alone.grow(memory.limit)


def test_what_a_failed_request_held_is_given_back() -> None:
    memory = Memory(1000)
    with pytest.raises(RuntimeError), Holding(memory) as failing:
        failing.grow(memory.limit)
        raise RuntimeError
    with Holding(memory) as first, Holding(memory) as second:
        first.grow(1)
        second.grow(memory.limit - 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40 << 20)), max_size=50))
def test_several_never_hold_more_than_the_limit(growths: list[tuple[int, int]]) -> None:
    memory = Memory(64 << 20)
    holdings, held = [Holding(memory) for _ in range(4)], [0] * 4
    for who, size in growths:
        try:
            holdings[who].grow(size)
        except UnavailableError:
            assert sum(held) + size > memory.limit
        else:
            held[who] += size
            assert sum(held) <= memory.limit or sum(held) == held[who]
