"""The ``gradwatch`` metric source of OpenSLO files: a closed vocabulary, never a query language.

An indicator counts *units*. ``where`` selects which, ``measure`` says how each one is judged, ``groupBy``
reports them apart::

    metricSource:
      type: gradwatch
      spec:
        unit: run                   # run | step | checkpoint | epoch | slice
        where:                      # a unit must match every field given, with one of its values
          tier: [production]        # job, model, dataset, team, tier, and for `count` status, reason
        measure: success            # success | convergence | count
        minDuration: 60s            # success, count: succeeded runs shorter than this are not counted
        deadline: 2h                # convergence: threshold of runs that bring no deadline of their own
        groupBy: [tier]             # any of job, model, dataset, team, tier

``success`` and ``convergence`` judge a run good, bad or not counted by themselves (see
:mod:`gradwatch_slo.indicators`): they stand in ``ratioMetric.raw`` with ``rawType: success``. ``count``, the
default, is the number of ended runs that match: it stands in ``good`` (or ``bad``) and ``total``.

Only the unit ``run`` is evaluated so far; the others validate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field

from gradwatch_slo.runs import Status
from gradwatch_slo.strict import Length, Mismatch, StrictModel, given

SOURCE_TYPE: Final = "gradwatch"

Unit = Literal["run", "step", "checkpoint", "epoch", "slice"]
Measure = Literal["success", "convergence", "count"]
GroupField = Literal["job", "model", "dataset", "team", "tier"]
# A type checker reads literals only when they are spelled out; a test holds these to what they repeat.
Tier = Literal["production", "experiment"]
RunStatus = Literal["succeeded", "failed", "cancelled", "lost"]

ENDED_STATUSES: Final = tuple(status.value for status in Status if status is not Status.RUNNING)

Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Where(StrictModel):
    """Which units count: every given field must have one of the given values."""

    job: Words | None = None
    model: Words | None = None
    dataset: Words | None = None
    team: Words | None = None
    tier: Annotated[list[Tier], Field(min_length=1)] | None = None
    status: Annotated[list[RunStatus], Field(min_length=1)] | None = None
    reason: Words | None = None

    def values(self) -> dict[str, tuple[str, ...]]:
        """Return the accepted values of each field that was given, as written."""
        return {
            name: tuple(dict.fromkeys(value))
            for name in type(self).model_fields
            if (value := getattr(self, name)) is not None
        }


class GradwatchSource(StrictModel):
    """``metricSource.spec`` of type ``gradwatch``; see the module for the fields."""

    unit: Unit
    where: Where = Where()
    measure: Measure = "count"
    min_duration: Length | None = None
    deadline: Length | None = None
    group_by: list[GroupField] = Field(default_factory=list)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield options that the measure does not have."""
        measure, unit = fields.get("measure", "count"), fields.get("unit")
        if measure in ("success", "convergence"):
            if unit in get_args(Unit) and unit != "run":
                yield (("measure",), f"found {measure} of the unit {unit}, expected the unit run")
            where = fields.get("where")
            for name in given(where, "status", "reason") if isinstance(where, dict) else ():
                yield (
                    ("where", name),
                    f"found a choice by {name}, expected none: {measure} judges it by itself",
                )
        if measure == "convergence" and given(fields, "minDuration"):
            yield (
                ("minDuration",),
                "found a minDuration, expected it only with the measures success and count",
            )
        if measure in ("success", "count") and given(fields, "deadline"):
            yield (("deadline",), "found a deadline, expected it only with the measure convergence")
        group_by = fields.get("groupBy")
        if isinstance(group_by, list):
            for index, name in enumerate(group_by):
                if name in group_by[:index]:
                    yield (("groupBy", index), f"found '{name}' again, expected each field once")
