"""A network whose loss is what a test wants it to be, observed at every step and nearly never."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

BAD = 4

both = pytest.mark.parametrize("every", [1, 1000])


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def exactly(model: nn.Module, value: float) -> Tensor:
    """A loss of this value, whose gradients are not zero."""
    loss: Tensor = model(torch.randn(5, 4)).mean() * 1e-9 + value
    return loss
