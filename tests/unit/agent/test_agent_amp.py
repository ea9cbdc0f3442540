"""Mixed precision: what the scaler did is told as what it is, and never as a fault of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent import training_loops as loops

Watching = Callable[..., Any]

SKIPPING = (loops.scaled_and_skipped, loops.scaled_fused_and_skipped, loops.scaled_clipped_and_skipped)
SCALED = (loops.scaled, loops.scaled_fused, loops.scaled_and_clipped, loops.scaled_fused_and_clipped, *SKIPPING)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("loop", SCALED, ids=lambda loop: loop.__name__)
def test_the_scale_of_every_step_is_told(
    watching: Watching, exporter: InMemoryExporter, loop: loops.Loop, every: int
) -> None:
    truth = loops.Truth()
    loop(lambda *objects: watching(*objects, every=every), truth)
    assert len(set(truth.scales)) > 1
    assert exporter.values(names.LOSS_SCALE) == truth.scales


@pytest.mark.parametrize(
    "loop",
    [
        loops.scaled_and_clipped_before_unscaling, loops.scaled_fused_and_clipped_before_unscaling,
        loops.scaled_clipped_and_then_unscaled, loops.scaled_fused_clipped_and_then_unscaled,
    ],
    ids=lambda loop: loop.__name__,
)  # fmt: skip
def test_norms_that_were_clipped_while_scaled_are_told_unscaled(
    watching: Watching, exporter: InMemoryExporter, loop: loops.Loop
) -> None:
    """Of steps that are not observed too."""
    truth = loops.Truth()
    loop(lambda *objects: watching(*objects, every=100), truth)
    expected = [math.hypot(*step.norms.values()) for step in truth.steps[0] if step.norms is not None]
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("loop", SKIPPING, ids=lambda loop: loop.__name__)
def test_a_skipped_step_is_an_overflow_that_passes_and_no_nan(
    watching: Watching, exporter: InMemoryExporter, loop: loops.Loop, every: int
) -> None:
    loop(lambda *objects: watching(*objects, every=every), loops.Truth())
    assert sum(exporter.values(names.SKIPPED_STEPS)) == 2
    assert sum(exporter.values(names.NONFINITE)) == 0
    assert exporter.find_events(names.NONFINITE_STEP.name) == []
    assert all(math.isfinite(norm) for norm in exporter.values(names.GRADIENT_NORM))
    assert exporter.values(names.STEP_INDEX) == list(range(loops.STEPS))


def test_the_counter_of_skipped_steps_is_there_before_the_first(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    loops.scaled(watching, loops.Truth())
    assert exporter.values(names.SKIPPED_STEPS) == [0]


def test_without_a_scaler_nothing_is_said_of_scales(watching: Watching, exporter: InMemoryExporter) -> None:
    loops.bfloat16_autocast(watching, loops.Truth())
    assert exporter.values(names.LOSS_SCALE) == []
    assert exporter.values(names.SKIPPED_STEPS) == []


def test_a_scaler_that_is_switched_off_scales_nothing(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watching(model, optimizer):
        scaler.scale(model(torch.randn(5, 4)).square().mean()).backward()
        truth = math.hypot(*loops.norms_of(model).values())
        scaler.step(optimizer)
        scaler.update()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx([truth])
    assert exporter.values(names.LOSS_SCALE) == []


def test_a_first_step_that_is_skipped_counts_for_an_optimizer_nobody_named(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with watching(model):
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(1e3 * model(torch.randn(5, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert sum(exporter.values(names.SKIPPED_STEPS)) == 2
    assert exporter.values(names.LOSS_SCALE) == [2.0**127, 2.0**126]


def test_one_scaler_over_two_optimizers_tells_both(watching: Watching, exporter: InMemoryExporter) -> None:
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watching({"first": first, "second": second}, optimizers):
        x = torch.randn(5, 4)
        scaler.scale(first(x).square().mean() + second(x).square().mean()).backward()
        truth = [math.hypot(*loops.norms_of(net).values()) / 64.0 for net in (first, second)]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth)
    assert exporter.values(names.LOSS_SCALE) == [64.0, 64.0]


Combine = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    "combine",
    [
        lambda scale, a, b: scale(a) + scale(b),
        lambda scale, a, b: sum([scale(a), scale(b)]),
        lambda scale, a, b: scale(a + b) / 4,
        lambda scale, a, b: scale(a).add_(scale(b)),
    ],
    ids=["added", "summed", "divided", "added in place"],
)
def test_what_is_made_of_scaled_losses_is_not_told_as_a_loss(
    watching: Watching, exporter: InMemoryExporter, combine: Combine
) -> None:
    """Scaled by so much it would be wrong, and no loss at all is better."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = []
    with watching(model, optimizer):
        for step in range(4):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            if step < 3:
                combine(scaler.scale, out.square().mean(), out.abs().mean()).backward()
            else:  # what was scaled before does not keep a loss from being told
                loss = out.square().mean()
                scaler.scale(loss).backward()
                plain.append(loss.item())
            scaler.step(optimizer)
            scaler.update()
    assert exporter.values(names.LOSS) == pytest.approx(plain)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2, 3]


def test_a_loss_that_is_not_scaled_is_told_beside_those_that_are(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    told = []
    with watching(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            scaled = scaler.scale(model(torch.randn(8, 4)).square().mean())
            plain = model(torch.randn(8, 4)).square().mean()
            plain.backward()
            scaled.backward()
            told.append(plain.item() + scaled.item() / 4)
            scaler.step(optimizer)
            scaler.update()
    assert exporter.values(names.LOSS) == pytest.approx(told)
