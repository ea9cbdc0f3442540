"""The last steps of a run, and where they were not finite, from the black boxes that its processes sent."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, select

from gradwatch import conventions as c
from gradwatch.life.flight_recorder import decode
from gradwatch_collector.runs.telling import integer, text
from gradwatch_collector.storage import schema

_STEPS_SHOWN: Final = 8
# Each of them has the steps before the one that it was sent for; the first tells where it began.
_BOXES_READ: Final = 4
_NONFINITE: Final = "nonfinite"

_event = schema.event.c


@dataclass(frozen=True, slots=True)
class _Box:
    """An event that carries a black box."""

    attempt: int
    rank: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LastStep:
    """One step; None is not known. ``duration`` in seconds. ``layer``: the one of the largest ``norm``."""

    step: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    duration: float | None
    layer: str | None
    norm: float | None


@dataclass(frozen=True, slots=True)
class LastSteps:
    """What a black box says. ``trigger``: why it was sent. ``rows``: the last of ``steps``, oldest first."""

    trigger: str | None
    attempt: int
    rank: int
    steps: int
    rows: tuple[LastStep, ...]


def last_steps(connection: Connection, run_id: str) -> LastSteps | None:
    """Return the steps up to the first that was not finite, else up to the newest trouble; None without."""
    rows = _boxes(connection, _event.run_id == run_id)
    # Once all is NaN the steps before say nothing more.
    for row in [row for row in rows if _is_nonfinite(row)] or rows[::-1]:
        try:
            shown = tuple(_rows(_optimizers(row)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            continue  # its sender was not ours
        if shown:
            steps = integer(row.attributes.get(c.FLIGHT_STEPS)) or len(shown)
            return LastSteps(text(row.attributes.get(c.FLIGHT_TRIGGER)), row.attempt, row.rank, steps, shown)
    return None


def nonfinite_norms(connection: Connection, run_id: str, attempt: int) -> set[tuple[str, int]]:
    """Return the layers and steps of an attempt whose norms black boxes have as NaN or infinite."""
    rows = _boxes(connection, _event.run_id == run_id, _event.attempt == attempt)
    found: set[tuple[str, int]] = set()
    for row in [row for row in rows if _is_nonfinite(row)][:_BOXES_READ]:
        try:
            for ring in _optimizers(row).values():
                steps = [int(step) for step in ring["step"]]
                found |= {
                    (str(layer), step)
                    for layer, norms in ring["norms"].items()
                    for step, norm in zip(steps, norms, strict=True)
                    if norm is not None and not math.isfinite(norm)
                }
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
    return found


def _boxes(connection: Connection, *conditions: ColumnElement[bool]) -> list[_Box]:
    rows = connection.execute(
        select(_event.attempt, _event.rank, _event.attributes)
        .where(_event.name == c.FLIGHT_RECORD.name, *conditions)
        .order_by(_event.time)
    )
    return [_Box(*row) for row in rows]


def _is_nonfinite(row: _Box) -> bool:
    return bool(row.attributes.get(c.FLIGHT_TRIGGER) == _NONFINITE)


def _optimizers(row: _Box) -> Mapping[int, Mapping[str, Any]]:
    optimizers: Mapping[int, Mapping[str, Any]] = decode(
        base64.b64decode(str(row.attributes.get(c.FLIGHT_DATA)))
    )["optimizers"]
    return optimizers


def _rows(optimizers: Mapping[int, Mapping[str, Any]]) -> Iterator[LastStep]:
    """Yield the last steps of the first optimizer."""
    ring = optimizers[min(optimizers)]
    steps: Sequence[Any] = ring["step"]
    for place in range(max(0, len(steps) - _STEPS_SHOWN), len(steps)):
        layer, norm = _largest({name: column[place] for name, column in ring["norms"].items()})
        rates = ring["learning_rate"][place]
        yield LastStep(
            int(steps[place]),
            _number(ring["loss"][place]),
            _number(ring["gradient_norm"][place]),
            _number(rates[0] if rates else None),
            _number(ring["duration"][place]),
            layer,
            norm,
        )


def _largest(norms: Mapping[str, float | None]) -> tuple[str | None, float | None]:
    """Return the layer with the largest norm; one that is not finite is larger than all."""
    known = {str(name): float(norm) for name, norm in norms.items() if norm is not None}
    if not known:
        return None, None
    name = max(known, key=lambda each: known[each] if math.isfinite(known[each]) else math.inf)
    return name, known[name]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
