"""A sender's clock is known from when its events arrive; moments in seconds, times a billion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.clocks import TOLERANCE, Clock

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
HEARTBEAT = 5 * SECOND
NOW = 1_750_000_000 * SECOND
delays = st.integers(0, SECOND)


def heard(clock: Clock, *arrivals: tuple[int, int]) -> Clock:
    for moment, received_at in arrivals:
        clock = clock.hear(moment, received_at)
    return clock


def test_nothing_is_known_of_a_clock_that_was_not_heard() -> None:
    assert not Clock().sure
    assert Clock().ours(NOW, NOW + HOUR) == NOW


def test_a_clock_that_agrees_is_right() -> None:
    clock = heard(Clock(), (NOW, NOW + SECOND))
    assert (clock.sure, clock.offset) == (True, 0)


def test_an_event_from_the_future_proves_a_clock_ahead_at_once() -> None:
    clock = heard(Clock(), (NOW + HOUR, NOW))
    assert (clock.sure, clock.offset) == (True, HOUR)
    assert clock.ours(NOW + HOUR + SECOND, NOW + HEARTBEAT) == NOW + SECOND


def test_an_old_event_proves_nothing_until_two_heartbeats_are_as_old() -> None:
    clock = heard(Clock(), (NOW - HOUR, NOW), (NOW - HOUR + HEARTBEAT, NOW + HEARTBEAT))
    assert not clock.sure
    clock = heard(clock, (NOW - HOUR + 2 * HEARTBEAT, NOW + 2 * HEARTBEAT))
    assert (clock.sure, clock.offset) == (True, -HOUR)


def test_a_clock_ahead_that_is_replayed_is_ahead_by_more_until_it_is_steady() -> None:
    clock = Clock()
    for beat in range(360):  # 30 minutes of heartbeats of a clock an hour ahead, a hundredth of a second each
        clock = clock.hear(NOW + HOUR + beat * HEARTBEAT, NOW + HOUR // 2 + beat * SECOND // 100)
        assert not clock.settled
    late = NOW + HOUR // 2
    for beat in (1, 2, 3):
        clock = clock.hear(late + HOUR + beat * HEARTBEAT, late + beat * HEARTBEAT)
    assert (clock.settled, clock.offset) == (True, HOUR)


def test_a_replay_does_not_make_a_clock_look_behind() -> None:
    clock = Clock()
    for beat in range(720):  # an hour of heartbeats, a tenth of a second each
        clock = clock.hear(NOW - 2 * HOUR + beat * HEARTBEAT, NOW + beat * SECOND // 10)
        assert (clock.sure, clock.offset) == (False, 0)


@pytest.mark.parametrize("pause", [5, 10, 60])
def test_a_pause_in_a_replay_does_not_make_a_clock_look_behind(pause: int) -> None:
    """The data go on by as much as the replay had to wait."""
    clock, happened, received_at = Clock(), NOW - HOUR, NOW
    for wait in (0, pause, 0, 0, pause, 0):
        happened += (wait or 5) * SECOND
        received_at += wait * SECOND + SECOND // 10
        clock = clock.hear(happened, received_at)
        assert (clock.sure, clock.offset) == (False, 0)


def test_a_clock_that_was_known_stays_known_during_a_replay() -> None:
    clock = heard(Clock(), (NOW, NOW))
    for beat in range(120):
        clock = clock.hear(NOW + beat * HEARTBEAT, NOW + HOUR + beat * SECOND // 100)
    assert (clock.sure, clock.offset) == (True, 0)


def test_a_host_that_was_suspended_is_behind_from_then_on() -> None:
    clock = heard(Clock(), (NOW, NOW), (NOW + HEARTBEAT, NOW + HEARTBEAT))
    late = NOW + HOUR
    for beat in range(3):
        clock = clock.hear(NOW + (2 + beat) * HEARTBEAT, late + beat * HEARTBEAT)
    assert clock.ours(NOW + 4 * HEARTBEAT, late + 2 * HEARTBEAT) == late + 2 * HEARTBEAT


@given(st.integers(-48, 48), st.lists(delays, min_size=3, max_size=20))
def test_heartbeats_give_the_offset_to_within_the_tolerance(hours: int, waits: list[int]) -> None:
    offset = hours * HOUR
    clock = Clock()
    for beat, wait in enumerate(waits):
        happened = NOW + beat * HEARTBEAT
        clock = clock.hear(happened + offset, happened + wait)
    assert clock.sure
    assert abs(clock.offset - offset) <= TOLERANCE
    ended, received_at = NOW + len(waits) * HEARTBEAT, NOW + len(waits) * HEARTBEAT + SECOND
    assert abs(clock.ours(ended + offset, received_at) - ended) <= TOLERANCE


@given(st.integers(-48, 48).filter(bool), st.integers(1, 600), st.integers(1, 100))
def test_nothing_ever_happened_after_it_was_received(hours: int, beats: int, wait: int) -> None:
    clock = heard(Clock(), (NOW + hours * HOUR, NOW + wait))
    moment, received_at = NOW + hours * HOUR + beats * HEARTBEAT, NOW + beats * HEARTBEAT
    assert clock.ours(moment, received_at) <= received_at


@pytest.mark.parametrize("wait", [0, 60, 3600])
def test_a_single_delayed_batch_does_not_move_a_known_clock(wait: int) -> None:
    clock = heard(Clock(), (NOW, NOW), (NOW + HEARTBEAT, NOW + HEARTBEAT + wait * SECOND))
    assert clock.offset == 0
