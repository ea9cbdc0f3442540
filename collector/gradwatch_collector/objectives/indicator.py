"""An indicator as it is counted: what, of which runs, and by which of their fields."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Final

from gradwatch_collector.objectives.judging import Pinned
from gradwatch_slo.indicators import Measure, Selection
from gradwatch_slo.objective import Objective

# To be raised when `judging.py` counts otherwise than before: what is kept under the old keys goes.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Indicator:
    """What several objectives may share: targets and windows are their own."""

    measure: Measure
    selection: Selection
    group_by: tuple[str, ...]

    @classmethod
    def of(cls, objective: Objective) -> Indicator:
        """Return what an objective counts."""
        return cls(objective.measure, objective.selection, objective.group_by)


@cache
def key(indicator: Indicator, pinned: Pinned | None) -> str:
    """Return what decides what it counts of an hour's runs as text, the same in every process."""
    # Asked for several times an evaluation, of the same few.
    told = [_VERSION, type(indicator.measure).__name__, asdict(indicator)]
    if pinned is not None:
        told.append(asdict(pinned))
    return json.dumps(told, default=str, sort_keys=True)
