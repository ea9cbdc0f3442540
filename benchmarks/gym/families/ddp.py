"""The perceptron of digits, trained by two processes that average their gradients over gloo."""

from __future__ import annotations

from typing import Final

import torch.distributed
from torch import nn
from torch.nn import functional

from gym.data import digits
from gym.families.mlp import network
from gym.training import Recipe, Training, supervised

NAME: Final = "ddp"
STEPS: Final = 600
RANKS: Final = 2


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`. The process group is there; each rank draws batches of its own half."""
    rank = torch.distributed.get_rank()
    (pictures, labels), validate = digits(recipe.variant)
    model = nn.parallel.DistributedDataParallel(network(recipe))
    training = supervised(
        recipe,
        model,
        ((pictures[rank::RANKS], labels[rank::RANKS]), validate),
        functional.cross_entropy,
        learning_rate=5e-4,
        batch=64,
    )
    if recipe.seeded:
        torch.manual_seed(torch.initial_seed() + rank)  # the same weights, but not the same batches
    return training
