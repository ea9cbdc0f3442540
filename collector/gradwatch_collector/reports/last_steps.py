"""The last steps of a black box, as rows of text."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch.life.flight_recorder import decode
from gradwatch_collector.reports import wording
from gradwatch_collector.runs.telling import integer, text
from gradwatch_collector.storage import schema

_STEPS_SHOWN: Final = 8
HEADINGS: Final = ("Step", "Loss", "Gradient norm", "Learning rate", "Took", "Largest layer", "Its norm")


@dataclass(frozen=True, slots=True)
class LastSteps:
    """What a black box says. ``trigger``: why it was sent. ``rows``: cells under `HEADINGS`, oldest first."""

    trigger: str
    attempt: int
    rank: int
    steps: int
    rows: tuple[tuple[str, ...], ...]


def last_steps(connection: Connection, run_id: str) -> LastSteps | None:
    """Return the steps up to the first that was not finite, else up to the newest trouble; None without."""
    event = schema.event.c
    rows = connection.execute(
        select(event.attempt, event.rank, event.attributes)
        .where(event.run_id == run_id, event.name == c.FLIGHT_RECORD.name)
        .order_by(event.time)
    ).all()
    # Once all is NaN the steps before say nothing more.
    boxes = [row for row in rows if row.attributes.get(c.FLIGHT_TRIGGER) == "nonfinite"] or rows[::-1]
    for row in boxes:
        try:
            whole = decode(base64.b64decode(str(row.attributes.get(c.FLIGHT_DATA))))
            shown = tuple(_rows(whole["optimizers"]))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            continue  # its sender was not ours
        if shown:
            return LastSteps(
                text(row.attributes.get(c.FLIGHT_TRIGGER)) or wording.UNKNOWN,
                row.attempt,
                row.rank,
                integer(row.attributes.get(c.FLIGHT_STEPS)) or len(shown),
                shown,
            )
    return None


def _rows(optimizers: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the last steps of the first optimizer."""
    ring = optimizers[min(optimizers)]
    steps: Sequence[Any] = ring["step"]
    for place in range(max(0, len(steps) - _STEPS_SHOWN), len(steps)):
        layer, norm = _largest({name: column[place] for name, column in ring["norms"].items()})
        rates = ring["learning_rate"][place]
        took = ring["duration"][place]
        yield (
            str(int(steps[place])),
            _number(ring["loss"][place]),
            _number(ring["gradient_norm"][place]),
            _number(rates[0] if rates else None),
            "-" if took is None else wording.duration(float(took)),
            layer,
            _number(norm),
        )


def _largest(norms: Mapping[str, float | None]) -> tuple[str, float | None]:
    """Return the layer with the largest norm; one that is not finite is larger than all."""
    known = {name: norm for name, norm in norms.items() if norm is not None}
    if not known:
        return "-", None
    name = max(known, key=lambda each: known[each] if math.isfinite(known[each]) else math.inf)
    return name, known[name]


def _number(value: float | None) -> str:
    return "-" if value is None else wording.number(float(value))
