"""What a run tries to reach: ``val_loss<=0.5``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_PATTERN: Final = re.compile(r"\s*([^\W\d][\w./-]*)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one logged metric."""

    metric: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``NAME<=NUMBER`` (or ``<``, ``>``, ``>=``).

        Raises:
            ValueError: The text is not of this form; the message says what is expected.
        """
        match = _PATTERN.fullmatch(text)
        bound = None
        if match:
            try:
                bound = float(match[3])
            except ValueError:
                bound = None
        if match is None or bound is None or not math.isfinite(bound):
            raise ValueError(
                f"cannot read the target {text!r}: expected NAME<=NUMBER (or <, >=, >), such as 'val_loss<=0.5'"
            )
        return cls(match[1], match[2], bound)

    def holds(self, value: float) -> bool:
        """Whether the value meets the bound; NaN never does."""
        return _COMPARISONS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound!r}"
