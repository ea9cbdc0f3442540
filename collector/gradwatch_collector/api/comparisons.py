"""Runs side by side as JSON; the shape is ``schemas/run-comparison.schema.json``."""

from __future__ import annotations

import math

from gradwatch_collector.api.run_list import run_json
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.runs.comparison import Compared, Comparison


def comparison_json(found: Comparison, *, everything: bool = False) -> Json:
    """Return what differs between runs, or all that is known of them; the first run is the reference."""
    return {
        "runs": [run_json(row) for row in found.runs],
        "facts": [_fact(each, found) for each in (found.facts if everything else found.differences)],
    }


def _fact(fact: Compared, found: Comparison) -> Json:
    return {
        "section": fact.section,
        "name": fact.name,
        "unit": fact.unit,
        "differs": fact.differs,
        "values": [_value(fact, index, row.run_id) for index, row in enumerate(found.runs)],
    }


def _value(fact: Compared, index: int, run_id: str) -> Json:
    value = fact.values[index]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return {
        "run_id": run_id,
        "value": value if is_finite else None,
        "nonfinite": not is_finite,
        "change": fact.change(index),
    }
