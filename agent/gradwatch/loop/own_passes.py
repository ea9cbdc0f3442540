"""Which backward passes a step is made of, where gradients were cleared between two of them and no step came.

Mostly a batch was thrown away, and its loss is nobody's. But gradients may also have been kept elsewhere, and
put together before the step: gradient surgery between tasks, per-sample clipping by hand. Then what the step
finds is not what the last backward pass left, and all passes count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gradwatch.gradients.seen import SeenGradients

if TYPE_CHECKING:
    from torch import Tensor


class OwnPasses:
    """The passes since one optimizer's gradients were cleared.

    Attributes:
        before: Losses on devices of earlier passes.
        told: Whether the loss of an earlier pass was bad, which has been told.
    """

    __slots__ = ("_combined", "_left", "_loss", "before", "told")

    def __init__(self, before: int, *, told: bool) -> None:
        self.before = before
        self.told = told
        self._loss: float | None = None
        self._left: SeenGradients | None = None
        self._combined = False

    @property
    def loss(self) -> float | None:
        """Their loss on the host."""
        return self._loss

    def add(self, loss: float) -> None:
        """One more began."""
        self._loss = loss if self._loss is None else self._loss + loss

    def leave(self, parameters: Iterable[Tensor]) -> None:
        """These gradients are as backward left them, or as we know that they were changed."""
        self._left = SeenGradients.one_of(parameters)

    def look(self) -> None:
        """The step is about to use the gradients, or we are about to see them changed."""
        self._combined |= self._left is not None and not self._left.are_as_seen()

    @property
    def is_known_to_be_bad(self) -> bool:
        """Whether bad gradients are no news: they have come with those of a pass that was told."""
        return self.told and self._combined

    def is_all(self, total: float | None) -> bool:
        """Whether earlier passes count too; ``total`` is the loss of all. A bad one has been told."""
        return self._combined and (total is None or math.isfinite(total))
