"""Objectives as they are evaluated, made from validated OpenSLO documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

from gradwatch_slo.durations import Duration
from gradwatch_slo.files import read_files
from gradwatch_slo.indicators import (
    UNIT_FAULTS,
    Convergence,
    CountRatio,
    Measure,
    Selection,
    SuccessRate,
    Threshold,
    UnitRatio,
)
from gradwatch_slo.links import BurnRateAlert, Links
from gradwatch_slo.openslo import (
    SLO,
    MetricSource,
    ObjectiveSpec,
    RatioMetric,
    SLISpec,
    TimeWindowSpec,
    source_mismatches,
)
from gradwatch_slo.problems import ObjectiveFileError, Problem, one_of
from gradwatch_slo.reader import Document
from gradwatch_slo.slices import Slicing
from gradwatch_slo.source import ENDED_STATUSES, FAULTS, SOURCE_TYPE, VALUES, GradwatchSource, Unit
from gradwatch_slo.windows import TimeWindow
from gradwatch_slo.yaml_lines import FieldPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One target of one SLO that gradwatch evaluates itself.

    ``name`` is the SLO's ``metadata.name``, with the objective's own after a slash if the SLO has several;
    ``indicator`` is the SLI's. ``target`` in [0, 1), as written.
    ``selection`` says which runs it is about; ``group_by`` which fields it is reported by. ``unit``: what is
    counted; with ``slicing`` it makes slices of time good or bad, which are what is judged. ``alerts`` are
    those that its files ask for; ``team`` is the label of that name of the SLO.
    """

    name: str
    indicator: str
    target: Decimal
    window: TimeWindow
    measure: Measure
    selection: Selection
    group_by: tuple[str, ...] = ()
    unit: Unit = "run"
    slicing: Slicing | None = None
    alerts: tuple[BurnRateAlert, ...] = ()
    team: str | None = None

    @property
    def time_slice(self) -> Duration | None:
        """How long its slices of time are; None, if it judges events."""
        return None if self.slicing is None else self.slicing.length


@dataclass(frozen=True, slots=True)
class Unevaluated:
    """An SLO that is valid OpenSLO, but not for gradwatch to evaluate, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} cannot be evaluated: {self.reason}"


@dataclass(frozen=True, slots=True)
class ObjectiveSet:
    """What files of objectives contain: objectives, and SLOs that can only be warned about."""

    objectives: tuple[Objective, ...]
    unevaluated: tuple[Unevaluated, ...] = ()


def load_objectives(paths: Iterable[Path]) -> ObjectiveSet:
    """Read and validate files and folders of them; documents may refer to each other across files.

    Raises:
        ObjectiveFileError: with every problem of every file.
    """
    return objectives_of(read_files(paths))


def objectives_of(documents: Sequence[Document]) -> ObjectiveSet:
    """Return what validated documents ask for.

    Raises:
        ObjectiveFileError: references that lead nowhere, names used twice, indicators without a meaning.
    """
    catalogue = _Catalogue(documents)
    objectives: list[Objective] = []
    unevaluated: list[Unevaluated] = []
    named: defaultdict[str, list[Objective]] = defaultdict(list)
    for document in documents:
        slo = document.content
        if not isinstance(slo, SLO):
            continue
        made = catalogue.translate(document, slo)
        if isinstance(made, Unevaluated):
            unevaluated.append(made)
        for objective in made if isinstance(made, list) else ():
            if not all(_told_apart(objective, other) for other in named[objective.name]):
                message = (
                    f"found a second {objective.name}, expected another name, or a field of groupBy of which"
                    " one selects a single value, and the other does not select it"
                )
                catalogue.problems.append(document.problem(("metadata", "name"), message))
            named[objective.name].append(objective)
            objectives.append(objective)
    if catalogue.problems:
        order = {file: index for index, file in enumerate(dict.fromkeys(each.file for each in documents))}
        raise ObjectiveFileError(sorted(catalogue.problems, key=lambda each: (order[each.file], each.line)))
    return ObjectiveSet(tuple(objectives), tuple(unevaluated))


def _told_apart(one: Objective, other: Objective) -> bool:
    """Return whether nothing that is shown of one could be of the other: as tiers are, which share a name.

    What is not in both's ``group_by`` is no label on `/metrics`, and an alert of one would be about both. Of a
    field with several values neither a rule has the label, nor a report by other fields the group.
    """
    limits, others = dict(one.selection.fields), dict(other.selection.fields)
    return any(
        set(limits[name]).isdisjoint(others[name]) and 1 in (len(limits[name]), len(others[name]))
        for name in one.group_by
        if name in other.group_by and name in limits and name in others
    )


class _Catalogue:
    """What the names in documents lead to, and the problems found while SLOs are translated."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._links = Links(documents)
        self.problems: list[Problem] = list(self._links.problems())
        seen: set[tuple[str, str]] = set()
        for document in documents:
            content = document.content
            key = (content.kind, content.metadata.name)
            if key in seen and content.kind != "SLO":
                message = f"found a second {content.kind} '{key[1]}', expected each name once"
                self.problems.append(document.problem(("metadata", "name"), message))
            seen.add(key)

    def translate(self, document: Document, slo: SLO) -> list[Objective] | Unevaluated:
        """Return an objective for each target; none where there is a problem."""
        spec = slo.spec
        indicators = self._links.indicators(document, slo)
        for index, each in enumerate(indicators):
            if each is not None and each.spec.threshold_metric is not None:
                self._check_threshold(document, slo, index)
        if spec.is_composite:
            return Unevaluated(slo.metadata.name, "it is a composite of several indicators")
        indicator = indicators[0]
        if indicator is None:
            return []  # told with all other names that lead nowhere
        source, measure = self._measure(indicator.place.document, indicator.place.path, indicator.spec, slo)
        if isinstance(measure, str):
            return Unevaluated(slo.metadata.name, measure)
        if source is None or measure is None:
            return []
        if spec.window is None:
            return Unevaluated(slo.metadata.name, "no timeWindow says which time it is about")
        return [
            Objective(
                name=told,
                indicator=indicator.name,
                target=objective.ratio,
                window=_window(spec.window),
                measure=measure,
                selection=_selection(source),
                group_by=tuple(source.group_by),
                slicing=_slicing(slo, objective),
                unit=source.unit,
                alerts=tuple(placed.alert for placed in self._links.alerts(document, slo)),
                team=_team(slo),
            )
            for told, objective in zip(_names(slo), spec.objectives, strict=True)
        ]

    def _check_threshold(self, document: Document, slo: SLO, index: int) -> None:
        objectives, path = slo.spec.objectives, ("spec", "objectives")
        if len(objectives) > 1 and not slo.spec.is_composite:
            message = f"found {len(objectives)}, expected only 1 with a thresholdMetric"
            self._problem(document, path, message)
        if objectives[index].op is None or objectives[index].value is None:
            message = "found no op and value, expected both with a thresholdMetric"
            self._problem(document, (*path, index), message)

    def _measure(
        self, document: Document, path: FieldPath, indicator: SLISpec, slo: SLO
    ) -> tuple[GradwatchSource | None, Measure | str | None]:
        """Return the source that selects runs and the measure: a reason if there is none, None on a problem."""
        sources: dict[str, GradwatchSource] = {}
        for inner, metric in indicator.sources():
            source = self._source(document, (*path, *inner), metric)
            if not isinstance(source, GradwatchSource):
                return None, source
            if source.unit not in ("run", *UNIT_FAULTS):
                return None, f"units of kind {source.unit} are not evaluated"
            sources[inner[-2]] = source
        if indicator.ratio_metric is None:
            return sources["thresholdMetric"], self._compared(document, path, sources["thresholdMetric"], slo)
        path = (*path, "ratioMetric")
        if "raw" in sources:
            return sources["raw"], self._judged(document, path, indicator.ratio_metric, sources["raw"])
        for source in sources.values():
            if source.unit != "run":
                return None, f"units of kind {source.unit} are evaluated by their faults, in a raw ratio"
        return sources["total"], self._counted(document, path, sources)

    def _compared(
        self, document: Document, path: FieldPath, source: GradwatchSource, slo: SLO
    ) -> Measure | None:
        value = VALUES.get(source.measure)
        if value is None:
            message = f"found '{source.measure}', expected {one_of(VALUES)} in a thresholdMetric"
            self._problem(document, (*path, "thresholdMetric", "metricSource", "spec", "measure"), message)
            return None
        objective = slo.spec.objectives[0]
        if objective.op is None or objective.value is None:
            return None  # told with the objective
        return Threshold(
            value, objective.op, objective.value, source.min_duration or timedelta(0), _pinned(source)
        )

    def _judged(
        self, document: Document, path: FieldPath, ratio: RatioMetric, source: GradwatchSource
    ) -> Measure | None:
        fault = FAULTS.get(source.measure)
        if source.unit == "run":
            raw_type, why = "success", "gradwatch measures are good / counted"
        else:
            raw_type, why = "failure", f"faults are what is bad of all {source.unit}s"
        if ratio.raw_type != raw_type:
            message = f"found '{ratio.raw_type}', expected '{raw_type}': {why}"
            self._problem(document, (*path, "rawType"), message)
        if source.measure == "success":
            return SuccessRate(source.min_duration or timedelta(0))
        if source.measure == "convergence":
            return Convergence(source.deadline, _pinned(source))
        expected: Iterable[str] = ("success", "convergence")
        if source.unit == "step" or source.unit == "checkpoint":
            if fault is not None:
                return UnitRatio(source.unit, fault)
            expected = UNIT_FAULTS[source.unit]
        message = f"found '{source.measure}', expected {one_of(expected)} in a raw ratio"
        self._problem(document, (*path, "raw", "metricSource", "spec", "measure"), message)
        return None

    def _counted(
        self, document: Document, path: FieldPath, sources: dict[str, GradwatchSource]
    ) -> Measure | None:
        complete = True
        for name, source in sources.items():
            spec = (*path, name, "metricSource", "spec")
            misplaced = [("measure", f"found '{source.measure}', expected 'count' here, or raw")]
            misplaced *= source.measure != "count"
            if name != "total":
                total = sources["total"]
                if source.group_by and source.group_by != total.group_by:
                    misplaced.append(
                        ("groupBy", "found another groupBy than total's, expected the same or none")
                    )
                if source.min_duration is not None and source.min_duration != total.min_duration:
                    misplaced.append(
                        ("minDuration", "found another one than total's, expected the same or none")
                    )
            for field, message in misplaced:
                complete = False
                self._problem(document, (*spec, field), message)
        if not complete:
            return None
        name = "bad" if "bad" in sources else "good"
        return CountRatio(
            total=_selection(sources["total"], outcome=True),
            matching=_selection(sources[name], outcome=True),
            inverted=name == "bad",
            min_duration=sources["total"].min_duration or timedelta(0),
        )

    def _source(
        self, document: Document, path: FieldPath, metric: MetricSource
    ) -> GradwatchSource | str | None:
        """Return the source; or why it is not gradwatch's; or None after a problem."""
        kind = self._links.source_type(metric)
        if kind is None:
            return None  # told with all other names that lead nowhere
        if kind != SOURCE_TYPE:
            return f"metrics of the source type '{kind}' are out of reach, only gradwatch's own are evaluated"
        mismatches = list(source_mismatches(metric.spec))
        for inner, message in mismatches:
            self._problem(document, (*path, "spec", *inner), message)
        return None if mismatches else GradwatchSource.model_validate(metric.spec)

    def _problem(self, document: Document, path: FieldPath, message: str) -> None:
        problem = document.problem(path, message)
        if problem not in self.problems:  # an SLI may serve several SLOs
            self.problems.append(problem)


def _selection(source: GradwatchSource, *, outcome: bool = False) -> Selection:
    """Return which runs a source is about, or with ``outcome`` also how they ended."""
    values = source.where.values()
    if outcome:
        values.setdefault("status", ENDED_STATUSES)
    else:
        values = {name: value for name, value in values.items() if name not in ("status", "reason")}
    return Selection(tuple(values.items()))


def _pinned(source: GradwatchSource) -> str | None:
    return None if source.baseline is None else source.baseline.run


def _team(slo: SLO) -> str | None:
    team = slo.metadata.labels.get("team")
    return team if isinstance(team, str) else None


def _names(slo: SLO) -> list[str]:
    """Return what each objective of an SLO is called: the SLO's name, and which one it is if it has several."""
    name, objectives = slo.metadata.name, slo.spec.objectives
    if len(objectives) == 1:
        return [name]
    told = [objective.display_name or f"{objective.ratio:f}" for objective in objectives]
    if len(set(told)) < len(told):
        told = [str(number) for number in range(1, len(told) + 1)]
    return [f"{name}/{each}" for each in told]


def _slicing(slo: SLO, objective: ObjectiveSpec) -> Slicing | None:
    if slo.spec.budgeting_method == "Occurrences":
        return None
    assert objective.time_slice_window is not None  # validation lets none through without
    return Slicing(objective.time_slice_window, objective.time_slice_target)


def _window(spec: TimeWindowSpec) -> TimeWindow:
    calendar = spec.calendar
    start = None if calendar is None else calendar.start_time.replace(tzinfo=ZoneInfo(calendar.time_zone))
    return TimeWindow(spec.duration, start)
