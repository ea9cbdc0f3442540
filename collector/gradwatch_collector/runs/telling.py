"""What senders tell, as what it should be, or None: one odd sender must not stop the service for all."""

from __future__ import annotations

import math
from typing import Final

_INT64: Final = 2**63


def text(value: object, longest: int = 1_000) -> str | None:
    """Return a non-empty text, cut after ``longest`` characters; None for anything else."""
    return value[:longest] if isinstance(value, str) and value else None


def number(value: object) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def integer(value: object) -> int | None:
    """Return a whole number that the database can hold; None for anything else."""
    real = number(value)
    if real is None or real != math.trunc(real):
        return None
    whole = int(value) if isinstance(value, int) else int(real)
    return whole if -_INT64 <= whole < _INT64 else None
