"""A convolutional network with batch norm that reads digits."""

from __future__ import annotations

from typing import Final

from torch import nn
from torch.nn import functional

from gym.data import digits
from gym.training import Recipe, Training, supervised

NAME: Final = "cnn"
STEPS: Final = 600


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _network(recipe: Recipe) -> nn.Sequential:
    if recipe.sigmoids:
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.Sigmoid()]
        for _ in range(recipe.sigmoids - 1):
            layers += [nn.Conv2d(32, 32, 3, padding=1), nn.Sigmoid()]
    else:
        layers = [*_block(1, 32), *_block(32, 32)]
    drop = nn.Dropout(0.3 if recipe.decay else 0.0)
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), drop, nn.Linear(32 * 16, 10))


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`."""
    return supervised(
        recipe,
        _network(recipe),
        digits(recipe.variant),
        functional.cross_entropy,
        learning_rate=1e-3,
        batch=8 if recipe.half else 64,  # float16 is slow on the CPU
    )
