"""Batches whose step does not come, and gradients that are put together from several backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.known_losses import BAD, both, exactly, network


def _clips(model: nn.Module, _loss: Tensor, _watch: gradwatch.Watch) -> bool:
    return bool(torch.isfinite(clip_grad_norm_(model.parameters(), 1.0)))


def _clips_through_the_watch(_model: nn.Module, _loss: Tensor, watch: gradwatch.Watch) -> bool:
    return bool(torch.isfinite(watch.clip_grad_norm_(1.0)))


def _looks_at_the_loss(_model: nn.Module, loss: Tensor, _watch: gradwatch.Watch) -> bool:
    return bool(torch.isfinite(loss))


@both
@pytest.mark.parametrize("is_good", [_clips, _clips_through_the_watch, _looks_at_the_loss])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_nan_whose_step_is_left_out_is_told_once_at_the_step_it_would_have_been(
    exporter: InMemoryExporter,
    tmp_path: Path,
    is_good: Callable[[nn.Module, Tensor, gradwatch.Watch], bool],
    every: int,
    set_to_none: bool,
) -> None:
    model, optimizer = network()
    losses = []
    with gradwatch.watch(
        model, optimizer, exporter=exporter, every=every, capture="on_nonfinite", directory=tmp_path
    ) as watch:
        for batch in range(9):
            x = torch.randn(5, 4)
            if batch == BAD:
                x[0, 0] = math.nan
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = model(x).square().mean()
            loss.backward()
            if is_good(model, loss, watch):
                losses.append(loss.item())
                optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == BAD
    assert math.isnan(float(str(event.attributes[names.LOSS_VALUE])))
    assert exporter.values(names.LOSS) == losses
    assert len(list(tmp_path.glob("**/bundle*.pt"))) == 1


@both
def test_bad_gradients_of_a_good_loss_that_are_clipped_and_left_out_name_their_layer(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for batch in range(9):
            optimizer.zero_grad()
            exactly(model, 1.0).backward()
            if batch == BAD:
                model.weight.grad[0, 0] = math.inf
            if torch.isfinite(clip_grad_norm_(model.parameters(), 1.0)):
                optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == BAD
    assert event.attributes[names.LAYER_NAME] == "weight"


def test_a_nan_in_the_last_batch_is_told_once_when_the_run_ends(exporter: InMemoryExporter) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for batch in range(BAD + 1):
            optimizer.zero_grad()
            exactly(model, math.nan if batch == BAD else 1.0).backward()
            if torch.isfinite(clip_grad_norm_(model.parameters(), 1.0)):
                optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == BAD


@both
def test_an_overflow_that_is_clipped_before_the_scaler_judges_it_is_no_finding(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for batch in range(6):
            optimizer.zero_grad()
            scaler.scale(exactly(model, 1.0)).backward()
            if batch in {0, BAD}:
                model.weight.grad[0, 0] = math.inf
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


@both
def test_a_discriminator_whose_step_is_left_out_adds_nothing_to_the_generators_loss(
    exporter: InMemoryExporter, every: int
) -> None:
    generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (discriminator, generator)]
    with gradwatch.watch([discriminator, generator], optimizers, exporter=exporter, every=every):
        for step in range(6):
            optimizers[0].zero_grad()
            (discriminator(generator(torch.randn(4, 2)).detach()).mean() * 1e-9 + 100).backward()
            if step % 2 == 0:
                optimizers[0].step()
            optimizers[1].zero_grad()
            (discriminator(generator(torch.randn(4, 2))).mean() * 1e-9 + 1).backward()
            optimizers[1].step()
    told = [[p.value for p in exporter.points(names.LOSS, **{names.OPTIMIZER: index})] for index in (0, 1)]
    assert told == [[100.0] * 3, [1.0] * 6]


def _saturated(model: nn.Module, _optimizer: torch.optim.Optimizer) -> None:
    """The gradients of the first micro-batch are exactly zero."""
    model(torch.randn(5, 4)).mean().clamp(min=100.0).backward()
    exactly(model, 1.0).backward()


def _surgery(model: nn.Module, optimizer: torch.optim.Optimizer, first: float = 100.0) -> None:
    """Two tasks' gradients, put together afterwards."""
    exactly(model, first).backward()
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    exactly(model, 1.0).backward()
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        parameter.grad += grad


def _per_sample(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every sample's gradients are clipped and summed by hand."""
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for value in (1.0, 40.0, 60.0):
        optimizer.zero_grad()
        exactly(model, value).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += parameter.grad
    for total, parameter in zip(sums, model.parameters(), strict=True):
        parameter.grad = total


@both
@pytest.mark.parametrize("passes", [_saturated, _surgery, _per_sample])
def test_losses_count_whose_gradients_are_in_the_step(
    exporter: InMemoryExporter, passes: Callable[[nn.Module, torch.optim.Optimizer], None], every: int
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(4):
            optimizer.zero_grad()
            passes(model, optimizer)
            optimizer.step()
    assert exporter.values(names.LOSS) == [101.0] * 4


def test_a_nan_of_the_first_of_two_tasks_is_told_at_its_step(exporter: InMemoryExporter) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for step in range(BAD + 1):
            optimizer.zero_grad()
            _surgery(model, optimizer, math.nan if step == BAD else 100.0)
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert (event.attributes[names.STEP], event.attributes[names.BORN_IN]) == (BAD, "loss")


@both
def test_micro_batches_of_an_optimizer_over_copies_in_full_precision_are_summed(
    exporter: InMemoryExporter, every: int
) -> None:
    model = nn.Linear(4, 1)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    optimizer = torch.optim.SGD(copies, lr=1e-3)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(4):
                exactly(model, 10.0).backward()
            for parameter, copied in zip(model.parameters(), copies, strict=True):
                copied.grad, parameter.grad = parameter.grad, None
            optimizer.step()
    assert exporter.values(names.LOSS) == [40.0] * 4


def test_a_layer_that_no_optimizer_steps_keeps_no_batch_that_was_left_out(exporter: InMemoryExporter) -> None:
    """As a backbone that nobody has frozen: its gradients are never cleared."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for batch in range(6):
            optimizer.zero_grad()
            exactly(model, float(batch)).backward()
            if batch != BAD:
                optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0, 5.0], abs=1e-6)


@both
def test_every_bad_batch_of_a_row_that_is_left_out_is_counted(exporter: InMemoryExporter, every: int) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for batch in range(9):
            optimizer.zero_grad()
            exactly(model, math.nan if 4 <= batch < 7 else 1.0).backward()
            if torch.isfinite(clip_grad_norm_(model.parameters(), 1.0)):
                optimizer.step()
    assert sum(exporter.values(names.NONFINITE)) == 3


@pytest.mark.parametrize(
    ("kind", "stays"), [(torch.optim.SGD, True), (torch.optim.SGD, False), (torch.optim.LBFGS, True)]
)
def test_a_closure_that_raises_adds_nothing_to_the_next_step_with_a_closure_or_without(
    exporter: InMemoryExporter, kind: type[torch.optim.SGD | torch.optim.LBFGS], stays: bool
) -> None:
    model = nn.Linear(4, 1)
    optimizer = kind(model.parameters(), lr=1e-3)
    losses = []

    def evaluate(value: float) -> Tensor:
        optimizer.zero_grad()
        loss = exactly(model, value)
        loss.backward()
        return loss

    def fail() -> float:
        evaluate(50.0)
        raise KeyError

    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for step in range(6):
            if step == 3:
                with pytest.raises(KeyError):
                    optimizer.step(fail)
            elif step < 3 or stays:
                losses.append(optimizer.step(lambda value=step: evaluate(value)).item())
            else:
                losses.append(evaluate(step).item())
                optimizer.step()  # type: ignore[call-arg] # never of LBFGS
    assert exporter.values(names.LOSS) == pytest.approx(losses, abs=1e-6)
