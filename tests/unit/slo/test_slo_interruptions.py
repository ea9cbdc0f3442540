"""Mean time to interrupt, to detect and to recover: worked by hand, and against counting second by second."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_slo.interruptions import AttemptFacts, interruptions
from gradwatch_slo.runs import Status


def attempt(started: int, ended: int | None, status: Status = Status.SUCCEEDED, **facts: Any) -> AttemptFacts:
    told = {"reason": None, "detected_at": None, "resumed_at": None} | facts
    return AttemptFacts(status=status, started_at=started, ended_at=ended, **told)


def test_time_to_interrupt_counts_what_ran_well_too() -> None:
    fleet = [
        attempt(0, 100),
        attempt(50, None, Status.RUNNING),
        attempt(0, 40, Status.FAILED, detected_at=42, resumed_at=60),
        attempt(60, 90, Status.LOST, detected_at=98),
        attempt(10, 20, Status.CANCELLED),
    ]
    found = interruptions(fleet, 0, 200)
    assert (found.attempts, found.interruptions, found.running) == (5, 2, 100 + 150 + 40 + 30 + 10)
    assert found.mean_time_to_interrupt == 330 / 2
    assert (found.detected, found.mean_time_to_detect) == (2, (2 + 8) / 2)
    assert (found.recovered, found.mean_time_to_recover) == (1, 20)


def test_a_preempted_attempt_was_interrupted_and_a_cancelled_one_was_not() -> None:
    fleet = [
        attempt(0, 10, Status.CANCELLED, reason="preempted"),
        attempt(0, 10, Status.CANCELLED, reason="SIGTERM"),
    ]
    assert interruptions(fleet, 0, 100).interruptions == 1


def test_without_interruptions_nothing_is_known_of_how_long_they_take() -> None:
    found = interruptions([attempt(0, 10)], 0, 100)
    assert (found.interruptions, found.mean_time_to_interrupt, found.mean_time_to_detect) == (0, None, None)


@pytest.mark.parametrize(("ended", "counted"), [(99, 0), (100, 1), (199, 1), (200, 0)])
def test_an_interruption_belongs_to_the_window_it_happened_in(ended: int, counted: int) -> None:
    found = interruptions([attempt(50, ended, Status.FAILED, resumed_at=1000)], 100, 200)
    assert (found.interruptions, found.recovered) == (counted, counted)


def test_an_attempt_that_resumed_before_its_predecessor_was_over_recovered_at_once() -> None:
    found = interruptions([attempt(0, 50, Status.LOST, detected_at=49, resumed_at=40)], 0, 100)
    assert (found.mean_time_to_detect, found.mean_time_to_recover) == (0, 0)


spans = st.tuples(
    st.integers(0, 40),
    st.none() | st.integers(0, 40),
    st.sampled_from([Status.SUCCEEDED, Status.FAILED, Status.LOST]),
)


@given(st.lists(spans, max_size=6), st.integers(0, 30), st.integers(1, 30))
def test_running_time_is_what_a_count_of_every_second_says(
    told: list[tuple[int, int | None, Status]], start: int, length: int
) -> None:
    fleet = [
        attempt(begun, None if lasted is None else begun + lasted, status) for begun, lasted, status in told
    ]
    end = start + length
    dense = sum(
        each.started_at <= second and (each.ended_at is None or second < each.ended_at)
        for each in fleet
        for second in range(start, end)
    )
    found = interruptions(fleet, start, end)
    assert found.running == dense
    broken = [each for each in fleet if each.is_interruption and each.ended_at is not None]
    assert found.interruptions == sum(start <= (each.ended_at or 0) < end for each in broken)
