"""How a run's training loss stands, and what is logged of its model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LEAST, levels, median, noise
from gradwatch_collector.findings.run_view import Doubles, Levels, Number, RunView
from gradwatch_collector.runs.telling import text

# What people call what is held out, in the order in which they are believed.
_HELD_OUT: Final = ("val", "validation", "valid", "eval", "test", "dev")
VALIDATION_LOSSES: Final = tuple(
    name for word in _HELD_OUT for name in (f"{word}_loss", f"{word}/loss", f"loss/{word}")
)
# Words in names of what tells how good a model is.
_OF_QUALITY: Final = frozenset({
    "val", "valid", "validation", "eval", "test", "dev", "acc", "accuracy", "reward", "rewards", "return",
    "returns", "score", "distance", "fid", "bleu", "rouge", "auc", "f1", "iou", "perplexity", "ppl", "elo",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Descent:
    """A loss: its levels, where it began, the lowest it reached, and where it is.

    ``steps``: how many values there were. ``is_positive``: whether all were; of one that may be below zero, as
    those of reinforcement learning, shares mean nothing. ``noise``: what single values deviate by, by chance.
    """

    steps: float
    is_positive: bool
    levels: Levels
    recent: Doubles
    start: float
    lowest: float
    now: float
    noise: float

    @property
    def gain(self) -> float:
        """What it has fallen by from its start to its lowest level."""
        return self.start - self.lowest


def descent(number: Number | None) -> Descent | None:
    """Return how a loss stands; None while it has fewer than two levels."""
    if number is None:
        return None
    known, recent = levels(number.course), number.recent.values
    if len(known) < 2:
        return None
    return Descent(
        steps=float(np.sum(number.course.finite + number.course.nonfinite)),
        is_positive=not bool(np.any(number.course.least < 0)) and float(known.values[0]) > 0,
        levels=known,
        recent=recent,
        start=float(known.values[0]),
        lowest=float(np.min(known.values)),
        now=median(recent[-LEAST:]),
        noise=noise(recent),
    )


def own_losses(view: RunView) -> Sequence[Number]:
    """Return the training losses of the lowest rank that told any, one for each optimizer."""
    told = view.every(c.LOSS)
    return [number for number in told if number.rank == told[0].rank]


def only_loss(view: RunView) -> Number | None:
    """Return the training loss of a run with one optimizer; what two play against each other need not fall."""
    told = own_losses(view)
    return told[0] if len(told) == 1 else None


def validation_loss(view: RunView) -> Number | None:
    """Return what was logged of a held-out loss."""
    return next((found for name in VALIDATION_LOSSES if (found := view.logged(name)) is not None), None)


def of_quality(view: RunView) -> Sequence[Number]:
    """Return what was logged under a name that tells of how good the model is."""
    return [
        number
        for number in view.every(c.LOGGED)
        if _OF_QUALITY & set(re.split(r"[\W_]+", (text(number.attributes.get(c.METRIC_NAME)) or "").lower()))
    ]


def first_step(view: RunView) -> float:
    """Return the step that the attempt began with: above 0 where it went on from a checkpoint."""
    steps = view.first(c.STEP_INDEX)
    return float(steps.course.least[0]) if steps is not None and len(steps.course) else 0.0
