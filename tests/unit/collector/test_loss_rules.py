"""Rules about the loss tell a run that goes wrong from one that warms up, converges, or plays a game."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import levels
from gradwatch_collector.findings.rules import divergence, overfitting, plateau, slow_convergence
from gradwatch_collector.findings.run_view import Doubles, Levels, Number, RunView
from tests.batches import START, at
from tests.run_views import RUNNING, number, view


def chance(count: int, deviation: float = 0.05) -> Doubles:
    """Noise of a batch's loss."""
    noise: Doubles = np.random.default_rng(count).normal(0, deviation, count)
    return noise


def falling(steps: int, *, start: float = 2.3, end: float = 0.1, pace: float = 60.0) -> Doubles:
    """A loss that comes down as losses do."""
    return end + (start - end) * np.exp(-np.arange(steps) / pace) + chance(steps)


def of_loss(values: Doubles, *others: Doubles, logged: dict[str, Sequence[float]] | None = None) -> RunView:
    """A run with a loss for each optimizer; what is logged comes every 50 steps."""
    losses = [number(each, OPTIMIZER=index) for index, each in enumerate((values, *others))]
    told = [number(each, every=50, METRIC_NAME=name) for name, each in (logged or {}).items()]
    return view({c.LOSS: losses, c.LOGGED: told}, seconds=len(values))


def at_any_moment(values: Doubles) -> list[RunView]:
    return [of_loss(values[:upto]) for upto in range(10, len(values), 10)]


# --- divergence -----------------------------------------------------------------------------------------


def diverged(told: RunView) -> bool:
    return divergence.detect(told, divergence.Parameters()) is not None


def test_a_loss_that_rises_for_good_diverges() -> None:
    assert diverged(of_loss(np.concatenate([falling(300), 1.5 + chance(50)])))


def test_a_loss_that_rises_for_a_few_steps_does_not() -> None:
    values = falling(600)
    values[300:315] = 50.0
    assert not any(map(diverged, at_any_moment(values)))


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_no_moment_of_a_healthy_run_is_divergence(noise: float) -> None:
    values = falling(2_000) + chance(2_000, noise) * falling(2_000)
    assert not any(map(diverged, at_any_moment(values)))


def test_a_small_hump_of_warm_up_is_no_divergence() -> None:
    values = np.concatenate([np.linspace(2.3, 2.7, 60), falling(300, start=2.7)])
    assert not any(map(diverged, at_any_moment(values)))


def test_a_learning_rate_that_starts_anew_lifts_the_loss_for_a_while_and_is_no_divergence() -> None:
    values = np.concatenate([falling(500), falling(500, start=0.4)])
    assert not any(map(diverged, at_any_moment(values)))


def test_a_loss_that_came_back_has_not_diverged_for_good() -> None:
    jump = np.concatenate([falling(300, end=0.02), falling(300, end=0.02)])
    assert diverged(of_loss(jump[:345]))
    assert not diverged(of_loss(jump))


def test_a_loss_that_becomes_nan_is_not_this_rules() -> None:
    assert not diverged(of_loss(np.concatenate([falling(300), np.full(50, math.nan)])))


def test_rivals_losses_may_rise() -> None:
    critic, generator = falling(400, start=1.4, end=0.5), 0.7 + np.linspace(0, 1.5, 400) + chance(400)
    assert not diverged(of_loss(critic, generator))
    assert diverged(of_loss(np.concatenate([critic, np.full(50, 80.0)]), generator))


def test_a_divergence_tells_where_it_came_from_and_when() -> None:
    loss = np.concatenate([np.full(100, 2.0), np.full(200, 0.5), np.full(45, 3.0)])
    found = divergence.detect(of_loss(loss), divergence.Parameters())
    assert found is not None
    assert (found.step, found.since) == (300, at(301))
    assert found.evidence == {
        "loss": 3.0, "highest_loss": 3.0, "lowest_loss": 0.5, "loss_at_start": 2.0,
    }  # fmt: skip


# --- plateau --------------------------------------------------------------------------------------------


def flat(told: RunView) -> bool:
    return plateau.detect(told, plateau.Parameters()) is not None


def test_a_loss_that_stays_where_it_began_is_a_plateau() -> None:
    assert flat(of_loss(2.3 + chance(400)))
    assert flat(of_loss(2.3 - np.linspace(0, 0.03, 5_000) + chance(5_000)))


def test_no_moment_of_a_run_that_converges_is_a_plateau() -> None:
    assert not any(map(flat, at_any_moment(falling(3_000))))


def test_the_first_steps_are_none() -> None:
    assert not flat(of_loss(2.3 + chance(60)))


def test_a_learning_rate_that_still_warms_up_is_waited_for() -> None:
    loss = {c.LOSS: [number(2.3 + chance(400))]}
    assert not flat(view({**loss, c.LEARNING_RATE: [number(np.linspace(0, 1e-4, 400))]}))
    assert flat(view({**loss, c.LEARNING_RATE: [number(np.minimum(np.linspace(0, 1e-3, 400), 1e-4))]}))


def test_a_run_that_goes_on_from_a_checkpoint_began_elsewhere() -> None:
    assert not flat(view({c.LOSS: [number(0.1 + chance(400, 0.01))], c.STEP_INDEX: [number(range(900, 1300))]}))


def test_what_rivals_lose_to_each_other_is_none() -> None:
    assert not flat(of_loss(0.7 + chance(400), 0.7 + chance(400)))


def test_a_loss_below_zero_and_one_of_chance_are_none() -> None:
    assert not flat(of_loss(-0.5 + chance(400)))
    assert not flat(of_loss(np.abs(chance(400, 2.0)) + 0.01))


@pytest.mark.parametrize("name", ["mean_return", "val/accuracy", "eval_reward"])
def test_a_model_that_gets_better_learns_whatever_its_loss_says(name: str) -> None:
    loss = 2.3 + chance(400)
    assert not flat(of_loss(loss, logged={name: [10, 14, 20, 30, 60]}))
    assert flat(of_loss(loss, logged={name: [10, 10.1, 10, 9.9, 10]}))
    assert flat(of_loss(loss, logged={"latest_epoch": [0, 1, 2, 3, 4]}))


# --- slow_convergence -----------------------------------------------------------------------------------


def precedent(values: Doubles) -> Levels:
    known = levels(number(values).course)
    return replace(known, times=known.times - START)


def slow(values: Doubles, others: Sequence[Levels], **rest: Any) -> bool:
    told = view({c.LOSS: [number(values)]}, precedents=others, **rest)
    return slow_convergence.detect(told, slow_convergence.Parameters()) is not None


GOOD = [precedent(falling(600, pace=pace)) for pace in (50, 60, 70)]


def test_a_run_that_is_far_behind_those_before_it_is_slow() -> None:
    assert slow(falling(300, pace=1_000), GOOD)
    assert slow(falling(300, end=1.5), GOOD)


def test_no_moment_of_a_run_like_those_before_it_is_slow() -> None:
    values = falling(700, pace=65)
    assert not any(slow(values[:upto], GOOD) for upto in range(10, 700, 10))


def test_one_run_before_it_is_no_measure() -> None:
    assert not slow(falling(300, pace=1_000), GOOD[:1])


def test_small_batches_need_more_steps_and_no_more_time() -> None:
    quick = [replace(each, times=each.times * 20) for each in GOOD]
    assert not slow(falling(200, pace=1_000), quick)


@pytest.mark.parametrize(
    ("seconds", "reached", "expected"), [(85, None, False), (95, None, True), (95, 50, False)]
)
def test_a_target_that_is_about_to_be_missed_is_slow(
    seconds: float, reached: float | None, expected: bool
) -> None:
    run = replace(
        RUNNING,
        target="val_loss<=0.5",
        deadline_seconds=100.0,
        target_reached_at=None if reached is None else at(reached),
    )
    found = slow_convergence.detect(view(run=run, seconds=seconds), slow_convergence.Parameters())
    assert (found is not None) is expected
    frozen = replace(run, deadline_seconds=None, baseline=100 * 10**9)
    found = slow_convergence.detect(view(run=frozen, seconds=seconds), slow_convergence.Parameters())
    assert (found is not None) is expected


# --- overfitting ----------------------------------------------------------------------------------------


def overfitted(training: Doubles, held_out: Sequence[float], name: str = "val_loss") -> bool:
    told = of_loss(training, logged={name: held_out})
    return overfitting.detect(told, overfitting.Parameters()) is not None


RISING = [2.0, 1.0, 0.8, 0.7, 0.8, 0.9, 1.0, 1.1]


@pytest.mark.parametrize("name", ["val_loss", "eval/loss", "loss/validation", "test_loss"])
def test_what_is_held_out_gets_worse_while_the_rest_gets_better(name: str) -> None:
    assert overfitted(falling(400), RISING, name)


def test_both_may_get_worse_or_better_together() -> None:
    assert not overfitted(falling(400), np.linspace(2, 0.5, 8).tolist())
    assert not overfitted(np.concatenate([falling(200), np.linspace(0.2, 2.5, 200)]), RISING)


def test_one_bad_evaluation_is_none() -> None:
    assert not overfitted(falling(400), [2.0, 1.0, 0.8, 0.7, 1.5, 0.7, 0.69])
    assert not overfitted(falling(400), [2.0, 1.0, 0.8, 0.7, 0.7, 0.7, 1.5])


def test_the_step_with_the_best_model_is_named() -> None:
    found = overfitting.detect(of_loss(falling(400), logged={"val_loss": RISING}), overfitting.Parameters())
    assert found is not None
    assert (found.step, found.since) == (199, at(200))
    assert found.evidence["lowest_held_out_loss"] == 0.7


# --- all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_what_a_loss_is_measured_in_does_not_matter(unit: float) -> None:
    ill = np.concatenate([falling(300), 1.5 + chance(50)])
    assert diverged(of_loss(unit * ill))
    assert flat(of_loss(unit * (2.3 + chance(400))))
    assert not flat(of_loss(unit * falling(400)))
    others = [replace(each, values=unit * each.values) for each in GOOD]
    assert slow(unit * falling(300, pace=1_000), others)
    assert overfitted(unit * falling(400), [unit * each for each in RISING])


def test_ranks_tell_the_same_loss_and_are_no_optimizers() -> None:
    told: list[Number] = [number(2.3 + chance(400), rank=rank) for rank in range(2)]
    assert flat(view({c.LOSS: told}))
