"""Rule 1: with and without a watch, the same seed gives the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

STEPS = 6


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def plain(model: nn.Module, watch: Callable[[Any, Any], Any]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()


def accumulated_and_clipped(model: nn.Module, watch: Callable[[Any, Any], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(3):
                (model(torch.randn(8, 6)).square().mean() / 3).backward()
            clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()


def scaled(model: nn.Module, watch: Callable[[Any, Any], Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()


def closures(model: nn.Module, watch: Callable[[Any, Any], Any]) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x = torch.randn(8, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.step(closure)


def poisoned(model: nn.Module, watch: Callable[[Any, Any], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            scale = float("nan") if step == 3 else 1.0
            (model(torch.randn(8, 6)).square().mean() * scale).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


@pytest.mark.parametrize("loop", [plain, accumulated_and_clipped, scaled, closures, poisoned])
@pytest.mark.parametrize("every", [1, 3, None])
def test_weights_are_equal_bit_for_bit(
    watching: Callable[..., Any], loop: Callable[..., None], every: int | None
) -> None:
    finals = []
    for watch in (lambda _m, _o: nullcontext(), lambda m, o: watching(m, o, every=every)):
        torch.manual_seed(1)
        model = network()
        loop(model, watch)
        finals.append([tensor.clone() for tensor in model.state_dict().values()])
    for bare, watched in zip(*finals, strict=True):
        assert bare.numpy().tobytes() == watched.numpy().tobytes()
