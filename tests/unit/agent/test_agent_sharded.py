"""Sharded models over two real processes: squares of shards add up to the dense model's norm."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import conventions as names
from gradwatch.tensors.sharding import common_stride
from tests.unit.agent.distributed_loops import SHARDED, STEPS
from tests.unit.agent.ranks import Told, on_ranks

WHOLE = ("fsdp", "fsdp_accumulating", "fsdp_clipped", "hybrid_sharded", "mixed", "tensor_parallel")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Told]]:
    return on_ranks(SHARDED, tmp_path_factory.mktemp("sharded"), {"fsdp_thinned": {"every": None}})


def layer_squares(rank: Told) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for point in rank.exporter.points(names.LAYER_GRADIENT_SHARD_SQUARE):
        found.setdefault(str(point.attributes[names.LAYER_NAME]), []).append(float(point.value))
    return found


@pytest.mark.parametrize("loop", WHOLE)
def test_squares_of_shards_add_up_to_the_dense_norm(told: dict[str, list[Told]], loop: str) -> None:
    ranks = told[loop]
    dense = ranks[0].truth.norms
    assert len(dense) == STEPS
    squares = zip(*(rank.exporter.values(names.GRADIENT_SHARD_SQUARE) for rank in ranks), strict=True)
    totals = [math.sqrt(sum(step)) for step in squares]
    assert totals == pytest.approx([math.hypot(*step.values()) for step in dense], rel=1e-4)
    first, second = (layer_squares(rank) for rank in ranks)
    assert first.keys() == second.keys() == dense[0].keys()
    for layer in dense[0]:
        shares = zip(first[layer], second[layer], strict=True)
        norms = [math.sqrt(sum(step)) for step in shares]
        assert norms == pytest.approx([step[layer] for step in dense], rel=1e-4)


@pytest.mark.parametrize("loop", SHARDED)
def test_no_shard_is_reported_as_a_norm(told: dict[str, list[Told]], loop: str) -> None:
    for rank in told[loop]:
        assert rank.exporter.values(names.GRADIENT_NORM) == []
        assert rank.exporter.histograms(names.LAYER_GRADIENT_NORM) == []


@pytest.mark.parametrize("loop", WHOLE)
def test_shares_have_the_time_stamp_of_their_step(told: dict[str, list[Told]], loop: str) -> None:
    for rank in told[loop]:
        times = [point.time for point in rank.exporter.points(names.STEP_INDEX)]
        assert [point.time for point in rank.exporter.points(names.GRADIENT_SHARD_SQUARE)] == times


def test_sums_that_no_rank_has_made_are_told_and_not_guessed(told: dict[str, list[Told]]) -> None:
    for rank in told["sequence_parallel"]:
        (event,) = rank.exporter.find_events(names.INSTRUMENTATION_MISSING.name)
        assert "sums over ranks" in str(event.attributes[names.MISSING_REASON])
        assert rank.exporter.values(names.GRADIENT_SHARD_SQUARE) == []
        assert not any("inner.2" in layer for layer in layer_squares(rank))
    first, second = (layer_squares(rank)["inner.0.weight"] for rank in told["sequence_parallel"])
    norms = [math.sqrt(a + b) for a, b in zip(first, second, strict=True)]
    dense = [step["inner.0.weight"] for step in told["sequence_parallel"][0].truth.norms]
    # What a layer norm lets through is a small difference of large numbers.
    assert norms == pytest.approx(dense, rel=2e-3)


def test_flat_parameters_are_told_and_not_taken_for_whole_ones(told: dict[str, list[Told]]) -> None:
    for rank in told["flattened"]:
        (event,) = rank.exporter.find_events(names.INSTRUMENTATION_MISSING.name)
        assert "FullyShardedDataParallel" in str(event.attributes[names.MISSING_REASON])
        assert rank.exporter.values(names.STEP_INDEX) == list(range(STEPS))
        assert rank.exporter.values(names.LOSS) == pytest.approx(rank.truth.losses, rel=1e-4)


def test_ranks_with_different_budgets_observe_steps_in_common(told: dict[str, list[Told]]) -> None:
    observed = []
    for rank in told["fsdp_thinned"]:
        step_at = {point.time: point.value for point in rank.exporter.points(names.STEP_INDEX)}
        observed.append([step_at[p.time] for p in rank.exporter.points(names.GRADIENT_SHARD_SQUARE)])
    assert observed == [[0, 4, 8, 12, 16], [0, 8, 16]]


def test_a_nan_in_a_shard_is_found_by_the_rank_that_holds_it(told: dict[str, list[Told]]) -> None:
    innocent, guilty = told["fsdp_poisoned"]
    assert innocent.exporter.find_events(names.NONFINITE_STEP.name) == []
    (event,) = guilty.exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == STEPS - 1
    assert event.attributes[names.NONFINITE_ELEMENTS] == 1


@pytest.mark.parametrize("loop", SHARDED)
def test_weights_are_equal_bit_for_bit(told: dict[str, list[Told]], loop: str) -> None:
    for rank in told[loop]:
        assert rank.bare == rank.watched


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_of_two_strides_one_divides_the_other(first: int, second: int) -> None:
    rare, often = common_stride(max(first, second)), common_stride(min(first, second))
    assert rare % often == 0
    assert max(first, second) <= rare < 2 * max(first, second)
