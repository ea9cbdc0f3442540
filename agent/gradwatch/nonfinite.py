"""Steps with a NaN or Inf: where it was born, and which of them become events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Birthplace = Literal["backward", "parameters"]


@dataclass(frozen=True, slots=True)
class Witnesses:
    """What is known about one non-finite step. Indices are those of the optimizer's parameters.

    Attributes:
        loss: The step's loss, None when it is not known.
        gradients: Parameters whose gradient was read.
        bad_gradients: Those of them with a NaN or Inf.
        bad_parameters: Parameters that were already non-finite before the step; None when nobody looked.
        backward_order: All parameters in the order in which backward reaches them.
    """

    loss: float | None
    gradients: Sequence[int]
    bad_gradients: Sequence[int]
    bad_parameters: Sequence[int] | None
    backward_order: Sequence[int]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a non-finite value was born, as far as it is known for sure; None rather than a guess."""

    born_in: Birthplace | None
    layer: int | None


def origin(seen: Witnesses) -> Origin:
    """Decide from the witnesses of one step.

    Bad parameters poison loss and gradients, so they are asked first. A bad loss poisons every gradient, so
    with one the gradients say nothing. What is left was born in backward, at the first bad gradient in
    backward order. If already the very first gradient is bad, neither the loss function nor a forward value
    that the loss ignored can be told from the last layer.
    """
    if seen.bad_parameters:
        return Origin("parameters", seen.bad_parameters[0] if len(seen.bad_parameters) == 1 else None)
    if seen.loss is None or not math.isfinite(seen.loss):
        return Origin(None, None)
    layer = first_in_backward(seen.bad_gradients, seen.gradients, seen.backward_order)
    return Origin(None if layer is None else "backward", layer)


def first_in_backward(bad: Sequence[int], of: Sequence[int], backward_order: Sequence[int]) -> int | None:
    """The bad parameter that backward reached first, after ones that were good; None when it has no such."""
    known, read = set(bad), set(of)
    reached = [index for index in backward_order if index in read]
    if not reached or reached[0] in known:
        return None
    return next((index for index in reached if index in known), None)


def is_reported(count: int) -> bool:
    """Whether the ``count``-th non-finite step becomes an event: the first ten, then 100, 1000 ..."""
    return count <= 10 or count == 10 ** (len(str(count)) - 1)
