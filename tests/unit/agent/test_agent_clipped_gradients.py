"""What was read at clipping is told of the gradients that were clipped, and of no others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter

both = pytest.mark.parametrize("every", [1, 1000])


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def dense_norm(model: nn.Module) -> float:
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )


@both
def test_gradients_put_in_the_place_of_clipped_ones_have_a_norm_of_their_own(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    truth = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).mean().backward()
            clip_grad_norm_(model.parameters(), 0.1)
            for parameter in model.parameters():
                parameter.grad = parameter.grad + 30.0
            truth.append(dense_norm(model))
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth if every == 1 else truth[:1])
    assert exporter.values(names.CLIP_RATIO) == []


def _with_a_gradient(_model: nn.Module, loss: Tensor) -> None:
    loss.backward(torch.tensor(1.0))


def _by_hand(model: nn.Module, loss: Tensor) -> None:
    parameters = list(model.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad


@both
@pytest.mark.parametrize("backward", [_with_a_gradient, _by_hand])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_clipped_batch_that_is_left_out_tells_nothing_of_the_next_where_no_loss_is_seen(
    exporter: InMemoryExporter, backward: Callable[[nn.Module, Tensor], None], every: int, set_to_none: bool
) -> None:
    model, optimizer = network()
    truth = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for batch in range(8):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, model(torch.randn(5, 4)).mean() * (1e4 if batch == 4 else 1.0))
            norm = dense_norm(model)
            if clip_grad_norm_(model.parameters(), 0.5) < 1e3:
                truth.append(norm)
                optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)
    assert exporter.values(names.CLIP_RATIO) == pytest.approx([min(1.0, 0.5 / n) for n in truth], rel=1e-4)


@both
def test_a_discriminator_that_leaves_out_steps_tells_each_steps_own_clipping(
    exporter: InMemoryExporter, every: int
) -> None:
    generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (discriminator, generator)]
    truth = []
    with gradwatch.watch([discriminator, generator], optimizers, exporter=exporter, every=every):
        for step in range(8):
            optimizers[0].zero_grad()
            (discriminator(generator(torch.randn(4, 2)).detach()).mean() * (step + 1)).backward()
            norm = dense_norm(discriminator)
            clip_grad_norm_(discriminator.parameters(), 1.0)
            if step % 2 == 0:
                truth.append(norm)
                optimizers[0].step()
            optimizers[1].zero_grad()
            discriminator(generator(torch.randn(4, 2))).mean().backward()
            optimizers[1].step()
    told = [p.value for p in exporter.points(names.GRADIENT_NORM, **{names.OPTIMIZER: 0})]
    ratios = [p.value for p in exporter.points(names.CLIP_RATIO, **{names.OPTIMIZER: 0})]
    assert told == pytest.approx(truth, rel=1e-5)
    assert ratios == pytest.approx([min(1.0, 1.0 / norm) for norm in truth], rel=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_nan_that_comes_into_gradients_after_clipping_is_told_at_its_own_step(
    exporter: InMemoryExporter, name: str
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for step in range(8):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            clip_grad_norm_(model.parameters(), 9.0)
            if step == 6:
                model.get_parameter(name).grad.view(-1)[0] = math.nan
            optimizer.step()
    event = exporter.find_events(names.NONFINITE_STEP.name)[0]
    assert event.attributes[names.STEP] == 6
    assert event.attributes.get(names.BORN_IN) != "parameters"


@both
def test_noise_on_clipped_gradients_leaves_the_norm_from_before_clipping(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    truth = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            truth.append(dense_norm(model))
            clip_grad_norm_(model.parameters(), 0.1)
            for parameter in model.parameters():
                parameter.grad.add_(torch.randn_like(parameter))
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)


@both
def test_where_every_micro_batch_is_clipped_the_last_clipping_counts(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    truth = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(3):
                (10 * model(torch.randn(5, 4))).square().mean().backward()
                norm = dense_norm(model)
                clip_grad_norm_(model.parameters(), 1.0)
            truth.append(norm)
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)
    assert exporter.values(names.CLIP_RATIO) == pytest.approx([1.0 / norm for norm in truth], rel=1e-5)


@both
def test_norms_are_exact_where_torchs_own_total_overflows(exporter: InMemoryExporter, every: int) -> None:
    """Torch divides by infinity then, and leaves zeros."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    truth, layers = [], []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.randn(3, 4)).mean() * 1e25).backward()
            truth.append(dense_norm(model))
            layers.append(float(model.weight.grad.double().norm()))
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)
    assert exporter.values(names.CLIP_RATIO) == [0.0] * 4
    (weight,) = [
        each
        for each in exporter.histograms(names.LAYER_GRADIENT_NORM)
        if each.attributes[names.LAYER_NAME] == "weight"
    ]
    assert (weight.minimum, weight.maximum) == pytest.approx((min(layers), max(layers)), rel=1e-5)
    assert exporter.find_events(names.NONFINITE_STEP.name) == []
