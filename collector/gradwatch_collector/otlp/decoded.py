"""What every decoder returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch_collector.records import Batch


@dataclass(frozen=True, slots=True)
class Decoded:
    """A request taken apart: what to store, and how many items could not be used."""

    batches: Sequence[Batch]
    rejected: int = 0
    why: str = ""
