"""Names that lead from one document to another, and the alerts that are put together along them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from gradwatch_slo.durations import Duration
from gradwatch_slo.openslo import (
    SLI,
    SLO,
    AlertCondition,
    AlertConditionSpec,
    AlertPolicy,
    AlertPolicySpec,
    DataSource,
    MetricSource,
    ObjectiveSpec,
    OpenSLO,
    Operator,
    PolicyItem,
    SLISpec,
    SLOSpec,
)
from gradwatch_slo.problems import Problem, suggestion
from gradwatch_slo.reader import Document
from gradwatch_slo.source import SOURCE_TYPE
from gradwatch_slo.yaml_lines import FieldPath


@dataclass(frozen=True, slots=True)
class Place:
    """A field, or a mapping of fields, in a document."""

    document: Document
    path: FieldPath = ()

    def problem(self, field: FieldPath, message: str) -> Problem:
        """Return a problem with a field below."""
        return self.document.problem((*self.path, *field), message)


Binding = Literal["always", "among_others", "never"]


@dataclass(frozen=True, slots=True)
class Link:
    """A name by which one document refers to another.

    ``binding``: whether it must lead somewhere. A kind of which the files have nothing may be kept elsewhere;
    but where some are, the others are missing (``among_others``).
    """

    kind: str
    name: str
    path: FieldPath
    binding: Binding = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnRateAlert:
    """An alert policy with its condition and the names of its targets, wherever they were written.

    It fires once the burn rate over ``look_back`` has compared with ``threshold`` for ``alert_after``.
    """

    policy: str
    severity: str
    operator: Operator
    threshold: Decimal
    look_back: Duration
    alert_after: Duration | None
    targets: tuple[str, ...]
    when_breaching: bool
    when_no_data: bool


@dataclass(frozen=True, slots=True)
class PlacedAlert:
    """An alert, and where the ``spec`` of its policy and that of its condition were written."""

    alert: BurnRateAlert
    policy: Place
    condition: Place


@dataclass(frozen=True, slots=True)
class PlacedIndicator:
    """An indicator, and where its ``spec`` was written."""

    name: str
    spec: SLISpec
    place: Place


class Links:
    """The documents of some files by kind and name."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._named: dict[tuple[str, str], Document] = {}
        for document in documents:
            self._named.setdefault((document.content.kind, document.content.metadata.name), document)

    def problems(self) -> Iterator[Problem]:
        """Yield names that lead nowhere, and sources that are of another type than they say."""
        kinds = {kind for kind, _ in self._named}
        for document in self._documents:
            for link in links(document.content):
                binds = link.binding == "always" or (link.binding == "among_others" and link.kind in kinds)
                if binds and (link.kind, link.name) not in self._named:
                    names = [name for kind, name in self._named if kind == link.kind]
                    yield document.problem(
                        link.path,
                        f"found '{link.name}', expected the name of {_a(link.kind)} in these files"
                        + suggestion(link.name, names),
                    )
            yield from self._mistyped(document)

    def unused(self) -> Iterator[Problem]:
        """Yield objects that nothing refers to: all but SLOs are only there for others."""
        used = {(link.kind, link.name) for document in self._documents for link in links(document.content)}
        for (kind, name), document in self._named.items():
            if kind != "SLO" and (kind, name) not in used:
                message = f"found {_a(kind)} '{name}' that nothing refers to, expected one that is used"
                yield document.problem(("metadata", "name"), message)

    def indicators(self, document: Document, slo: SLO) -> list[PlacedIndicator | None]:
        """Return the indicator of each objective, or None where its name leads nowhere."""
        paths: list[FieldPath] = [("spec", "objectives", index) for index in range(len(slo.spec.objectives))]
        if slo.spec.is_composite:
            holders = zip(paths, slo.spec.objectives, strict=True)
            return [self._indicator(Place(document, path), holder) for path, holder in holders]
        return [self._indicator(Place(document, ("spec",)), slo.spec)] * len(paths)

    def source_type(self, source: MetricSource) -> str | None:
        """Return the type of a source, by itself or its DataSource; None where that name leads nowhere."""
        if source.type is not None:
            return source.type
        found = self._named.get(("DataSource", source.metric_source_ref or ""))
        return found.content.spec.type if found and isinstance(found.content, DataSource) else None

    def alerts(self, document: Document, slo: SLO) -> Iterator[PlacedAlert]:
        """Yield the alerts of an SLO, but for those whose names lead nowhere."""
        for index, item in enumerate(slo.spec.alert_policies):
            policy = self._policy(Place(document, ("spec", "alertPolicies", index)), item)
            if policy is None:
                continue
            name, spec, policy_place = policy
            condition = self._condition(policy_place, spec)
            if condition is None:
                continue
            rule, condition_place = condition
            alert = BurnRateAlert(
                policy=name,
                severity=rule.severity,
                operator=rule.condition.op,
                threshold=rule.condition.threshold,
                look_back=rule.condition.lookback_window,
                alert_after=rule.condition.alert_after,
                targets=tuple(
                    target.target_ref or (target.metadata.name if target.metadata else "")
                    for target in spec.notification_targets
                ),
                when_breaching=spec.alert_when_breaching,
                when_no_data=spec.alert_when_no_data,
            )
            yield PlacedAlert(alert, policy_place, condition_place)

    def _indicator(self, place: Place, holder: SLOSpec | ObjectiveSpec) -> PlacedIndicator | None:
        if (inline := holder.indicator) is not None:
            where = Place(place.document, (*place.path, "indicator", "spec"))
            return PlacedIndicator(inline.metadata.name, inline.spec, where)
        found = self._named.get(("SLI", holder.indicator_ref or ""))
        if found is None or not isinstance(found.content, SLI):
            return None
        return PlacedIndicator(found.content.metadata.name, found.content.spec, Place(found, ("spec",)))

    def _policy(self, place: Place, item: PolicyItem) -> tuple[str, AlertPolicySpec, Place] | None:
        if item.spec is not None and item.metadata is not None:
            return item.metadata.name, item.spec, Place(place.document, (*place.path, "spec"))
        found = self._named.get(("AlertPolicy", item.alert_policy_ref or ""))
        if found is None or not isinstance(found.content, AlertPolicy):
            return None
        return found.content.metadata.name, found.content.spec, Place(found, ("spec",))

    def _condition(self, place: Place, policy: AlertPolicySpec) -> tuple[AlertConditionSpec, Place] | None:
        (item,) = policy.conditions
        if item.spec is not None:
            return item.spec, Place(place.document, (*place.path, "conditions", 0, "spec"))
        found = self._named.get(("AlertCondition", item.condition_ref or ""))
        if found is None or not isinstance(found.content, AlertCondition):
            return None
        return found.content.spec, Place(found, ("spec",))

    def _mistyped(self, document: Document) -> Iterator[Problem]:
        for path, source in sources(document.content):
            found = self._named.get(("DataSource", source.metric_source_ref or ""))
            if found is None or source.type is None or not isinstance(found.content, DataSource):
                continue
            if source.type != found.content.spec.type:
                message = (
                    f"found '{source.type}', expected '{found.content.spec.type}' as the DataSource"
                    f" '{source.metric_source_ref}' has it, or none"
                )
                yield document.problem((*path, "type"), message)


def links(content: OpenSLO) -> Iterator[Link]:
    """Yield the names by which a document refers to others."""
    for path, source in sources(content):
        if source.metric_source_ref is not None:
            # A source of another type may have its connection wherever it is used.
            binding: Binding = "always" if source.type in (None, SOURCE_TYPE) else "never"
            yield Link("DataSource", source.metric_source_ref, (*path, "metricSourceRef"), binding)
    match content:
        case SLO(spec=spec):
            yield Link("Service", spec.service, ("spec", "service"), "among_others")
            if spec.indicator_ref is not None:
                yield Link("SLI", spec.indicator_ref, ("spec", "indicatorRef"))
            for index, objective in enumerate(spec.objectives):
                if objective.indicator_ref is not None:
                    # A composite SLO is not evaluated here, and its indicators may be kept where it is.
                    path = ("spec", "objectives", index, "indicatorRef")
                    yield Link("SLI", objective.indicator_ref, path, "among_others")
            for index, item in enumerate(spec.alert_policies):
                path = ("spec", "alertPolicies", index)
                if item.alert_policy_ref is not None:
                    yield Link("AlertPolicy", item.alert_policy_ref, (*path, "alertPolicyRef"))
                if item.spec is not None:
                    yield from _policy_links(item.spec, (*path, "spec"))
        case AlertPolicy(spec=spec):
            yield from _policy_links(spec, ("spec",))


def _policy_links(policy: AlertPolicySpec, path: FieldPath) -> Iterator[Link]:
    for index, condition in enumerate(policy.conditions):
        if condition.condition_ref is not None:
            yield Link("AlertCondition", condition.condition_ref, (*path, "conditions", index, "conditionRef"))
    for index, target in enumerate(policy.notification_targets):
        if target.target_ref is not None:
            where = (*path, "notificationTargets", index, "targetRef")
            yield Link("AlertNotificationTarget", target.target_ref, where)


def sources(content: OpenSLO) -> Iterator[tuple[FieldPath, MetricSource]]:
    """Yield the metric sources of an SLI, or of those within an SLO."""
    specs: list[tuple[FieldPath, SLISpec]] = []
    match content:
        case SLI(spec=spec):
            specs.append((("spec",), spec))
        case SLO(spec=spec):
            if spec.indicator is not None:
                specs.append((("spec", "indicator", "spec"), spec.indicator.spec))
            for index, objective in enumerate(spec.objectives):
                if objective.indicator is not None:
                    path = ("spec", "objectives", index, "indicator", "spec")
                    specs.append((path, objective.indicator.spec))
    for outer, indicator in specs:
        for inner, source in indicator.sources():
            yield (*outer, *inner), source


def _a(kind: str) -> str:
    # "an SLI", "an AlertPolicy"; "a Service", "a DataSource".
    return f"{'an' if kind[0] == 'A' or kind == 'SLI' else 'a'} {kind}"
