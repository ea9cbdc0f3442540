"""Rules about gradients see what lasts, and pass over a single bad batch, warm-up and what is usual."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import levels
from gradwatch_collector.findings.rules import (
    gradient_explosion,
    loss_scale_collapse,
    noisy_gradients,
    over_clipping,
    stale_gradients,
    vanishing_gradient,
)
from gradwatch_collector.findings.run_view import Doubles, RunView
from tests.batches import at
from tests.run_views import layers, number, view

LAYERS_MEAN = f"{c.LAYER_GRADIENT_NORM.name} mean"
LAYERS_MAX = f"{c.LAYER_GRADIENT_NORM.name} max"


def around(level: float, count: int, *, deviation: float = 0.2) -> Doubles:
    """Positive values, by chance as far from their level as gradient norms usually are."""
    values: Doubles = level * np.exp(np.random.default_rng(count).normal(0, deviation, count))
    return values


def falling(steps: int, start: float = 2.3, end: float = 0.1) -> Doubles:
    """A loss on its way down."""
    return end + (start - end) * np.exp(-np.arange(steps) / (steps / 5)) + around(0.01, steps)


def of_norms(*parts: Doubles | list[float]) -> RunView:
    return view({c.GRADIENT_NORM: [number(np.concatenate(parts))]})


# --- gradient_explosion ---------------------------------------------------------------------------------


def exploded(told: RunView) -> bool:
    return gradient_explosion.detect(told, gradient_explosion.Parameters()) is not None


def test_norms_that_stay_many_times_larger_are_an_explosion() -> None:
    assert exploded(of_norms(around(1, 200), around(50, 10)))


@pytest.mark.parametrize("spikes", [1, 2])
def test_a_spike_among_thousands_is_none(spikes: int) -> None:
    values = around(1, 3_000)
    values[1_500 : 1_500 + spikes] = 1e6
    assert not any(exploded(of_norms(values[:upto])) for upto in range(1_490, 1_600))


def test_norms_seen_in_one_step_of_25_explode_as_well() -> None:
    values = np.concatenate([around(1, 12), around(100, 4)])
    assert exploded(view({c.GRADIENT_NORM: [number(values, every=25)]}))


def test_no_moment_of_a_run_whose_norms_fall_a_hundredfold_with_a_heavy_tail_is_an_explosion() -> None:
    values = np.linspace(0, math.log(100), 600)
    values = np.exp(-values + np.random.default_rng(1).normal(0, 0.6, 600))
    assert not any(exploded(of_norms(values[:upto])) for upto in range(5, 600, 5))


def test_norms_that_are_not_finite_are_not_this_rules() -> None:
    assert not exploded(of_norms(around(1, 200), [math.inf, math.nan] * 5))


def test_an_explosion_names_its_first_step_its_layer_and_what_clipping_left() -> None:
    told = view(
        {
            c.GRADIENT_NORM: [number(np.concatenate([np.ones(200), np.full(10, 40.0)]))],
            c.CLIP_RATIO: [number(np.concatenate([np.ones(200), np.full(10, 0.025)]))],
        },
        seconds=210,
        layers={LAYERS_MAX: [layers({"first": [1, 1, 1, 1, 2], "second": [0.1, 0.1, 0.1, 0.1, 5]})]},
    )
    found = gradient_explosion.detect(told, gradient_explosion.Parameters())
    assert found is not None
    assert (found.step, found.layer, found.since) == (200, "second", at(201))
    assert found.evidence == {
        "norm": 40.0,
        "usual_norm": 1.0,
        "ratio": 40.0,
        "high_norms": 10,
        "layer_ratio": 50.0,
        "clip_ratio": 0.025,
    }


def test_each_optimizer_has_norms_of_its_own() -> None:
    calm, wild = around(1, 210), np.concatenate([around(0.01, 200), around(1, 10)])
    told = [number(values, OPTIMIZER=index) for index, values in enumerate((calm, wild))]
    assert exploded(view({c.GRADIENT_NORM: told}))
    assert not exploded(view({c.GRADIENT_NORM: told[:1]}))


# --- vanishing_gradient ---------------------------------------------------------------------------------

SIGMOIDS = {"0": [1e-7] * 3, "2": [1e-5] * 3, "4": [1e-2] * 3, "6": [1.0] * 3}


def vanished(loss: Doubles, by_layer: dict[str, list[float]]) -> bool:
    told = view({c.LOSS: [number(loss)]}, layers={LAYERS_MEAN: [layers(by_layer)]})
    return vanishing_gradient.detect(told, vanishing_gradient.Parameters()) is not None


def test_layers_that_get_nothing_in_a_run_that_learns_nothing_have_vanishing_gradients() -> None:
    assert vanished(around(2.3, 200, deviation=0.01), SIGMOIDS)


def test_while_the_loss_falls_no_gradient_has_vanished() -> None:
    assert not vanished(falling(200), SIGMOIDS)


def test_layers_of_one_size_have_not_vanished_on_a_plateau() -> None:
    assert not vanished(around(2.3, 200, deviation=0.01), {"0": [1e-6] * 3, "1": [2e-6] * 3})


def test_loras_first_matrices_wait_for_the_second_and_have_not_vanished() -> None:
    loss = around(2.3, 40, deviation=0.01)
    assert not vanished(loss, {"lora_a": [0.0, 0.0], "lora_b": [1.0, 1.0]})
    loss = around(2.3, 200, deviation=0.01)
    assert not vanished(loss, {"lora_a": [0.0, 0.01], "lora_b": [1.0, 1.0]})


def test_the_layer_with_the_smallest_gradient_is_named() -> None:
    told = view({c.LOSS: [number(np.full(200, 2.3))]}, layers={LAYERS_MEAN: [layers(SIGMOIDS, rank=1)]})
    found = vanishing_gradient.detect(told, vanishing_gradient.Parameters())
    assert found is not None
    assert (found.layer, found.rank) == ("0", 1)
    assert found.evidence == {
        "layers": 2, "of_layers": 4, "smallest_ratio": 1e-7, "loss": 2.3, "loss_at_start": 2.3,
    }  # fmt: skip


# --- loss_scale_collapse --------------------------------------------------------------------------------


def collapsed(scales: list[float]) -> bool:
    told = view({c.LOSS_SCALE: [number(scales)]})
    return loss_scale_collapse.detect(told, loss_scale_collapse.Parameters()) is not None


def test_a_scale_that_is_lowered_step_after_step_collapses() -> None:
    assert collapsed([2.0**16] * 100 + [2.0**power for power in range(15, 0, -1)])


def test_a_scale_below_one_has_collapsed() -> None:
    assert collapsed([0.5] * 300)


@pytest.mark.parametrize("halvings", range(9))
def test_a_scaler_that_finds_what_fits_does_not_collapse(halvings: int) -> None:
    assert not collapsed([2.0 ** (16 - min(step, halvings)) for step in range(300)])


def test_a_scale_that_grows_and_is_halved_once_in_a_while_does_not_collapse() -> None:
    assert not collapsed([2.0**15 if step % 20 < 10 else 2.0**16 for step in range(400)])


def test_a_collapse_tells_how_far_and_how_many_steps_were_skipped() -> None:
    told = view(
        {
            c.LOSS_SCALE: [number([1024.0] * 50 + [2.0**power for power in range(9, -4, -1)])],
            c.SKIPPED_STEPS: [number([0, 0, 13], every=20)],
        },
        seconds=63,
    )
    found = loss_scale_collapse.detect(told, loss_scale_collapse.Parameters())
    assert found is not None
    assert (found.step, found.since) == (50, at(51))
    assert found.evidence == {
        "loss_scale": 0.125,
        "highest_loss_scale": 1024.0,
        "times_lowered": 13,
        "in_steps": 63,
        "skipped_steps": 13,
    }


# --- over_clipping, noisy_gradients, stale_gradients ----------------------------------------------------


def clipped(ratios: Doubles) -> bool:
    told = view({c.CLIP_RATIO: [number(ratios)]})
    return over_clipping.detect(told, over_clipping.Parameters()) is not None


def test_cutting_nearly_all_gradients_to_a_small_part_is_over_clipping() -> None:
    assert clipped(np.concatenate([np.ones(100), np.full(60, 0.001)]))


@pytest.mark.parametrize("usual", [0.3, 0.7, 1.0])
def test_clipping_that_leaves_a_good_part_is_not(usual: float) -> None:
    assert not clipped(np.full(500, usual))


def test_a_few_steps_that_are_cut_hard_are_not() -> None:
    assert not clipped(np.where(np.arange(500) % 2 == 0, 0.001, 1.0))
    assert not clipped(np.full(20, 0.001))


def noisy(values: Doubles) -> bool:
    return noisy_gradients.detect(of_norms(values), noisy_gradients.Parameters()) is not None


def test_norms_that_jump_from_step_to_step_are_noisy() -> None:
    assert noisy(around(1, 200, deviation=2.0))


def of_one_loss(values: Doubles) -> bool:
    told = view({c.LOSS: [number(values)]})
    return noisy_gradients.detect(told, noisy_gradients.Parameters()) is not None


def test_a_loss_that_jumps_from_step_to_step_tells_of_them_too_until_it_is_small() -> None:
    assert of_one_loss(2 * around(1, 200, deviation=1.2))
    assert not of_one_loss(falling(200, end=0.5))
    assert not of_one_loss(np.concatenate([np.full(50, 2.3), 0.01 * around(1, 200, deviation=1.2)]))


def test_norms_that_fall_smoothly_by_any_factor_are_not() -> None:
    assert not noisy(np.geomspace(1e3, 1e-6, 200) * around(1, 200))


def noisy_beside(values: Doubles, others: list[Doubles]) -> bool:
    told = view({c.LOSS: [number(values)]}, precedents=[levels(number(each).course) for each in others])
    return noisy_gradients.detect(told, noisy_gradients.Parameters()) is not None


def with_chance(deviation: float, seed: int, steps: int = 250) -> Doubles:
    return falling(steps) + np.random.default_rng(seed).normal(0, deviation, steps)


def test_a_loss_noisier_than_that_of_earlier_runs_where_it_was_as_high_tells_of_noisy_gradients() -> None:
    usual = [with_chance(0.05, seed) for seed in range(3)]
    assert noisy_beside(with_chance(0.15, 9), usual)
    assert not noisy_beside(with_chance(0.05, 9), usual)
    assert not noisy_beside(with_chance(0.15, 9), usual[:2])
    assert not noisy_beside(with_chance(0.15, 9) + 10, usual)


def stale(*by_rank: list[float]) -> int | None:
    """The rank that is accused."""
    told = [number(values, rank=rank, METRIC_NAME="gradient_staleness") for rank, values in enumerate(by_rank)]
    found = stale_gradients.detect(view({c.LOGGED: told}), stale_gradients.Parameters())
    return None if found is None else found.rank


def test_the_rank_with_the_stalest_gradients_is_named() -> None:
    assert stale([0.0] * 50, [12.0] * 50, [8.0] * 50) == 1


def test_gradients_that_are_a_little_late_or_once_in_a_while_are_not_stale() -> None:
    assert stale([2.0] * 50) is None
    assert stale([30.0 if step % 5 == 0 else 1.0 for step in range(50)]) is None
