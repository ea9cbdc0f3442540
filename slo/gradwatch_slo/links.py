"""Names that lead from one document to another, and the alerts that are put together along them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from gradwatch_slo.durations import Duration
from gradwatch_slo.openslo import (
    SLI,
    SLO,
    AlertCondition,
    AlertConditionSpec,
    AlertPolicy,
    AlertPolicySpec,
    DataSource,
    Metric,
    MetricSource,
    OpenSLO,
    Operator,
    PolicyItem,
    SLISpec,
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


@dataclass(frozen=True, slots=True)
class Link:
    """A name by which one document refers to another. ``binding``: it must lead somewhere."""

    kind: str
    name: str
    path: FieldPath
    binding: bool = True


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
    when_resolved: bool
    when_no_data: bool


@dataclass(frozen=True, slots=True)
class PlacedAlert:
    """An alert, and where the ``spec`` of its policy and that of its condition were written."""

    alert: BurnRateAlert
    policy: Place
    condition: Place


class Links:
    """The documents of some files by kind and name."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._named: dict[tuple[str, str], Document] = {}
        for document in documents:
            self._named.setdefault((document.content.kind, document.content.metadata.name), document)

    def problems(self) -> Iterator[Problem]:
        """Yield names that lead nowhere, and sources that are of another type than they say.

        A Service need not be in the files, as the specification has it; but where some are, the others are
        missing.
        """
        services = any(kind == "Service" for kind, _ in self._named)
        for document in self._documents:
            for link in links(document.content):
                known = (link.kind, link.name) in self._named
                if not known and link.binding and (link.kind != "Service" or services):
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

    def indicator(self, document: Document, slo: SLO) -> Document | None:
        """Return the document that has an SLO's indicator: its own, or an SLI's."""
        if slo.spec.indicator_ref is None:
            return document
        return self._named.get(("SLI", slo.spec.indicator_ref))

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
                when_resolved=spec.alert_when_resolved,
                when_no_data=spec.alert_when_no_data,
            )
            yield PlacedAlert(alert, policy_place, condition_place)

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
            binding = source.type in (None, SOURCE_TYPE)
            yield Link("DataSource", source.metric_source_ref, (*path, "metricSourceRef"), binding)
    match content:
        case SLO(spec=spec):
            yield Link("Service", spec.service, ("spec", "service"))
            if spec.indicator_ref is not None:
                yield Link("SLI", spec.indicator_ref, ("spec", "indicatorRef"))
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
    """Yield the metric sources of an SLI, or of the one within an SLO."""
    spec: SLISpec
    path: FieldPath
    if isinstance(content, SLI):
        spec, path = content.spec, ("spec",)
    elif isinstance(content, SLO) and content.spec.indicator is not None:
        spec, path = content.spec.indicator.spec, ("spec", "indicator", "spec")
    else:
        return
    metrics: list[tuple[FieldPath, Metric | None]] = [(("thresholdMetric",), spec.threshold_metric)]
    if (ratio := spec.ratio_metric) is not None:
        parts = (("good", ratio.good), ("bad", ratio.bad), ("total", ratio.total), ("raw", ratio.raw))
        metrics += [(("ratioMetric", name), metric) for name, metric in parts]
    for inner, metric in metrics:
        if metric is not None:
            yield (*path, *inner, "metricSource"), metric.metric_source


def _a(kind: str) -> str:
    # "an SLI", "an AlertPolicy"; "a Service", "a DataSource".
    return f"{'an' if kind[0] == 'A' or kind == 'SLI' else 'a'} {kind}"
