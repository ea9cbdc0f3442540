"""What is kept of a number is what numpy says of the whole of it, in whatever pieces it came."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.findings.run_view import Doubles
from gradwatch_collector.findings.track import RECENT, STRETCHES, Track


def drawn(seed: int, count: int) -> Doubles:
    chance = np.random.default_rng(seed)
    # Whole numbers, so that sums are the same in any order.
    values = chance.integers(-1000, 1000, count).astype(np.float64)
    values[chance.random(count) < 0.1] = chance.choice([np.nan, np.inf, -np.inf])
    return values


VALUES = st.builds(drawn, st.integers(0, 2**32), st.integers(0, 3_000))


@given(VALUES, st.lists(st.integers(0, 3_000)))
def test_a_track_is_what_numpy_says_of_the_whole(values: Doubles, cuts: list[int]) -> None:
    times, track = 7 * np.arange(len(values)), Track()
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for start, end in pairwise(edges):
        track.add(times[start:end], values[start:end])
    recent, course = track.recent(), track.course()
    np.testing.assert_array_equal(recent.times, times[-RECENT:])
    np.testing.assert_array_equal(recent.values, values[-RECENT:])
    assert len(course) <= STRETCHES
    assert course.width == 1 or len(course) > STRETCHES // 2
    parts = [values[start : start + course.width] for start in range(0, len(values), course.width)]
    good = [part[np.isfinite(part)] for part in parts]
    ends = [min(start + course.width, len(values)) - 1 for start in range(0, len(values), course.width)]
    np.testing.assert_array_equal(course.times, times[np.array(ends, np.int64)])
    np.testing.assert_array_equal(course.finite, [len(part) for part in good])
    np.testing.assert_array_equal(course.nonfinite, [np.sum(~np.isfinite(part)) for part in parts])
    for told, of in ((course.mean, np.mean), (course.least, np.min), (course.most, np.max)):
        np.testing.assert_array_equal(told, [of(part) if len(part) else np.nan for part in good])
