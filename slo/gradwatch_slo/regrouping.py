"""Objectives as they are asked for: by other fields, over another window, or of one group only. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradwatch_slo.indicators import Selection
from gradwatch_slo.objective import Objective


def grouped(objective: Objective, fields: Sequence[str]) -> Objective:
    """Return the objective, reported by ``fields``.

    A field of its own ``group_by`` of which it selects one value stays: it splits nothing, and tells the
    objectives of several tiers apart.
    """
    fixed = {name for name, values in objective.selection.fields if len(values) == 1}
    kept = [name for name in objective.group_by if name in fixed and name not in fields]
    return replace(objective, group_by=(*kept, *fields))


def narrowed(objective: Objective, wanted: Mapping[str, str]) -> Objective | None:
    """Return the objective over the runs of one group only, by its fields; None if it is about none of them."""
    fields = dict(objective.selection.fields)
    if any(value not in fields.get(name, (value,)) for name, value in wanted.items()):
        return None
    fields |= {name: (value,) for name, value in wanted.items()}
    others = [name for name in wanted if name not in objective.group_by]
    return replace(
        objective, selection=Selection(tuple(fields.items())), group_by=(*objective.group_by, *others)
    )
