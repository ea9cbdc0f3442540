"""What is legal in files of objectives, but useless: it never does what it seems to promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Final

from pydantic import ValidationError

from gradwatch_slo.burn_rules import holds_within, is_alerted, reachable
from gradwatch_slo.indicators import RANGES, RunValue
from gradwatch_slo.links import BurnRateAlert, Links, PlacedAlert, sources
from gradwatch_slo.openslo import SLO, ObjectiveSpec, Operator
from gradwatch_slo.problems import Problem
from gradwatch_slo.reader import Document
from gradwatch_slo.source import FAULTS, VALUES, GradwatchSource, Unit
from gradwatch_slo.verdict import FEWEST_EVENTS
from gradwatch_slo.wording import counted
from gradwatch_slo.yaml_lines import FieldPath


def lint(documents: Sequence[Document]) -> list[Problem]:
    """Return what to warn about, in the order of the documents and their lines."""
    links = Links(documents)
    found = [*links.unused()]
    for document in documents:
        if isinstance(document.content, SLO):
            found += _of_slo(document, document.content, links)
    order = {file: index for index, file in enumerate(dict.fromkeys(each.file for each in documents))}
    # A condition that serves several SLOs of one target says the same of each.
    return sorted(dict.fromkeys(found), key=lambda each: (order[each.file], each.line, each.field))


def one_spends_all(events: int, target: Decimal) -> bool:
    """Return whether one bad of a window's ``events`` is more than the target allows: n (1 - target) < 1."""
    return events * (1 - Fraction(target)) < 1


def fewest_events(target: Decimal) -> int:
    """Return how many events a window must have for its budget to hold a bad one: ceil(1 / (1 - target))."""
    return math.ceil(1 / (1 - Fraction(target)))


_NEGATED: Final[Mapping[Operator, Operator]] = {"gt": "lte", "gte": "lt", "lt": "gte", "lte": "gt"}


def _of_slo(document: Document, slo: SLO, links: Links) -> Iterator[Problem]:
    for index, objective in enumerate(slo.spec.objectives):
        path = ("spec", "objectives", index)
        if objective.ratio == 0:
            name = "target" if objective.target is not None else "targetPercent"
            yield document.problem((*path, name), "found 0, expected more: whatever happens, it is met")
        yield from _of_slices(document, slo, objective, path)
    placed_alerts = list(links.alerts(document, slo))
    for placed in placed_alerts:
        yield from _of_alert(slo, placed)
    sli = links.indicator(document, slo)
    if sli is not None:
        yield from _of_source(sli, document, slo, [placed.alert for placed in placed_alerts])


def _of_slices(document: Document, slo: SLO, objective: ObjectiveSpec, path: FieldPath) -> Iterator[Problem]:
    length, of_time = objective.time_slice_window, slo.spec.time_window[0]
    if length is None:
        return
    window = of_time.duration
    says, at = f"found {length}, expected", (*path, "timeSliceWindow")
    if length.nominal > window.nominal:
        yield document.problem(at, f"{says} at most the window of {window}")
        return
    if of_time.is_rolling:
        # It begins and ends within slices, and only whole ones are judged.
        slices = -(-window.nominal // length.nominal) - 1
    else:
        slices = window.nominal // length.nominal
    if slices < FEWEST_EVENTS:
        holds = f"the window of {window} holds {counted(slices, 'whole slice')}"
        yield document.problem(at, f"{says} a shorter one: {holds}, and a verdict needs {FEWEST_EVENTS}")
    elif one_spends_all(slices, objective.ratio):
        needed = f"with the target {objective.ratio.normalize():f} it takes {fewest_events(objective.ratio)}"
        holds = f"one bad slice of the {slices} in the window of {window} spends the budget"
        yield document.problem(at, f"{says} a shorter one: {holds}, and {needed} to allow one")


def _of_alert(slo: SLO, placed: PlacedAlert) -> Iterator[Problem]:
    alert, window, name = placed.alert, slo.spec.time_window[0].duration, slo.metadata.name
    if not (alert.when_breaching or alert.when_resolved or alert.when_no_data):
        message = (
            "found none of alertWhenBreaching, alertWhenResolved and alertWhenNoData true, expected one:"
            " as it is the alert can never fire"
        )
        yield placed.policy.problem((), message)
    if alert.look_back.nominal > window.nominal:
        message = f"found {alert.look_back}, expected at most the window of '{name}', {window}"
        yield placed.condition.problem(("condition", "lookbackWindow"), message)
    for objective in slo.spec.objectives:
        target = objective.ratio
        says = f"found {alert.operator} {alert.threshold}, expected"
        most = _decimal(1 / (1 - Fraction(target)))
        rates = f"with the target {target.normalize():f} of '{name}' burn rates go from 0 to {most}"
        at = ("condition", "threshold")
        if not reachable(alert.operator, alert.threshold, target):
            yield placed.condition.problem(at, f"{says} what can be: {rates}, so the alert can never fire")
        elif not reachable(_NEGATED[alert.operator], alert.threshold, target):
            yield placed.condition.problem(at, f"{says} what need not be: {rates}, so the alert always fires")


def _of_source(
    sli: Document, document: Document, slo: SLO, alerts: Sequence[BurnRateAlert]
) -> Iterator[Problem]:
    window = slo.spec.time_window[0].duration.nominal
    for path, source in sources(sli.content):
        try:
            spec = GradwatchSource.model_validate(source.spec)
        except ValidationError:
            continue  # a source of another type
        value = VALUES.get(spec.measure)
        if value is not None:
            yield from _of_value(document, slo.spec.objectives[0], value)
        if spec.measure in FAULTS:
            yield from _of_silence(document, slo, spec.unit, alerts)
        for name, length in (("minDuration", spec.min_duration), ("deadline", spec.deadline)):
            if length is not None and length > window:
                message = (
                    f"found {source.spec[name]}, expected at most the window of '{slo.metadata.name}',"
                    f" {slo.spec.time_window[0].duration}"
                )
                yield sli.problem((*path, "spec", name), message)


def _of_silence(document: Document, slo: SLO, unit: Unit, alerts: Sequence[BurnRateAlert]) -> Iterator[Problem]:
    window = slo.spec.time_window[0].duration
    for index, objective in enumerate(slo.spec.objectives):
        if not is_alerted(unit, objective.ratio, window, alerts):
            message = (
                f"found {objective.ratio.normalize():f} over {window}, expected a higher target, a longer"
                " window or an alert policy: no alert is made of it, so nobody is told"
            )
            yield document.problem(("spec", "objectives", index), message)


def _of_value(document: Document, objective: ObjectiveSpec, value: RunValue) -> Iterator[Problem]:
    operator, bound, limits = objective.op, objective.value, RANGES[value]
    if operator is None or bound is None:
        return
    least, most = ("any number" if limit is None else limit for limit in limits)
    says = f"found {operator} {bound}, expected"
    what = f"{value} goes from {least} to {most}"
    path = ("spec", "objectives", 0, "value")
    if not holds_within(operator, bound, *limits):
        yield document.problem(path, f"{says} what can be: {what}, so every run is bad")
    elif not holds_within(_NEGATED[operator], bound, *limits):
        yield document.problem(path, f"{says} what need not be: {what}, so every run is good")


def _decimal(number: Fraction) -> str:
    """Return a number with at most four decimals, cut and not rounded."""
    return f"{Decimal(math.floor(number * 10_000)).scaleb(-4).normalize():f}"
