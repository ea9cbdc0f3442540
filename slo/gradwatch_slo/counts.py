"""What was counted."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

# The values of an objective's ``group_by``, in its order; what is not known of a run is None.
Group = tuple[str | None, ...]
# How bad time slices that may be so in part were in all, exactly, and how many they are.
Lost = tuple[Fraction, int]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many events were good and how many bad."""

    good: int = 0
    bad: int = 0

    @property
    def total(self) -> int:
        """All that were counted."""
        return self.good + self.bad

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.good + other.good, self.bad + other.bad)
