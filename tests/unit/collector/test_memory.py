"""What requests may hold together is bounded, and everything is given back."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import conventions as c
from gradwatch_collector.otlp.errors import UnavailableError
from gradwatch_collector.otlp.memory import Holding, Memory
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.otlp.points import Remembered
from gradwatch_collector.records import ProcessKey, Received
from gradwatch_collector.runs.live import LiveRuns
from tests.batches import batch, frame, source
from tests.otlp_clients import gauge, metrics_request


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


def test_large_requests_leave_room_for_small_ones() -> None:
    memory = Memory(64 << 20)
    with Holding(memory) as first, Holding(memory) as second, Holding(memory) as small:
        first.grow(40 << 20)
        second.grow(16 << 20)
        with pytest.raises(UnavailableError):
            second.grow(2 << 20)
        small.grow(512 << 10)
    assert memory.held == 0
    with Holding(memory) as another:
        another.grow(64 << 20)


def test_what_is_held_for_a_while_is_given_back_after_it() -> None:
    memory = Memory(64 << 20)
    with Holding(memory) as first, Holding(memory) as second:
        first.grow(10 << 20)
        with first.more(46 << 20), pytest.raises(UnavailableError):
            second.grow(20 << 20)
        assert first.size == memory.held == 10 << 20
        second.grow(40 << 20)
    assert memory.held == 0


def test_what_is_held_for_a_while_is_given_back_once_when_all_is_given_up_meanwhile() -> None:
    memory = Memory(1000)
    given_up = Holding(memory)
    with given_up.more(10), given_up:
        pass
    assert memory.held == 0


def test_what_is_given_up_while_it_is_read_holds_nothing_afterwards() -> None:
    memory = Memory(1000)
    with Holding(memory) as given_up:
        given_up.grow(10)
    with pytest.raises(UnavailableError):
        given_up.grow(10)
    assert memory.held == 0


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
    for_large = memory.limit * 7 // 8
    holdings, held = [Holding(memory) for _ in range(4)], [0] * 4
    for who, size in growths:
        try:
            holdings[who].grow(size)
        except UnavailableError:
            assert sum(held) + size > for_large
        else:
            held[who] += size
            assert sum(held) <= memory.limit or sum(held) == held[who]


@given(st.lists(st.integers(0, 120)))
def test_what_is_remembered_never_weighs_more_than_the_limit(sizes: list[int]) -> None:
    remembered: Remembered[bytes, int] = Remembered(100, len)
    for number, size in enumerate(sizes):
        key = bytes([number % 256]) * size
        remembered[key] = number
        assert (key in remembered) == (size <= 100)
        assert sum(map(len, remembered)) <= 100


def test_senders_that_say_much_about_themselves_are_not_all_remembered() -> None:
    decoder = MetricsDecoder()
    tracemalloc.start()
    for number in range(64):
        told = {"training.run.id": "run", "notes": f"{number}" + "x" * (1 << 20)}
        decoder.decode(metrics_request(told, gauge("norm", (1, 1.0))).SerializeToString())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 << 20


def test_the_newest_numbers_of_a_run_are_so_many_however_its_points_are_told_apart() -> None:
    live = LiveRuns()
    key = ProcessKey("run", 1, 0, "one")
    tracemalloc.start()
    for turn in range(20):
        points = [{c.METRIC_NAME: f"metric {turn}/{i}"} for i in range(5_000)]
        live.update(
            [Received(key, batch(source(), frames=[frame(c.LOGGED, points, [turn], [[1.0]] * 5_000)]), 0)]
        )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20 << 20


def test_the_newest_numbers_of_all_runs_are_so_many() -> None:
    live = LiveRuns()
    points = [{"i": i} for i in range(5_000)]
    for number in range(100):
        sent = batch(source(f"run-{number}"), frames=[frame(c.LOSS, points, [1], [[1.0]] * 5_000)])
        live.update([Received(ProcessKey(f"run-{number}", 1, 0, "one"), sent, 0)])
    kept = [number for number in range(100) if live.gauge(f"run-{number}", c.LOSS) is not None]
    assert kept[-1] == 99
    assert 50 <= len(kept) <= 61
