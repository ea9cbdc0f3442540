"""What is wrong with how gradients become updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gym.fault import Fault
from gym.training import Recipe, Training


class LearningRateBomb(Fault):
    """The learning rate is multiplied: what a wrong unit in a schedule does."""

    def install(self, training: Training) -> None:
        """See `Fault`."""
        self._training = training
        self._factor = self.chance.uniform(300, 1000) if self.is_strong else self.chance.uniform(40, 100)

    def begin(self) -> None:
        """See `Fault`."""
        if self.now == self.step:
            for turn in self._training.turns:
                for group in turn.optimizer.param_groups:
                    group["lr"] *= self._factor
            for schedule in self._training.schedules:
                schedule.base_lrs = [rate * self._factor for rate in schedule.base_lrs]


class Plateau(Fault):
    """A learning rate that is far too small."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        factor = self.chance.uniform(1e-5, 1e-4) if self.is_strong else self.chance.uniform(1e-3, 3e-3)
        return replace(recipe, learning_rate=factor)


class OverClipping(Fault):
    """Gradients are cut to a small part of their norm in every step, by plain gradient descent's measure."""

    def install(self, training: Training) -> None:
        """See `Fault`."""
        self._training = training
        self._clip = self.chance.uniform(1e-5, 1e-4) if self.is_strong else self.chance.uniform(5e-3, 2e-2)

    def begin(self) -> None:
        """See `Fault`."""
        if self.is_on:
            self._training.clip = self._clip


class StaleGradients(Fault):
    """Updates with gradients of parameters that are some steps old, as in asynchronous training."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        self._late = self.chance.randint(20, 40) if self.is_strong else self.chance.randint(6, 10)
        self._waiting: deque[list[Tensor | None]] = deque()
        return recipe

    def gradients(self, training: Training) -> Mapping[str, float]:
        """See `Fault`."""
        parameters = [
            parameter
            for turn in training.turns
            for group in turn.optimizer.param_groups
            for parameter in group["params"]
        ]
        self._waiting.append([None if each.grad is None else each.grad.clone() for each in parameters])
        if len(self._waiting) > (self._late if self.is_on else 0) + 1:
            self._waiting.popleft()
        for parameter, gradient in zip(parameters, self._waiting[0], strict=True):
            parameter.grad = gradient
        return {"gradient_staleness": float(len(self._waiting) - 1)}


class NoisyGradients(Fault):
    """Batches so small that a gradient is mostly chance."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(recipe, batch=1 if self.is_strong else 3)


class BadInitialisation(Fault):
    """Weights that start far too large, so that most of a run is spent on making them small."""

    def install(self, training: Training) -> None:
        """See `Fault`."""
        scale = self.chance.uniform(30, 50) if self.is_strong else self.chance.uniform(10, 14)
        with torch.no_grad():
            for model in training.models.values():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(scale)


class SigmoidDepth(Fault):
    """Many layers of sigmoids, in which gradients vanish."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(
            recipe, sigmoids=self.chance.randint(10, 12) if self.is_strong else self.chance.randint(7, 8)
        )
