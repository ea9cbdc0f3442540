"""The shape of all families: what a training run is made of, before anything goes wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from gym.data import Batch, loader


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a run is trained; the faults that are there from the start are changes of it.

    Attributes:
        variant: Which of the two data sets.
        learning_rate: Times the family's own.
        batch: Samples a batch, None for the family's own.
        samples: How many to train on, None for all.
        sigmoids: Hidden layers with sigmoids in place of the family's own, 0 for the family's own.
        clip: Times the norm that gradients are clipped to.
        guarded: Whether the loop passes over gradients that are not finite.
        half: Whether to train in float16 under a loss scaler.
        decay: Whether learning rate and weights decay, as they should.
        fetching: Called where a batch is read.
    """

    variant: str
    steps: int
    learning_rate: float = 1.0
    batch: int | None = None
    samples: int | None = None
    sigmoids: int = 0
    clip: float | None = None
    guarded: bool = False
    half: bool = False
    decay: bool = True
    seeded: bool = True
    fetching: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Turn:
    """One optimizer's part in an iteration: ``loss`` of a batch, for the parameters of ``model``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], Tensor]


@dataclass(slots=True)
class Training:
    """Everything a loop needs.

    Attributes:
        models: By name, as they are watched.
        batches: As many as there are steps.
        evaluate: What is logged of the model by name, called with gradients disabled.
        clip: The norm that gradients are clipped to, None for no clipping.
        every: Steps between two evaluations.
    """

    models: dict[str, nn.Module]
    turns: list[Turn]
    batches: Iterable[Batch]
    evaluate: Callable[[], Mapping[str, float]]
    clip: float | None = None
    every: int = 50
    schedules: list[torch.optim.lr_scheduler.LambdaLR] = field(default_factory=list)

    def decay(self, steps: int) -> None:
        """Let the learning rates fall to a twentieth, along a cosine."""
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                turn.optimizer, lambda step: 0.05 + 0.95 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
            )
            for turn in self.turns
        ]


class Family(Protocol):
    """One kind of training: a module of ``gym.families``."""

    NAME: str
    STEPS: int

    def build(self, recipe: Recipe) -> Training:
        """Make models, optimizers and data anew, from the current state of torch's random generator."""


def supervised(
    recipe: Recipe,
    model: nn.Module,
    data: tuple[Batch, Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    learning_rate: float,
    batch: int,
    clip: float | None = None,
) -> Training:
    """A model that learns targets from inputs, with AdamW; what it logs is ``val_loss``."""
    train, (inputs, targets) = data
    # Evenly spaced ones: the first lines of a photograph are sky.
    spacing = len(train[0]) // recipe.samples if recipe.samples else 1
    train = tuple(tensor[::spacing][: recipe.samples] for tensor in train)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate * recipe.learning_rate,
        weight_decay=0.05 if recipe.decay else 0.0,
    )

    def validate() -> dict[str, float]:
        model.eval()
        value = float(loss(model(inputs), targets))
        model.train()
        return {"val_loss": value}

    return Training(
        {"": model},
        [Turn(model, optimizer, lambda batch: loss(model(batch[0]), batch[1]))],
        loader(train, recipe.batch or batch, recipe.steps, recipe.fetching),
        validate,
        clip=clip,
    )
