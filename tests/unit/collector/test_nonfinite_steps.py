"""Which steps are known to be bad, of curves as they were sent and rolled up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.runs.curves import Curve
from gradwatch_collector.runs.nonfinite_steps import nonfinite_steps, spans


def curve(steps: Sequence[float], finite: Sequence[float], nonfinite: Sequence[float]) -> Curve:
    unknown = np.zeros(len(steps))
    return Curve(
        1, 0, {}, np.arange(len(steps)), np.array(steps, np.float64), unknown, unknown, unknown,
        np.array(finite, np.float64), np.array(nonfinite, np.float64), 0.0,
    )  # fmt: skip


def test_of_single_steps_those_that_were_not_finite_count_and_what_others_tell() -> None:
    told = curve([3, 4, 5.02], [1, 0, 0], [0, 1, 1])
    assert nonfinite_steps([told, told], {9, 4}).tolist() == [4, 5, 9]
    assert nonfinite_steps([]).tolist() == []


def test_of_steps_that_were_rolled_up_all_count_where_none_was_finite_else_the_last() -> None:
    told = curve([63, 127, 191], [64, 40, 0], [0, 24, 64])
    assert nonfinite_steps([told]).tolist() == list(range(127, 192))


@pytest.mark.parametrize("step", [math.nan, math.inf, 1e300])
def test_steps_that_are_none_are_left_out(step: float) -> None:
    assert nonfinite_steps([curve([step], [0], [1])], [2**62]).tolist() == []


@given(st.sets(st.integers(-100, 100)), st.integers(1, 30))
def test_spans_hold_every_step_and_are_as_tight_as_their_number_allows(steps: set[int], most: int) -> None:
    found = spans(np.array(sorted(steps), np.int64), most)
    assert len(found) <= most
    covered = {step for first, last in found for step in range(first, last + 1)}
    assert steps <= covered
    assert {end for span in found for end in span} <= steps
    between = [later[0] - earlier[1] for earlier, later in pairwise(found)]
    assert min(between, default=2) > 1
    if len(found) < most:
        assert covered == steps
