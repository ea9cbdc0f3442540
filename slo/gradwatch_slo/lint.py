"""What is legal in files of objectives, but useless: it never does what it seems to promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Final, get_args

from gradwatch_slo.burn_rules import has_rates, holds_within, is_alerted, least_look_back, reachable
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import RANGES, RunValue
from gradwatch_slo.links import Links, Place, PlacedAlert, PlacedIndicator, sources
from gradwatch_slo.openslo import SLO, DataSource, ObjectiveSpec, Operator
from gradwatch_slo.problems import Problem, suggestion
from gradwatch_slo.reader import Document
from gradwatch_slo.source import (
    ENDED_STATUSES,
    FAULTS,
    SOURCE_TYPE,
    VALUES,
    GradwatchSource,
    Tier,
    Unit,
)
from gradwatch_slo.verdict import FEWEST_EVENTS
from gradwatch_slo.wording import counted
from gradwatch_slo.yaml_lines import FieldPath


def lint(documents: Sequence[Document]) -> list[Problem]:
    """Return what to warn about, in the order of the documents, which have no mistakes, and their lines."""
    links = Links(documents)
    found = [*links.unused()]
    for document in documents:
        found += _of_types(document)
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
# More alike are only other spellings: `cloudwatch` is 0.63 like `gradwatch`, `gradwach` 0.94.
_MISSPELT: Final = 0.8
# No training service has more of them a second, by far.
_MOST_A_SECOND: Final[Mapping[Unit, int]] = {"run": 1, "checkpoint": 1, "step": 1_000}
# Fields that every run has, and all that they can be.
_ALL: Final = {"status": ENDED_STATUSES, "tier": get_args(Tier)}


def _of_types(document: Document) -> Iterator[Problem]:
    """Yield types of sources that are only nearly ours, and so are not evaluated."""
    types: list[tuple[FieldPath, str | None]] = [
        ((*path, "type"), source.type) for path, source in sources(document.content)
    ]
    if isinstance(document.content, DataSource):
        types.append((("spec", "type"), document.content.spec.type))
    for path, name in types:
        if name is not None and name != SOURCE_TYPE:
            hint = suggestion(name, [SOURCE_TYPE], likeness=_MISSPELT)
            if hint:
                yield document.problem(path, f"found '{name}', expected a source that is evaluated here{hint}")


def _of_slo(document: Document, slo: SLO, links: Links) -> Iterator[Problem]:
    indicators = links.indicators(document, slo)
    for index, (objective, indicator) in enumerate(zip(slo.spec.objectives, indicators, strict=True)):
        place = Place(document, ("spec", "objectives", index))
        yield from _of_target(place, objective)
        yield from _of_ignored(place, objective, slo, indicator)
        yield from _of_slices(place, objective, slo)
    placed_alerts = list(links.alerts(document, slo))
    for placed in placed_alerts:
        yield from _of_alert(slo, placed)
    if not slo.spec.is_composite and indicators[0] is not None:
        yield from _of_indicator(document, slo, indicators[0], links, placed_alerts)


def _of_target(place: Place, objective: ObjectiveSpec) -> Iterator[Problem]:
    percent = objective.target_percent
    if objective.ratio == 0:
        name = "target" if percent is None else "targetPercent"
        yield place.problem((name,), "found 0, expected more: whatever happens, it is met")
    elif percent is not None and percent < 1:
        message = f"found {percent}, expected a percentage; did you mean {percent.scaleb(2).normalize():f}?"
        yield place.problem(("targetPercent",), message)


def _of_ignored(
    place: Place, objective: ObjectiveSpec, slo: SLO, indicator: PlacedIndicator | None
) -> Iterator[Problem]:
    if indicator is not None and indicator.spec.ratio_metric is not None:
        for name, value in (("op", objective.op), ("value", objective.value)):
            if value is not None:
                message = "found it with a ratioMetric, expected it with a thresholdMetric: it is ignored"
                yield place.problem((name,), message)
    if objective.composite_weight is not None and not slo.spec.is_composite:
        message = "found it with an indicator of the whole SLO, expected it in a composite SLO: it is ignored"
        yield place.problem(("compositeWeight",), message)


def _of_slices(place: Place, objective: ObjectiveSpec, slo: SLO) -> Iterator[Problem]:
    length, of_time = objective.time_slice_window, slo.spec.window
    if length is None or of_time is None:
        return
    window = of_time.duration
    says, at = f"found {length}, expected", ("timeSliceWindow",)
    if length.nominal > window.nominal:
        yield place.problem(at, f"{says} at most the window of {window}")
        return
    if of_time.is_rolling:
        # It begins and ends within slices, and only whole ones are judged.
        slices = -(-window.nominal // length.nominal) - 1
    else:
        slices = window.nominal // length.nominal
    if slices < FEWEST_EVENTS:
        holds = f"the window of {window} holds {counted(slices, 'whole slice')}"
        yield place.problem(at, f"{says} a shorter one: {holds}, and a verdict needs {FEWEST_EVENTS}")
    elif one_spends_all(slices, objective.ratio):
        needed = f"with the target {objective.ratio.normalize():f} it takes {fewest_events(objective.ratio)}"
        holds = f"one bad slice of the {slices} in the window of {window} spends the budget"
        yield place.problem(at, f"{says} a shorter one: {holds}, and {needed} to allow one")


def _of_alert(slo: SLO, placed: PlacedAlert) -> Iterator[Problem]:
    alert, window, name = placed.alert, slo.spec.window, slo.metadata.name
    if not (alert.when_breaching or alert.when_no_data):
        message = (
            "found neither alertWhenBreaching nor alertWhenNoData true, expected one of them:"
            " as it is the alert can never fire"
        )
        yield placed.policy.problem((), message)
    if window is not None and alert.look_back.nominal > window.duration.nominal:
        message = f"found {alert.look_back}, expected at most the window of '{name}', {window.duration}"
        yield placed.condition.problem(("condition", "lookbackWindow"), message)
    if slo.spec.is_composite:
        return  # it burns as fast as all its objectives together, by their weights
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


def _of_indicator(
    document: Document, slo: SLO, indicator: PlacedIndicator, links: Links, alerts: Sequence[PlacedAlert]
) -> Iterator[Problem]:
    """Yield what is useless of an indicator that is evaluated here, and of objectives by what it counts."""
    metrics = dict(indicator.spec.sources())
    if any(links.source_type(source) != SOURCE_TYPE for source in metrics.values()):
        return
    found: dict[str, tuple[Place, GradwatchSource]] = {}
    window = slo.spec.window
    for path, source in metrics.items():
        place = Place(indicator.place.document, (*indicator.place.path, *path, "spec"))
        spec = GradwatchSource.model_validate(source.spec)
        found[path[-2]] = place, spec
        for name, length in (("minDuration", spec.min_duration), ("deadline", spec.deadline)):
            if window is not None and length is not None and length > window.duration.nominal:
                message = (
                    f"found {source.spec[name]}, expected at most the window of '{slo.metadata.name}',"
                    f" {window.duration}"
                )
                yield place.problem((name,), message)
    _, counted_by = found.get("total") or next(iter(found.values()))
    value = VALUES.get(counted_by.measure)
    if value is not None:
        yield from _of_value(document, slo.spec.objectives[0], value)
    if window is not None:
        yield from _of_window(document, slo, window.duration, counted_by, alerts)
    for name in ("good", "bad"):
        if name in found and found[name][1].unit == counted_by.unit:
            yield from _of_part(name, *found[name], counted_by)


def _of_window(
    document: Document, slo: SLO, window: Duration, source: GradwatchSource, alerts: Sequence[PlacedAlert]
) -> Iterator[Problem]:
    policies = [placed.alert for placed in alerts]
    for index, objective in enumerate(slo.spec.objectives):
        path = ("spec", "objectives", index)
        target, unit, time_slice = objective.ratio, source.unit, objective.time_slice_window
        if time_slice is not None:
            for placed in alerts:
                yield from _of_look_back(slo.metadata.name, time_slice, placed)
        says = f"found {target.normalize():f} over {window}, expected"
        if source.measure in FAULTS and not is_alerted(unit, target, window, time_slice, policies):
            slices = "" if time_slice is None else "shorter slices, "
            message = (
                f"{says} {slices}a higher target, a longer window or an alert policy: no alert is made of it,"
                " so nobody is told"
            )
            yield document.problem(path, message)
        most = _MOST_A_SECOND.get(unit)
        if most is None or slo.spec.budgeting_method != "Occurrences":
            continue
        if one_spends_all(window.nominal // timedelta(seconds=1) * most, target):
            message = (
                f"{says} a lower target or a longer window: one failure spends the budget, as it takes"
                f" {fewest_events(target)} {unit}s to allow one, more than {most} a second"
            )
            yield document.problem(path, message)


def _of_look_back(name: str, time_slice: Duration, placed: PlacedAlert) -> Iterator[Problem]:
    """Yield a look-back that does not always hold a whole slice."""
    look_back = placed.alert.look_back
    if look_back.nominal >= least_look_back(time_slice):
        return
    if has_rates(look_back, time_slice):
        why = "at times it holds no whole slice"
    else:
        fires = "always fires" if placed.alert.when_no_data else "can never fire"
        why = f"it holds no whole slice, so the alert {fires}"
    message = f"found {look_back}, expected at least twice the timeSliceWindow of '{name}', {time_slice}: {why}"
    yield placed.condition.problem(("condition", "lookbackWindow"), message)


def _of_part(name: str, place: Place, part: GradwatchSource, total: GradwatchSource) -> Iterator[Problem]:
    """Yield a good (or bad) part of the total that is all of it or nothing, whatever runs there are."""
    chosen, of = part.where.values(), {**_ALL, **total.where.values()}
    for field, values in chosen.items():
        if field in of and set(values).isdisjoint(of[field]):
            other = "bad" if name == "good" else "good"
            message = f"found none of total's, expected some: so every {total.unit} is {other}"
            yield place.problem(("where", field), message)
            return
    if all(field in of and set(values).issuperset(of[field]) for field, values in chosen.items()):
        yield place.problem((), f"found all of total, expected a part of it: so every {total.unit} is {name}")


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
