"""Loops whose steps no optimizer hook tells of, or many at once: by hand, and inside backward."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import conventions as names
from gradwatch.loop import observer as observing
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.poison = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(torch.tanh(self.stem(x)))
        if self.poison:
            hidden.register_hook(lambda grad: grad * math.nan)
        out: torch.Tensor = self.head(torch.tanh(hidden))
        return out


def step_in_backward(model: nn.Module, **options: Any) -> dict[Any, torch.optim.Optimizer]:
    optimizers: dict[Any, torch.optim.Optimizer] = {
        parameter: torch.optim.SGD([parameter], lr=0.1, **options) for parameter in model.parameters()
    }

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    return optimizers


def train_by_hand(model: Net, bad_step: int) -> None:
    for step in range(4):
        model.poison = step == bad_step
        model(torch.randn(5, 4)).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None


def train_in_backward(model: Net, bad_step: int) -> None:
    for step in range(4):
        model.poison = step == bad_step
        model(torch.randn(5, 4)).square().mean().backward()


@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("train", [train_by_hand, train_in_backward])
def test_a_nan_of_backward_is_found_at_its_step_and_layer(
    watching: Watching, exporter: InMemoryExporter, train: Callable[[Net, int], None], bad_step: int
) -> None:
    model = Net()
    if train is train_in_backward:
        step_in_backward(model)
    with watching(model):
        train(model, bad_step)
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    assert first[names.STEP] == bad_step
    assert str(first[names.LAYER_NAME]).startswith("middle.")
    assert first[names.BORN_IN] == "backward"
    assert sum(exporter.values(names.NONFINITE)) == 4 - bad_step


def test_optimizers_that_step_inside_backward_are_one(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizers = list(step_in_backward(model).values())
    with watching(model, optimizers):
        for step in range(3):
            if step == 2:
                optimizers[0].param_groups[0]["lr"] = 0.5
            model(torch.randn(5, 4)).square().mean().backward()
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]
    assert all(names.OPTIMIZER not in p.attributes for p in exporter.points(names.GRADIENT_NORM))
    assert len(exporter.values(names.LEARNING_RATE)) == 1 + 1 + 2


def test_a_thinned_loop_inside_backward_reads_every_nth(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizers = step_in_backward(model)
    with watching(model, list(optimizers.values()), every=3):
        for _ in range(7):
            model(torch.randn(5, 4)).square().mean().backward()
    assert len(exporter.values(names.GRADIENT_NORM)) == 3
    assert len(exporter.values(names.LOSS)) == 7


def test_an_optimizer_that_steps_after_backward_stays_apart(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model, tail = Net(), nn.Linear(2, 1)
    inside = list(step_in_backward(model).values())
    after = torch.optim.SGD(tail.parameters(), lr=0.1)
    totals = []
    with watching({"model": model, "tail": tail}, [*inside, after]):
        for _ in range(3):
            after.zero_grad()
            tail(model(torch.randn(5, 4))).square().mean().backward()
            grads = [p.grad for p in tail.parameters() if p.grad is not None]
            totals.append(math.hypot(*(float(grad.norm()) for grad in grads)))
            after.step()
    labels = {point.attributes[names.OPTIMIZER] for point in exporter.points(names.GRADIENT_NORM)}
    assert labels == {0, len(inside)}
    mine = exporter.points(names.GRADIENT_NORM, **{names.OPTIMIZER: len(inside)})
    assert [point.value for point in mine] == pytest.approx(totals)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]


def test_batches_before_the_first_step_of_an_optimizer_nobody_named_are_its_micro_batches(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with watching(model):
        for _ in range(2):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(3):
                loss = model(torch.randn(5, 4)).square().mean()
                loss.backward()
                total += loss.item()
            losses.append(total)
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    assert exporter.values(names.STEP_INDEX) == [0, 1]


def test_a_warm_up_before_an_optimizer_comes_is_no_step(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    losses = []
    with watching(model):
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert exporter.values(names.LOSS) == pytest.approx(losses)


def test_a_warm_up_before_steps_by_hand_is_no_step(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    with watching(model):
        model(torch.randn(5, 4)).square().mean().backward()
        model.zero_grad()
        train_by_hand(model, bad_step=9)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2, 3]
    assert len(exporter.values(names.LOSS)) == 4


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_one_backward_has_a_step_if_the_parameters_moved(
    watching: Watching, exporter: InMemoryExporter, steps: int
) -> None:
    model = Net()
    with watching(model):
        model(torch.randn(5, 4)).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.1 * steps * parameter.grad
    assert exporter.values(names.STEP_INDEX) == [0][:steps]


def test_a_model_trained_by_hand_is_freed_with_its_gradients(watching: Watching) -> None:
    model = Net()
    with watching(model):
        model(torch.randn(5, 4)).square().mean().backward()
        assert model.stem.weight.grad is not None
        grad = weakref.ref(model.stem.weight.grad)
        model.zero_grad()
        gc.collect()
        assert grad() is None


def test_optimizers_inside_backward_that_are_forgotten_are_freed(watching: Watching) -> None:
    model = Net()
    optimizers = step_in_backward(model)
    with watching(model, list(optimizers.values())) as watch:
        model(torch.randn(5, 4)).square().mean().backward()
        gone = weakref.ref(model.stem.weight)
        optimizers.clear()  # torch itself never frees a parameter that its own hook holds
        del model
        gc.collect()
        assert gone() is None
        assert watch._run.observer.roster.watched == {}


def test_nothing_is_read_while_a_cuda_graph_is_captured(
    watching: Watching, exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as watch:
        (watched,) = watch._run.observer.roster.watched.values()
        watched.reader.devices = (torch.device("cuda"),)
        monkeypatch.setattr(watched.reader, "read", lambda: pytest.fail("read during a capture"))
        monkeypatch.setattr(observing, "is_capturing", lambda: True)
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert exporter.values(names.STEP_INDEX) == []
    assert exporter.values(names.GRADIENT_NORM) == []
