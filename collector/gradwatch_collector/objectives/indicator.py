"""An indicator as it is counted: what, of which runs, and by which of their fields."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Final

from gradwatch_slo.indicators import Convergence, Measure, Selection
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

    @property
    def is_lasting(self) -> bool:
        """Whether what it counts of an hour changes only with the runs of that hour, so that it can be kept."""
        return not (isinstance(self.measure, Convergence) and self.measure.baseline_run is not None)

    @property
    def key(self) -> str:
        """All of it as text, the same in every process."""
        return _key(self)


@cache
def _key(indicator: Indicator) -> str:
    # Asked for several times an evaluation, of the same few.
    told = [_VERSION, type(indicator.measure).__name__, asdict(indicator)]
    return json.dumps(told, default=str, sort_keys=True)
