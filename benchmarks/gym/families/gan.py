"""A generator that learns to draw digits from a critic that learns to tell its drawings from real ones."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gym.data import Batch, digits, loader
from gym.training import Recipe, Training, Turn

NAME: Final = "gan"
STEPS: Final = 600
_NOISE: Final = 16


def _generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(_NOISE, 192), nn.BatchNorm1d(192), nn.ReLU(),
        nn.Linear(192, 192), nn.BatchNorm1d(192), nn.ReLU(),
        nn.Linear(192, 64), nn.Sigmoid(),
    )  # fmt: skip


def _critic() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 192), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Linear(192, 192), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Linear(192, 1),
    )  # fmt: skip


def _against(logits: Tensor, is_real: bool) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.9 if is_real else 0.0))


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`. It logs how far means and spreads of drawings are from digits'."""
    generator, critic = _generator(), _critic()
    (pictures, _), (held_out, _) = digits(recipe.variant)
    pictures = pictures[: recipe.samples]
    rate = 5e-4 * recipe.learning_rate
    optimizers = [
        torch.optim.Adam(model.parameters(), lr=rate, betas=(0.5, 0.999)) for model in (critic, generator)
    ]

    def judged(batch: Batch) -> Tensor:
        drawn = generator(torch.randn(len(batch[0]), _NOISE)).detach()
        return _against(critic(batch[0]), is_real=True) + _against(critic(drawn), is_real=False)

    def fooled(batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            critic(generator(torch.randn(len(batch[0]), _NOISE))), torch.ones(len(batch[0]), 1)
        )

    def distance() -> dict[str, float]:
        drawn, real = generator(torch.randn(200, _NOISE)), held_out.flatten(1)
        return {
            "sample_distance": float(
                (drawn.mean(0) - real.mean(0)).norm() + (drawn.std(0) - real.std(0)).norm()
            )
        }

    return Training(
        {"critic": critic, "generator": generator},
        [Turn(critic, optimizers[0], judged), Turn(generator, optimizers[1], fooled)],
        loader((pictures,), recipe.batch or 64, recipe.steps, recipe.fetching),
        distance,
    )
