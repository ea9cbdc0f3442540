"""Gradient norms by layer as JSON of a bounded size; the shape is ``schemas/layer-map.schema.json``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.api.curves import nonfinite_json, shown
from gradwatch_collector.api.layer_map import STRETCHES, LayerMap, layer_map
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.runs.curves import (
    Doubles,
    StepClock,
    read_curves,
    read_gradient_norms,
    read_step_clock,
)
from gradwatch_collector.runs.nonfinite_steps import Mark, NonfiniteTold, nonfinite_steps, nonfinite_told, spans
from gradwatch_collector.storage import schema

MAX_ROWS: Final = 400
MAX_STRETCHES: Final = 400
FEW_ROWS: Final = 150
# After the first, nearly every layer is NaN in nearly every step.
_MOST_MARKS: Final = 2_000
_MOST_SPANS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMapQuery:
    """``attempt``: None is the newest. ``text``: what layers' names contain, in either case.

    ``rows``, ``stretches``: at most; several layers next to each other share a row where there are more.
    """

    run_id: str
    attempt: int | None = None
    text: str = ""
    rows: int = FEW_ROWS
    stretches: int = STRETCHES


def layer_map_json(connection: Connection, query: LayerMapQuery) -> Json:
    """Return the largest norms of each stretch of steps, and where they were not finite.

    Where comes from whatever tells it: of norms that arrived as NaN or infinite it is the last step of their
    stretch; of events and of black boxes the step itself. Of most bad steps no layer is known: that they were
    bad is told by the loss and the global norm.
    """
    attempt = query.attempt or _newest_attempt(connection, query.run_id)
    clock = read_step_clock(connection, query.run_id)
    found = layer_map(connection, query.run_id, attempt, clock, query.stretches)
    told = nonfinite_told(connection, query.run_id, attempt)
    curves = (
        *read_curves(connection, query.run_id, c.LOSS, clock),
        *read_gradient_norms(connection, query.run_id, clock),
    )
    bad = nonfinite_steps((each for each in curves if each.attempt == attempt), told.steps)
    marks = nonfinite_marks(found, told)
    known = () if found is None else found.layers
    # Layers that were never finite are at the end.
    layers = [*known, *sorted({layer for layer, _ in marks}.difference(known))]
    chosen = [place for place, name in enumerate(layers) if query.text.casefold() in name.casefold()]
    rows = [part.tolist() for part in np.array_split(chosen, min(len(chosen), query.rows) or 1) if len(part)]
    row_of = {layers[place]: row for row, places in enumerate(rows) for place in places}
    shown_marks = sorted((mark for mark in marks if mark[0] in row_of), key=lambda m: (m[1], row_of[m[0]]))
    return {
        "run_id": query.run_id,
        "attempt": attempt,
        "layer_count": len(layers),
        "is_timed": found is not None and found.is_timed,
        "first_step": _first_step(clock, attempt),
        "ends": [] if found is None else [shown(end) for end in found.ends.tolist()],
        "rows": [
            {"layer": layers[places[0]], "last_layer": layers[places[-1]], "layer_count": len(places)}
            for places in rows
        ],
        "values": [] if found is None else [_largest(found.values, places) for places in rows],
        "nonfinite": [
            {"layer": layer, "row": row_of[layer], "step": step} for layer, step in shown_marks[:_MOST_MARKS]
        ],
        "nonfinite_count": len(shown_marks),
        "nonfinite_steps": nonfinite_json(bad),
        "nonfinite_spans": [list(span) for span in spans(bad, _MOST_SPANS)],
    }


def nonfinite_marks(found: LayerMap | None, told: NonfiniteTold) -> set[Mark]:
    """Return where gradients are known not to have been finite, from whatever tells of layers."""
    return {*_of_map(found), *told.gradients}


def _newest_attempt(connection: Connection, run_id: str) -> int:
    attempt = schema.attempt.c
    newest = select(attempt.attempt).where(attempt.run_id == run_id).order_by(attempt.attempt.desc()).limit(1)
    return connection.scalar(newest) or 1


def _first_step(clock: StepClock, attempt: int) -> int:
    return min((int(known.last[0]) for (of, _), known in clock.items() if of == attempt), default=0)


def _of_map(found: LayerMap | None) -> Iterator[Mark]:
    if found is not None:
        for row, column in zip(*np.nonzero(found.nonfinite), strict=True):
            yield found.layers[row], int(found.ends[column])


def _largest(values: Doubles, places: Sequence[int]) -> list[float | None]:
    """Return the largest of some layers for each stretch."""
    known = [place for place in places if place < len(values)]
    if not known:
        return [None] * values.shape[1]
    return [shown(value) for value in np.fmax.reduce(values[known], axis=0).tolist()]
