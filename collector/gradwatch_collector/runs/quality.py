"""The quality of a run's model (M10): its target names a metric, and which direction of it is better."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Connection, func

from gradwatch import conventions as c
from gradwatch_collector.runs.curves import read_curves
from gradwatch_collector.storage import schema

# Worse than anything that a metric can be. A number, as every database and format has: none has NaN.
WORST: Final = -sys.float_info.max
_TARGET: Final = re.compile(r"\s*([^\W\d][\w./-]*)\s*(<=|>=|<|>)\s*\S+\s*")


@dataclass(frozen=True, slots=True)
class Aim:
    """What a target such as ``val_loss<=0.5`` is about, without its bound."""

    metric: str
    lower_is_better: bool

    @classmethod
    def of(cls, target: str | None) -> Aim | None:
        """Return the aim of a run's target; None without one, or if it is not of that form."""
        told = re.fullmatch(_TARGET, target or "")
        return None if told is None else cls(told[1], told[2].startswith("<"))


def aims_at(aim: Aim) -> ColumnElement[bool]:
    """Return which runs, over ``schema.run``, have this aim; agents write targets without spaces."""
    begins = aim.metric + ("<" if aim.lower_is_better else ">")
    return func.substr(func.replace(schema.run.c.target, " ", ""), 1, len(begins)) == begins


def quality(connection: Connection, run_id: str, target: str | None) -> float | None:
    """Return the last value of the target's metric, negative where lower is better: more is always better.

    The last, as that is the model which the run leaves behind; `WORST` if that is not finite, as the run
    diverged. None without a target, or if the value was never told.
    """
    aim = Aim.of(target)
    if aim is None:
        return None
    loss = aim.metric == "loss"
    curves = [
        curve
        for curve in read_curves(connection, run_id, c.LOSS if loss else c.LOGGED, every_rank=not loss)
        if loss or curve.attributes.get(c.METRIC_NAME) == aim.metric
    ]
    newest = max(curves, key=lambda curve: (curve.attempt, -curve.rank, curve.times[-1]), default=None)
    if newest is None:
        return None
    if not math.isfinite(newest.last):
        return WORST
    return -newest.last if aim.lower_is_better else newest.last
