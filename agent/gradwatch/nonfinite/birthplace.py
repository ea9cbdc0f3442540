"""Steps with a NaN or Inf: where it was born, and which of them become events."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from gradwatch.nonfinite.forward_plan import NOWHERE, Site
from gradwatch.nonfinite.forward_witness import ForwardVerdict

Birthplace = Literal["input", "forward", "loss", "backward", "optimizer", "parameters"]


@dataclass(frozen=True, slots=True)
class Witnesses:
    """What is known about one non-finite step. Indices are those of the optimizer's parameters.

    Attributes:
        loss: The step's loss, None when it is not known.
        gradients: Parameters whose gradient was read.
        bad_gradients: Those of them with a NaN or Inf.
        bad_parameters: Parameters that were already non-finite before the step; None when nobody looked.
        backward_order: All parameters in the order in which backward reaches them.
        bad_elsewhere: Whether another model or optimizer had non-finite parameters before the step.
        parameters_by: What made those parameters bad; None when that is not known.
        forward: What the forward passes' inputs and outputs say: all good, a bad input, or a bad output of
            good inputs; None when nobody looked.
        site: Where the graph behind the loss has the first bad value.
        averaged: Whether the gradients may be means over several ranks: a bad one says nothing about this rank.
        matrices: Parameters that multiply all of their layer's input, where the model is ``is_plain``.
    """

    loss: float | None
    gradients: Sequence[int]
    bad_gradients: Sequence[int]
    bad_parameters: Sequence[int] | None
    backward_order: Sequence[int]
    bad_elsewhere: bool = False
    parameters_by: Literal["optimizer", "parameters"] | None = "parameters"
    forward: ForwardVerdict | None = None
    site: Site = NOWHERE
    averaged: bool = False
    matrices: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a non-finite value was born, as far as it is known for sure; None rather than a guess.

    ``layer`` is the index of a parameter; ``module`` the path of a module, for the forward pass.
    """

    born_in: Birthplace | None
    layer: int | None = None
    module: str | None = None


UNKNOWN = Origin(None)


def origin(seen: Witnesses) -> Origin:
    """Decide from the witnesses of one step, in the order in which one poisons the next.

    Parameters before the step, model input, model output, loss, gradients: the first bad one is the birthplace,
    provided that those before it were looked at.
    """
    if seen.bad_parameters or seen.bad_elsewhere:
        bad = () if seen.bad_elsewhere else seen.bad_parameters or ()
        return Origin(seen.parameters_by, bad[0] if len(bad) == 1 else None)
    if seen.forward in ("input", "forward"):
        return UNKNOWN if seen.bad_parameters is None else _before_the_loss(seen)
    if seen.loss is None:
        return UNKNOWN
    if not math.isfinite(seen.loss):
        return _behind_a_bad_loss(seen)
    layer = first_in_backward(seen.bad_gradients, seen.gradients, seen.backward_order)
    # A bad output that the loss ignores (a masked position) poisons gradients behind a finite loss too.
    sure = seen.forward == "good" or (
        seen.forward is None
        and seen.bad_parameters is not None
        and is_of_backward(seen.bad_gradients, seen.gradients, seen.backward_order, seen.matrices)
    )
    return Origin("backward" if sure and not seen.averaged else None, layer)


def _before_the_loss(seen: Witnesses) -> Origin:
    if seen.site.phase == "loss":  # the graph contradicts
        return UNKNOWN
    if seen.forward == "input":
        return Origin("input")
    return Origin("forward", module=seen.site.module)


def _behind_a_bad_loss(seen: Witnesses) -> Origin:
    if seen.forward == "good":
        return UNKNOWN if seen.site.phase == "forward" else Origin("loss")
    if seen.bad_parameters is None:
        return UNKNOWN
    if seen.site.phase == "loss":
        return Origin("loss")
    if seen.site.phase != "forward" or seen.site.came_with == "leaf":
        return UNKNOWN
    if seen.site.came_with == "input":
        return Origin("input")
    return Origin("forward", module=seen.site.module)


def first_in_backward(bad: Sequence[int], of: Sequence[int], backward_order: Sequence[int]) -> int | None:
    """The bad parameter that backward reached first, after ones that were good; None when it has no such."""
    known, read = set(bad), set(of)
    reached = [index for index in backward_order if index in read]
    if not reached or reached[0] in known:
        return None
    return next((index for index in reached if index in known), None)


def is_of_backward(
    bad: Collection[int], of: Collection[int], backward_order: Sequence[int], matrices: Collection[int]
) -> bool:
    """Whether gradients alone, behind a finite loss, say that the first bad value came up in backward.

    A matrix that was reached before has a good gradient, which is its whole input times what came down to it:
    so the input was good, and its output. From the first bad one on all are: an infinite input from below,
    hidden by an activation that it saturates, spoils no bias.
    """
    reached = [index for index in backward_order if index in of]
    first = next((place for place, index in enumerate(reached) if index in bad), 0)
    poisoned = reached[first:]
    has_witness = any(index in matrices for index in reached[:first])
    return has_witness and len(poisoned) > 1 and all(index in bad for index in poisoned)


def is_reported(count: int) -> bool:
    """Whether the ``count``-th non-finite step becomes an event: the first ten, then 100, 1000 ..."""
    return count <= 10 or count == 10 ** (len(str(count)) - 1)
