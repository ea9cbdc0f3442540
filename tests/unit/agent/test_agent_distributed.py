"""Data parallelism over two real processes: the mean gradient once, and each rank's own beside it."""

from __future__ import annotations

import math

import pytest

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.distributed_loops import DATA_PARALLEL, GUILTY, STEPS
from tests.unit.agent.ranks import Told, on_ranks

PLAIN = [loop for loop in DATA_PARALLEL if loop not in {"ddp_thinned", "ddp_beside_a_plain_model"}]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Told]]:
    return on_ranks(DATA_PARALLEL, tmp_path_factory.mktemp("data-parallel"), {"ddp_thinned": {"every": None}})


def layer_sums(exporter: InMemoryExporter) -> dict[str, float]:
    return {str(p.attributes[names.LAYER_NAME]): p.sum for p in exporter.histograms(names.LAYER_GRADIENT_NORM)}


@pytest.mark.parametrize("loop", PLAIN)
def test_every_rank_reports_the_mean_gradient_once_a_step(told: dict[str, list[Told]], loop: str) -> None:
    for rank in told[loop]:
        totals = [math.hypot(*step.values()) for step in rank.truth.norms]
        assert rank.exporter.values(names.GRADIENT_NORM) == pytest.approx(totals, rel=1e-4)
        sums = {layer: sum(step[layer] for step in rank.truth.norms) for layer in rank.truth.norms[0]}
        assert layer_sums(rank.exporter) == pytest.approx(sums, rel=1e-4)
        assert rank.exporter.values(names.LOSS) == pytest.approx(rank.truth.losses, rel=1e-4)
        assert rank.exporter.values(names.STEP_INDEX) == list(range(STEPS))
    first, second = (rank.exporter.values(names.GRADIENT_NORM) for rank in told[loop])
    assert first == second


@pytest.mark.parametrize("loop", ["ddp", "ddp_accumulating_without_sync", "ddp_scaled", "zero_redundancy"])
def test_each_rank_reports_its_own_gradients_norm_before_they_are_averaged(
    told: dict[str, list[Told]], loop: str
) -> None:
    for rank in told[loop]:
        assert rank.exporter.values(names.LOCAL_GRADIENT_NORM) == pytest.approx(rank.truth.local, rel=1e-4)


def test_the_local_norm_names_the_guilty_rank(told: dict[str, list[Told]]) -> None:
    guilty, step = GUILTY
    at_step = [rank.exporter.values(names.LOCAL_GRADIENT_NORM)[step] for rank in told["ddp"]]
    assert at_step[guilty] > 10 * at_step[1 - guilty]


def test_ranks_with_different_budgets_tell_their_own_norms_of_steps_in_common(
    told: dict[str, list[Told]],
) -> None:
    observed = []
    for rank in told["ddp_thinned"]:
        step_at = {point.time: point.value for point in rank.exporter.points(names.STEP_INDEX)}
        observed.append([step_at[p.time] for p in rank.exporter.points(names.LOCAL_GRADIENT_NORM)])
    assert observed == [[0, 4, 8, 12, 16], [0, 8, 16]]


def test_a_model_that_nobody_averages_has_no_local_norm(told: dict[str, list[Told]]) -> None:
    for rank in told["ddp_beside_a_plain_model"]:
        local = rank.exporter.points(names.LOCAL_GRADIENT_NORM)
        assert [point.attributes[names.OPTIMIZER] for point in local] == [0] * STEPS


def test_every_spawned_rank_watches_for_itself(told: dict[str, list[Told]]) -> None:
    for number, rank in enumerate(told["ddp"]):
        assert rank.exporter.resource[names.RANK] == number
        assert rank.exporter.event_names() == ["training.run.started", "training.run.ended"]


def test_gradients_that_are_averaged_in_place_have_no_local_norm(told: dict[str, list[Told]]) -> None:
    for rank in told["ddp_reducing_in_place"]:
        assert rank.exporter.values(names.LOCAL_GRADIENT_NORM) == []


@pytest.mark.parametrize("loop", DATA_PARALLEL)
def test_weights_are_equal_bit_for_bit(told: dict[str, list[Told]], loop: str) -> None:
    for rank in told[loop]:
        assert rank.bare == rank.watched
