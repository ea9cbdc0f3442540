"""What is said of steps whose norms were rolled up is what all the norms would have said, or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.curves import Curve
from gradwatch_collector.runs.step_health import HEALTHY, unhealthy, unhealthy_in_buckets


def rolled_up(norms: Sequence[float], sizes: Sequence[int]) -> Curve:
    """A curve of buckets of these sizes; what is left is as it was sent."""
    ends = [end for end in np.cumsum(sizes) if end < len(norms)]
    ends += range(ends[-1] + 1 if ends else 1, len(norms) + 1)
    buckets = [np.array(norms[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    finite = [bucket[np.isfinite(bucket)] for bucket in buckets]
    return Curve(
        attempt=1,
        rank=0,
        attributes={},
        times=np.array(ends, np.int64),
        steps=np.array(ends, np.float64),
        values=np.array([each.mean() if len(each) else math.nan for each in finite]),
        least=np.array([each.min(initial=math.inf) if len(each) else math.nan for each in finite]),
        most=np.array([each.max(initial=0) if len(each) else math.nan for each in finite]),
        finite=np.array([len(each) for each in finite], np.float64),
        nonfinite=np.array([len(b) - len(f) for b, f in zip(buckets, finite, strict=True)], np.float64),
        last=norms[-1],
    )


calm = st.floats(1, 3) | st.just(math.nan)
anything = st.one_of(
    st.floats(0, 1e9), st.just(0.0), st.just(math.inf), st.floats(1, 30), st.floats(1e-4, 1e-2)
)


@given(
    st.lists(calm | anything, min_size=1, max_size=200), st.lists(st.integers(1, 64), min_size=1, max_size=5)
)
def test_it_is_never_a_guess(norms: list[float], sizes: list[int]) -> None:
    assert unhealthy_in_buckets(rolled_up(norms, sizes), HEALTHY) in (None, unhealthy(np.array(norms)))


@given(st.lists(calm, min_size=1, max_size=200), st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_of_calm_norms_it_is_known(norms: list[float], sizes: list[int]) -> None:
    assert unhealthy_in_buckets(rolled_up(norms, sizes), HEALTHY) == sum(map(math.isnan, norms))


@pytest.mark.parametrize("spike", [1e-4, 11.0])
@pytest.mark.parametrize("at", [100, 150])
def test_of_a_bucket_with_a_spike_it_is_not(spike: float, at: int) -> None:
    norms = [1.0] * 200
    norms[at] = spike
    assert unhealthy(np.array(norms)) == 1
    assert unhealthy_in_buckets(rolled_up(norms, [64, 64, 64]), HEALTHY) is None


def test_a_spike_that_left_the_window_is_forgotten() -> None:
    # The first bucket falls by a factor that is unhealthy between neighbours; 64 norms later it says nothing.
    norms = [100.0] * 10 + [1.0] * 10 + [1.0] * 64 + [0.05] * 64
    curve = rolled_up(norms, [10, 10, 64, 64])
    assert unhealthy_in_buckets(curve, HEALTHY) == 0 == unhealthy(np.array(norms))
