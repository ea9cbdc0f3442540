"""Levels of a noisy number, against medians of its stretches one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.findings.levels import LEAST, levels_of

Numbers = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


def plain(means: Sequence[float], width: int) -> list[tuple[int, float, float]]:
    """End, median and noise of each stretch, as the definition says."""
    total = len(means) * width
    size = max(LEAST, total / 256)
    found = []
    for group in range(int(total // size)):
        places = [at for at in range(len(means)) if ((at + 1) * width - 1) // size == group]
        known = [means[at] for at in places if math.isfinite(means[at])]
        bends = [abs(a - 2 * b + c) for a, b, c in zip(known, known[1:], known[2:], strict=False)]
        if known:
            noise = 1.4826 * statistics.median(bends) / math.sqrt(6) if bends else 0.0
            found.append(((places[-1] + 1) * width, statistics.median(known), noise))
    return found


@given(st.lists(Numbers, max_size=256), st.sampled_from([1, 2, 8, 32]))
def test_levels_are_medians_of_so_many_values_and_their_noise_that_of_second_differences(
    means: list[float], width: int
) -> None:
    times = np.arange(len(means), dtype=np.int64)
    told = levels_of(times, np.array(means, np.float64), np.full(len(means), float(width)))
    expected = plain(means, width)
    assert told.after.tolist() == [end for end, _, _ in expected]
    assert told.values == pytest.approx([level for _, level, _ in expected])
    assert told.noise == pytest.approx([noise for _, _, noise in expected], abs=1e-6)
