"""Loops whose gradients are not where torch puts them: told, and never reported as zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]


def reasons(exporter: InMemoryExporter) -> list[str]:
    return [
        str(event.attributes[names.MISSING_REASON])
        for event in exporter.find_events(names.INSTRUMENTATION_MISSING.name)
    ]


def assert_no_norms(exporter: InMemoryExporter) -> None:
    assert exporter.values(names.GRADIENT_NORM) == []
    assert exporter.histograms(names.LAYER_GRADIENT_NORM) == []


def keep_in_main_grad(model: nn.Module) -> None:
    """As Megatron's data parallelism does: the gradient is added to a buffer, and `.grad` is dropped."""

    def move(parameter: Any) -> None:
        parameter.main_grad += parameter.grad.float()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]


def test_gradients_in_main_grad(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 2)
    keep_in_main_grad(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with watching(model, optimizer):
        for _ in range(3):
            loss = model(torch.randn(5, 4)).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
    assert_no_norms(exporter)
    (reason,) = reasons(exporter)
    assert "main_grad" in reason
    assert exporter.values(names.LOSS) == losses
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]


def test_master_copies_that_are_stepped_in_the_models_place(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    """As DeepSpeed's ZeRO does: this rank's part of all parameters, flattened, in full precision."""

    class Zero:
        def __init__(self, model: nn.Module) -> None:
            self.model = model
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            self.partition = nn.Parameter(flat[: flat.numel() // 2].clone())
            self.optimizer = torch.optim.SGD([self.partition], lr=0.1)

        def step(self) -> None:
            flat = torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])
            self.partition.grad = flat[: self.partition.numel()].clone()
            self.optimizer.step()
            self.model.zero_grad()

    model = nn.Linear(4, 2)
    optimizer = Zero(model)
    with watching(model, optimizer):
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert_no_norms(exporter)
    (reason,) = reasons(exporter)
    assert "not the watched models' parameters" in reason
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]


def test_parameters_that_deepspeed_partitioned(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 2)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined] # ZeRO-3 marks what it takes over
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert_no_norms(exporter)
    (reason,) = reasons(exporter)
    assert "DeepSpeed" in reason


def test_optimizers_that_train_nothing_watched(watching: Watching, exporter: InMemoryExporter) -> None:
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with watching(model):
        for _ in range(20):
            optimizer.zero_grad()
            other(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert_no_norms(exporter)
    (reason,) = reasons(exporter)
    assert "none of them has a parameter of the watched models" in reason


def test_an_optimizer_of_a_model_nobody_watches_is_still_reported_beside_one_that_is(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    actor, critic = nn.Linear(4, 2), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (actor, critic)]
    with watching(actor, optimizers):
        for net, optimizer in zip((actor, critic), optimizers, strict=True):
            net(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert reasons(exporter) == []
    assert len(exporter.values(names.GRADIENT_NORM)) == 2
