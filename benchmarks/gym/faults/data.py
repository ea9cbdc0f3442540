"""What is wrong with the data, and with how it is drawn."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from gym.data import Batch
from gym.fault import Fault
from gym.training import Recipe


class LabelNoise(Fault):
    """Targets belong to other samples of the batch: all of them, or half."""

    def batch(self, batch: Batch) -> Batch:
        """See `Fault`."""
        if not self.is_on:
            return batch
        inputs, targets, *rest = batch
        noisy = len(targets) if self.is_strong else len(targets) // 2
        order = torch.cat([torch.randperm(noisy), torch.arange(noisy, len(targets))])
        return (inputs, targets[order], *rest)


class InputShift(Fault):
    """Inputs in another unit, with another zero: another camera."""

    def batch(self, batch: Batch) -> Batch:
        """See `Fault`."""
        if not self.is_on:
            return batch
        scale, offset = (4.0, 2.0) if self.is_strong else (1.5, 0.5)
        return (batch[0] * scale + offset * batch[0].std(), *batch[1:])


class Overfitting(Fault):
    """A few samples, learned by heart."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(recipe, samples=20 if self.is_strong else 40, decay=False, learning_rate=2.0)


class MissingSeed(Fault):
    """Nobody seeds the random generators."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(recipe, seeded=False)


class StarvedLoader(Fault):
    """Batches come from a slow disk: reading takes five times as long as a step, or half as long again."""

    _MOST_SECONDS = 0.015  # a busy machine's steps would make runs of minutes

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        self._began, self._step_seconds = time.perf_counter(), 0.01
        return replace(recipe, fetching=self._fetch)

    def begin(self) -> None:
        """See `Fault`."""
        if 10 <= self.now <= self.step:  # the pace before it comes
            pace = (time.perf_counter() - self._began) / max(self.now - 10, 1)
            self._step_seconds = min(pace, self._MOST_SECONDS)
        elif self.now < 10:
            self._began = time.perf_counter()

    def _fetch(self) -> None:
        if self.is_on:
            time.sleep(self._step_seconds * (5 if self.is_strong else 1.5))
