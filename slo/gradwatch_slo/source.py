"""The ``gradwatch`` metric source of OpenSLO files: a closed vocabulary, never a query language.

An indicator counts *units*. ``where`` selects which, ``measure`` says how each one is judged, ``groupBy``
reports them apart::

    metricSource:
      type: gradwatch
      spec:
        unit: run                   # run | step | checkpoint | epoch | slice
        where:                      # a unit must match every field given, with one of its values
          tier: [production]        # job, model, dataset, team, tier, and for `count` status, reason
        measure: success            # how a unit is judged, see below
        minDuration: 60s            # success, count: succeeded runs shorter than this are not counted
        deadline: 2h                # convergence: threshold of runs that bring no deadline of their own
        baseline: {run: RUN_ID}     # convergence, and values that compare runs: this run, not the usual ones
        groupBy: [tier]             # any of job, model, dataset, team, tier

``success`` and ``convergence`` judge a run good, bad or not counted by themselves (see
:mod:`gradwatch_slo.indicators`): they stand in ``ratioMetric.raw`` with ``rawType: success``. ``count``, the
default, is the number of ended runs that match: it stands in ``good`` (or ``bad``) and ``total``.

The values of a run, such as ``memory_headroom``, stand in ``thresholdMetric``: good are the runs whose value
compares as the objective's ``op`` and ``value`` say. The faults of steps and checkpoints, such as
``nonfinite``, stand in ``ratioMetric.raw`` with ``rawType: failure``: they are what is bad of all steps.

The units ``epoch`` and ``slice`` validate and are not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import Field

from gradwatch_slo.indicators import COMPARISONS, RUN_VALUES, UNIT_FAULTS, RunValue, UnitFault
from gradwatch_slo.runs import Status
from gradwatch_slo.strict import Length, Mismatch, StrictModel, given

SOURCE_TYPE: Final = "gradwatch"

Unit = Literal["run", "step", "checkpoint", "epoch", "slice"]
# A type checker reads literals only when they are spelled out; a test holds these to what they repeat.
Measure = Literal[
    "success",
    "convergence",
    "count",
    "nonfinite_steps",
    "gpu_utilization",
    "collective_p95",
    "collective_p95_ratio",
    "memory_headroom",
    "step_cost",
    "step_cost_ratio",
    "quality",
    "quality_delta",
    "effective_time_ratio",
    "unhealthy",
    "nonfinite",
    "failed",
]
GroupField = Literal["job", "model", "dataset", "team", "tier"]
Tier = Literal["production", "experiment"]
RunStatus = Literal["succeeded", "failed", "cancelled", "lost"]

# Measures that judge by themselves: of all units of a kind, and of one run.
FAULTS: Final[Mapping[str, UnitFault]] = {fault: fault for each in UNIT_FAULTS.values() for fault in each}
VALUES: Final[Mapping[str, RunValue]] = {value: value for value in RUN_VALUES}
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


class Baseline(StrictModel):
    """What is measured against: a run, by its id."""

    example: ClassVar[str] = "{run: RUN_ID}"

    run: Annotated[str, Field(min_length=1)]


class GradwatchSource(StrictModel):
    """``metricSource.spec`` of type ``gradwatch``; see the module for the fields."""

    unit: Unit
    where: Where = Where()
    measure: Measure = "count"
    min_duration: Length | None = None
    deadline: Length | None = None
    baseline: Baseline | None = None
    group_by: list[GroupField] = Field(default_factory=list)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield options that the measure does not have."""
        measure, unit = fields.get("measure", "count"), fields.get("unit")
        if measure in get_args(Measure):
            yield from _misfits(measure, unit, fields)
        group_by = fields.get("groupBy")
        if isinstance(group_by, list):
            for index, name in enumerate(group_by):
                if name in group_by[:index]:
                    yield (("groupBy", index), f"found '{name}' again, expected each field once")


def _misfits(measure: str, unit: Any, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
    """Yield what a source has and its measure does not."""
    units = _units_of(measure)
    if unit in get_args(Unit) and unit not in units:
        yield (("measure",), f"found {measure} of the unit {unit}, expected the unit {units[0]}")
    where = fields.get("where")
    if measure != "count" and isinstance(where, dict):
        for name in given(where, "status", "reason"):
            message = f"found a choice by {name}, expected none: {measure} judges it by itself"
            yield (("where", name), message)
    if measure not in ("success", "count", *RUN_VALUES) and given(fields, "minDuration"):
        yield (("minDuration",), f"found a minDuration, expected none with the measure {measure}")
    has = {"deadline": ("convergence",), "baseline": ("convergence", *COMPARISONS)}
    told = given(fields, *has)
    for name in told:
        if measure not in has[name]:
            yield ((name,), f"found a {name}, expected it only with the measure {' or '.join(has[name])}")
    if measure == "convergence" and len(told) > 1:
        yield (("baseline",), "found a baseline beside a deadline, expected one of them")


def _units_of(measure: str) -> tuple[str, ...]:
    """Return the units that a measure is of."""
    if measure == "count":
        return get_args(Unit)
    return tuple(unit for unit, faults in UNIT_FAULTS.items() if measure in faults) or ("run",)
