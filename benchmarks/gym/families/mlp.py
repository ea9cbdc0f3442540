"""A multilayer perceptron that reads digits."""

from __future__ import annotations

from typing import Final

from torch import nn
from torch.nn import functional

from gym.data import digits
from gym.training import Recipe, Training, supervised

NAME: Final = "mlp"
STEPS: Final = 800
_WIDTH: Final = 512
# Float16 is slow on the CPU.
_HALF_WIDTH: Final = 128


def network(recipe: Recipe) -> nn.Sequential:
    """Two hidden layers, or as many as there are to be sigmoids."""
    layers: list[nn.Module] = [nn.Flatten()]
    width, hidden = 64, _HALF_WIDTH if recipe.half else _WIDTH
    for _ in range(recipe.sigmoids or 2):
        layers += [nn.Linear(width, hidden)]
        layers += [nn.Sigmoid()] if recipe.sigmoids else [nn.ReLU(), nn.Dropout(0.3 if recipe.decay else 0.0)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 10))


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`."""
    return supervised(
        recipe,
        network(recipe),
        digits(recipe.variant),
        functional.cross_entropy,
        learning_rate=5e-4,
        batch=32 if recipe.half else 128,
    )
