"""Every family learns: a healthy run that did not would teach detectors that nothing is wrong with that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as c
from gym.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_rank")
# What must fall, or rise where it is a return; and in how many steps it has.
MEASURES = {"gan": ("sample_distance", 60, -1), "actor_critic": ("mean_return", 60, +1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_within_a_few_steps(family: str, play: Callable[..., Any]) -> None:
    measure, steps, direction = MEASURES.get(family, ("val_loss", 24, -1))
    played = play(None, family=family, steps=steps)

    course = [point.value for point in played.exporter.points(c.LOGGED, **{c.METRIC_NAME: measure})]

    assert len(course) == steps // 6
    assert direction * (course[-1] - course[0]) > 0.05 * abs(course[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_saves_checkpoints_and_ends_well(family: str, play: Callable[..., Any]) -> None:
    played = play(None, family=family)

    assert len(played.exporter.find_events(c.CHECKPOINT_SAVED.name)) == 6
    assert not played.exporter.find_events(c.NONFINITE_STEP.name)
    assert not (played.folder / "injected.json").exists()


def test_learning_rates_fall_over_the_run(play: Callable[..., Any]) -> None:
    rates = play(None).exporter.values(c.LEARNING_RATE)

    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.15 * rates[0]


def test_the_same_run_is_the_same_each_time(play: Callable[..., Any], tmp_path: Path) -> None:
    assert play(None).exporter.values(c.LOSS) == play(None).exporter.values(c.LOSS)
