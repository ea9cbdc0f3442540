"""The last steps of a black box as JSON; the shape is ``schemas/last-steps.schema.json``."""

from __future__ import annotations

import math
from dataclasses import asdict

from sqlalchemy import Connection

from gradwatch_collector.api.shapes import Json
from gradwatch_collector.runs.black_box import LastStep, last_steps


def last_steps_json(connection: Connection, run_id: str) -> Json:
    """Return what the run's black box says of its last steps, oldest first; nothing is null."""
    found = last_steps(connection, run_id)
    return {
        "run_id": run_id,
        "trigger": None if found is None else found.trigger,
        "attempt": None if found is None else found.attempt,
        "rank": None if found is None else found.rank,
        "step_count": 0 if found is None else found.steps,
        "steps": [] if found is None else [_step_json(step) for step in found.rows],
    }


def _step_json(step: LastStep) -> Json:
    told = asdict(step)
    odd = {name: value for name, value in told.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**told, **dict.fromkeys(odd), "nonfinite": {name: _name(value) for name, value in odd.items()}}


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
