"""In which steps of an attempt a loss or a gradient is known not to have been finite, and of which layers.

Events and black boxes tell of layers, in the first bad steps. That a step was bad every loss tells, and every
global norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.runs.black_box import nonfinite_norms
from gradwatch_collector.runs.curves import Curve
from gradwatch_collector.runs.telling import integer, text
from gradwatch_collector.storage import schema

# After the first, nearly every layer is NaN in nearly every step.
_MOST_EVENTS: Final = 2_000
# float64 counts no further.
_MOST_STEPS: Final = 2**53
# What is born there is an output, and the layer a module: no parameter's gradient.
_BEFORE_GRADIENTS: Final = frozenset({"input", "forward", "loss"})

Mark = tuple[str, int]  # layer and step
Steps = npt.NDArray[np.int64]  # increasing


@dataclass(frozen=True, slots=True)
class NonfiniteTold:
    """``gradients``: which layer's was not finite in which step. ``steps``: those, and others that were bad."""

    gradients: frozenset[Mark]
    steps: frozenset[int]


def nonfinite_told(connection: Connection, run_id: str, attempt: int) -> NonfiniteTold:
    """Return what events and black boxes of an attempt tell, to the step."""
    event = schema.event.c
    events = connection.scalars(
        select(event.attributes)
        .where(event.run_id == run_id, event.attempt == attempt, event.name == c.NONFINITE_STEP.name)
        .order_by(event.time)
        .limit(_MOST_EVENTS)
    )
    gradients = nonfinite_norms(connection, run_id, attempt)
    steps = {step for _, step in gradients}
    for attributes in events:
        layer, step = text(attributes.get(c.LAYER_NAME)), integer(attributes.get(c.STEP))
        if step is None:
            continue
        steps.add(step)
        if layer is not None and text(attributes.get(c.BORN_IN)) not in _BEFORE_GRADIENTS:
            gradients.add((layer, step))
    return NonfiniteTold(frozenset(gradients), frozenset(steps))


def nonfinite_steps(curves: Iterable[Curve], others: Iterable[int] = ()) -> Steps:
    """Return the steps in which curves were not finite, and others.

    Of an entry of several steps all count if none of its values was finite, else its last, since which of them
    it was is not known.
    """
    found = [np.array([step for step in others if abs(step) < _MOST_STEPS], np.int64)]
    for curve in curves:
        is_bad = (curve.nonfinite > 0) & (np.abs(curve.steps) < _MOST_STEPS)
        last = np.rint(curve.steps[is_bad]).astype(np.int64)
        count = np.where(curve.finite[is_bad] > 0, 1, curve.nonfinite[is_bad]).astype(np.int64)
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        found.append(np.repeat(last, count) - place)
    return np.unique(np.concatenate(found))


def spans(steps: Steps, most: int) -> list[tuple[int, int]]:
    """Return where each row of successive steps begins and ends, in order.

    Of more than ``most`` the ones that are nearest to each other are joined.
    """
    if not len(steps):
        return []
    gaps = np.diff(steps)
    apart = np.flatnonzero(gaps > 1)
    widest = np.sort(apart[np.argsort(-gaps[apart], kind="stable")][: most - 1])
    return list(zip(steps[[0, *(widest + 1)]].tolist(), steps[[*widest, -1]].tolist(), strict=True))
