"""The shape of all faults: what one may change of a run, and what must be found of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from torch import Tensor

from gym.data import Batch
from gym.training import Recipe, Training

STRONG: Final = "strong"
WEAK: Final = "weak"
EVERYWHERE: Final = ("mlp", "cnn", "gpt", "lstm", "gan", "actor_critic", "ddp")


@dataclass(frozen=True, slots=True)
class Birthplace:
    """Where a NaN is born: what `born_in` must say, and the module at fault; None where null is the truth."""

    born_in: str
    layer: str | None = None


class Fault:
    """A fault in one process of one run. A loop calls all of these; a fault overrides what it needs.

    Args:
        step: The step it comes in; 0 for what is wrong from the start.
        is_strong: Whether it is of the strong kind.
        chance: What else is drawn about it.
        rank: Of this process.
        folder: Of this run, for files.

    Attributes:
        now: The step that the loop is in.
        birthplace: Of the NaN that it makes, known once it is installed.
    """

    def __init__(self, *, step: int, is_strong: bool, chance: random.Random, rank: int, folder: Path) -> None:
        self.step, self.is_strong, self.chance, self.rank, self.folder = step, is_strong, chance, rank, folder
        self.now = -1

    birthplace: Birthplace | None = None

    @property
    def is_on(self) -> bool:
        """Whether it has come."""
        return self.now >= self.step

    def cook(self, recipe: Recipe) -> Recipe:
        """Return how to train instead; called before anything is built."""
        return recipe

    def install(self, training: Training) -> None:
        """Change what was built; called before it is watched."""

    def begin(self) -> None:
        """Called at the beginning of every step, ``now``."""

    def batch(self, batch: Batch) -> Batch:
        """Return the batch to train on instead."""
        return batch

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate instead."""
        return loss

    def gradients(self, training: Training) -> Mapping[str, float]:  # noqa: ARG002 - for those that override it
        """Change the gradients of a step that is about to be taken; return what the loop logs of them."""
        return {}

    def save(self, write: Callable[[Path], None], path: Path) -> None:
        """Write a checkpoint."""
        write(path)

    def saved(self, path: Path) -> None:
        """Called when a checkpoint was saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is known of a fault before it is planted.

    Attributes:
        make: The fault itself.
        families: Where it makes sense.
        expected: Rules any of which finds it.
        companions: Rules that are right about it too.
        from_start: Whether it is there from the first step.
        launches: How many runs of one job have it, strong and weak.
        retries: What `gradwatch run --retries` is given, None where the run is started without it.
        hangs: Whether somebody has to end the run.
        pace: How many times as many steps as the family's own are trained, so that it can show.
    """

    name: str
    make: type[Fault]
    expected: frozenset[str]
    families: tuple[str, ...] = EVERYWHERE
    companions: frozenset[str] = field(default_factory=frozenset)
    from_start: bool = False
    launches: Mapping[str, int] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    hangs: bool = False
    pace: float = 1.0
