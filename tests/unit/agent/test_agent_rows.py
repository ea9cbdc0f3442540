"""Every kind of loop, told as the dense computation beside it says, and left with the weights it would have."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.training_loops import ALL, STEPS, TOLD, Loop, Truth, groups_and_a_schedule

Watching = Callable[..., Any]


def named(loop: Loop) -> str:
    return loop.__name__  # type: ignore[attr-defined]


@pytest.mark.parametrize("loop", TOLD, ids=named)
def test_norms_and_losses_are_those_of_the_dense_computation(
    watching: Watching, exporter: InMemoryExporter, loop: Loop
) -> None:
    truth = Truth()
    loop(watching, truth)
    layers: dict[str, float] = {}
    for optimizer, steps in truth.steps.items():
        only = {names.OPTIMIZER: optimizer} if len(truth.steps) > 1 else {}
        norms = [step.norms for step in steps if step.norms is not None]
        told = [point.value for point in exporter.points(names.GRADIENT_NORM, **only)]
        assert told == pytest.approx([math.hypot(*step.values()) for step in norms], rel=1e-5)
        losses = [step.loss for step in steps if step.loss is not None]
        assert [p.value for p in exporter.points(names.LOSS, **only)] == pytest.approx(losses, rel=1e-5)
        for step in norms:
            for layer, norm in step.items():
                layers[layer] = layers.get(layer, 0.0) + norm
    sums: dict[str, float] = {}
    for point in exporter.histograms(names.LAYER_GRADIENT_NORM):
        layer = str(point.attributes[names.LAYER_NAME])
        sums[layer] = sums.get(layer, 0.0) + point.sum
    assert sums == pytest.approx(layers, rel=1e-5)
    assert exporter.values(names.STEP_INDEX) == list(range(len(truth.steps[0])))
    assert exporter.find_events(names.NONFINITE_STEP.name) == []
    assert exporter.find_events(names.INSTRUMENTATION_MISSING.name) == []


def test_every_group_follows_its_schedule(watching: Watching, exporter: InMemoryExporter) -> None:
    groups_and_a_schedule(watching, Truth())
    for group, first in enumerate((0.1, 0.2)):
        rates = [point.value for point in exporter.points(names.LEARNING_RATE, **{names.PARAM_GROUP: group})]
        assert rates == pytest.approx([first * 0.5**step for step in range(STEPS)])


@pytest.mark.parametrize("every", [1, 3, None])
@pytest.mark.parametrize("loop", ALL, ids=named)
def test_weights_are_equal_bit_for_bit(watching: Watching, loop: Loop, every: int | None) -> None:
    finals = []
    for watch in (lambda *_: nullcontext(), lambda *objects: watching(*objects, every=every)):
        torch.manual_seed(1)
        modules = loop(watch, Truth())
        finals.append([tensor.clone() for module in modules for tensor in module.state_dict().values()])
    for bare, watched in zip(*finals, strict=True):
        assert bare.numpy().tobytes() == watched.numpy().tobytes()
