"""OpenSLO v1 (https://github.com/OpenSLO/OpenSLO): all seven kinds, validated whole.

What gradwatch evaluates is a part of it (see :mod:`gradwatch_slo.objective`); what it does not, it still
checks, so that a file that passes here is a file other OpenSLO tools take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from gradwatch_slo.problems import suggestion
from gradwatch_slo.source import SOURCE_TYPE, GradwatchSource
from gradwatch_slo.strict import (
    Mismatch,
    Name,
    Number,
    ShorthandDuration,
    StrictModel,
    exactly_one,
    given,
    refusal,
    shown,
)
from gradwatch_slo.windows import YEARS

API_VERSION: Final = "openslo/v1"

Description = Annotated[str, Field(max_length=1050)]
ApiVersion = Literal["openslo/v1"]


# What is named or said in a word or two, and means nothing when it is empty.
Text = Annotated[str, Field(min_length=1)]
Operator = Literal["lte", "gte", "lt", "gt"]

_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DNS_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_PREFIX: Final = re.compile(rf"{_DNS_LABEL}(\.{_DNS_LABEL})*")
_MOMENT: Final = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
_A_KEY: Final = "up to 63 letters and digits, with any of - . _ between them"
_LARGEST_EXPONENT: Final = 30
_MOST_DECIMALS: Final = 12


def _everyday(value: Decimal) -> Decimal:
    # An exponent of a billion would be a number of a billion digits once it is exact.
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and exponent >= -_LARGEST_EXPONENT and value.adjusted() <= _LARGEST_EXPONENT:
        return value
    raise refusal(f"found {shown(value)}, expected a number of at most {_LARGEST_EXPONENT} digits")


Quantity = Annotated[Number, AfterValidator(_everyday)]


def _moment(value: Any) -> datetime:
    if isinstance(value, str) and _MOMENT.fullmatch(value):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            pass  # the 31st of February
        else:
            if moment.year in YEARS:
                return moment
            raise refusal(f"found {shown(value)}, expected a year from {YEARS[0]} to {YEARS[-1]}")
    raise refusal(f"found {shown(value)}, expected a date and time without a zone, such as 2026-01-01 00:00:00")


def _zone(value: Any) -> str:
    if isinstance(value, str):
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):
            # ZoneInfo raises each of these for one kind of unusable name.
            pass
        else:
            return value
    hint = suggestion(value, available_timezones()) if isinstance(value, str) else ""
    raise refusal(f"found {shown(value)}, expected an IANA time zone such as UTC or Europe/Berlin{hint}")


def _slice_window(value: Any) -> Any:
    # A bare number counts minutes.
    return f"{value}m" if isinstance(value, int) and not isinstance(value, bool) else value


def _at_once(value: Any) -> Any:
    # The specification's default, which its own shorthand cannot say.
    return None if value == "0m" else value


class Metadata(StrictModel):
    """Name, and what else describes an object."""

    name: Name
    display_name: str | None = None
    labels: dict[str, Any] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield labels that are neither a text nor a list of texts, and keys that are none."""
        labels, annotations = fields.get("labels"), fields.get("annotations")
        for key, value in labels.items() if isinstance(labels, dict) else ():
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                yield (("labels", key), f"found {shown(value)}, expected a text or a list of texts")
            if not _LABEL_KEY.fullmatch(key):
                yield (("labels", key), f"found the key {shown(key)}, expected {_A_KEY}")
        for key in annotations if isinstance(annotations, dict) else ():
            prefix, slash, name = key.rpartition("/")
            if slash and not (len(prefix) <= 253 and _DNS_PREFIX.fullmatch(prefix)):
                yield (
                    ("annotations", key),
                    f"found the prefix {shown(prefix)}, expected a domain such as example.com",
                )
            if not _LABEL_KEY.fullmatch(name):
                yield (("annotations", key), f"found the key {shown(name)}, expected {_A_KEY}")


class MetricSource(StrictModel):
    """Where a metric comes from. ``spec`` of type ``gradwatch`` is a :class:`GradwatchSource`."""

    metric_source_ref: Name | None = None
    type: Text | None = None
    spec: dict[str, Any]

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield a missing type, and whatever is wrong with a gradwatch source."""
        if not given(fields, "type", "metricSourceRef"):
            yield ((), "found neither type nor metricSourceRef, expected at least one of them")
        if fields.get("type") == SOURCE_TYPE and isinstance(fields.get("spec"), dict):
            for path, message in source_mismatches(fields["spec"]):
                yield (("spec", *path), message)


def source_mismatches(spec: Mapping[str, Any]) -> Iterator[Mismatch]:
    """Yield what is wrong with the spec of a gradwatch source."""
    try:
        GradwatchSource.model_validate(spec)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield (detail["loc"], detail["msg"])


class Metric(StrictModel):
    """One query."""

    metric_source: MetricSource


class RatioMetric(StrictModel):
    """Good (or bad) of total, or a ratio the source has computed."""

    counter: bool | None = None
    good: Metric | None = None
    bad: Metric | None = None
    total: Metric | None = None
    raw_type: Literal["success", "failure"] | None = None
    raw: Metric | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but good|bad with total, or raw with rawType."""
        parts = given(fields, "good", "bad", "total")
        if given(fields, "raw", "rawType"):
            if parts:
                yield ((parts[0],), f"found {' and '.join(parts)} beside raw, expected either of the two forms")
            for name in ("raw", "rawType"):
                if fields.get(name) is None:
                    yield ((), f"found no {name}, expected raw and rawType together")
        else:
            yield from exactly_one(fields, "good", "bad")
            if fields.get("total") is None:
                yield ((), "found no total, expected it with good or bad")


class SLISpec(StrictModel):
    """How an indicator is measured."""

    description: Description | None = None
    threshold_metric: Metric | None = None
    ratio_metric: RatioMetric | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one metric."""
        return exactly_one(fields, "thresholdMetric", "ratioMetric")

    def sources(self) -> Iterator[tuple[tuple[str, ...], MetricSource]]:
        """Yield the metric sources with where they are: (``ratioMetric``, ``good``, ``metricSource``)."""
        if self.threshold_metric is not None:
            yield ("thresholdMetric", "metricSource"), self.threshold_metric.metric_source
        if (ratio := self.ratio_metric) is not None:
            parts = (("good", ratio.good), ("bad", ratio.bad), ("total", ratio.total), ("raw", ratio.raw))
            for name, metric in parts:
                if metric is not None:
                    yield ("ratioMetric", name, "metricSource"), metric.metric_source


class InlineSLI(StrictModel):
    """An indicator within an SLO."""

    api_version: ApiVersion | None = None
    kind: Literal["SLI"] | None = None
    metadata: Metadata
    spec: SLISpec


class Calendar(StrictModel):
    """Where calendar-aligned windows begin. ``start_time`` is wall-clock time in ``time_zone``."""

    start_time: Annotated[datetime, BeforeValidator(_moment)]
    time_zone: Annotated[str, BeforeValidator(_zone)]


class TimeWindowSpec(StrictModel):
    """Rolling, or aligned to a calendar."""

    duration: ShorthandDuration
    is_rolling: bool | None = None
    calendar: Calendar | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one of rolling and calendar."""
        rolling, calendar = fields.get("isRolling"), fields.get("calendar")
        if rolling is True and calendar is not None:
            yield (
                ("calendar",),
                "found a calendar in a rolling window, expected one of isRolling and calendar",
            )
        if rolling in (None, False) and calendar is None:
            yield ((), "found neither isRolling: true nor a calendar, expected one of them")


class ObjectiveSpec(StrictModel):
    """One target. Exact: ``ratio`` is the number that was written, or a hundredth of ``targetPercent``.

    An objective of a composite SLO has an indicator of its own.
    """

    display_name: str | None = None
    op: Operator | None = None
    value: Quantity | None = None
    target: Annotated[Number, Field(ge=0, lt=1)] | None = None
    target_percent: Annotated[Number, Field(ge=0, lt=100)] | None = None
    time_slice_target: Annotated[Number, Field(gt=0, le=1)] | None = None
    time_slice_window: Annotated[ShorthandDuration, BeforeValidator(_slice_window)] | None = None
    indicator: InlineSLI | None = None
    indicator_ref: Name | None = None
    composite_weight: Annotated[Quantity, Field(gt=0)] | None = None

    @property
    def ratio(self) -> Decimal:
        """The target as a share in [0, 1)."""
        if self.target is not None:
            return self.target
        assert self.target_percent is not None  # validation lets exactly one through
        return self.target_percent.scaleb(-2)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one target, and targets finer than any budget."""
        yield from exactly_one(fields, "target", "targetPercent")
        for name in given(fields, "target", "targetPercent", "timeSliceTarget"):
            value = fields[name]
            exponent = value.as_tuple().exponent if isinstance(value, Decimal) else 0
            if isinstance(exponent, int) and exponent < -_MOST_DECIMALS:
                yield ((name,), f"found {shown(value)}, expected at most {_MOST_DECIMALS} decimal places")


class AlertConditionRule(StrictModel):
    """When an alert condition holds."""

    kind: Literal["burnrate"] = "burnrate"
    # The schema demands it, the specification's older examples leave it out: then it is `gt`.
    op: Operator = "gt"
    threshold: Quantity
    lookback_window: ShorthandDuration
    alert_after: Annotated[ShorthandDuration | None, BeforeValidator(_at_once)] = None


class AlertConditionSpec(StrictModel):
    """Severity and rule of an alert."""

    description: Description | None = None
    severity: Text
    condition: AlertConditionRule


class AlertNotificationTargetSpec(StrictModel):
    """Where a notification goes."""

    description: Description | None = None
    target: Text


def _by_name_or_inline(fields: Mapping[str, Any], reference: str) -> Iterator[Mismatch]:
    yield from exactly_one(fields, reference, "spec")
    if given(fields, reference):
        for name in given(fields, "apiVersion", "kind", "metadata"):
            yield ((name,), f"found {name} beside {reference}, expected it only with a spec")
    elif given(fields, "spec"):
        for name in ("kind", "metadata"):
            if fields.get(name) is None:
                yield ((), f"found no {name}, expected kind, metadata and spec together")


class ConditionItem(StrictModel):
    """An alert condition by name or inline."""

    condition_ref: Name | None = None
    api_version: ApiVersion | None = None
    kind: Literal["AlertCondition"] | None = None
    metadata: Metadata | None = None
    spec: AlertConditionSpec | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but a reference alone, or a whole object."""
        return _by_name_or_inline(fields, "conditionRef")


class TargetItem(StrictModel):
    """A notification target by name or inline."""

    target_ref: Name | None = None
    api_version: ApiVersion | None = None
    kind: Literal["AlertNotificationTarget"] | None = None
    metadata: Metadata | None = None
    spec: AlertNotificationTargetSpec | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but a reference alone, or a whole object."""
        return _by_name_or_inline(fields, "targetRef")


class AlertPolicySpec(StrictModel):
    """When to alert whom."""

    description: Description | None = None
    alert_when_no_data: bool = False
    alert_when_resolved: bool = False
    alert_when_breaching: bool = False
    conditions: Annotated[list[ConditionItem], Field(min_length=1, max_length=1)]
    notification_targets: Annotated[list[TargetItem], Field(min_length=1)]


class PolicyItem(StrictModel):
    """An alert policy by name or inline."""

    alert_policy_ref: Name | None = None
    api_version: ApiVersion | None = None
    kind: Literal["AlertPolicy"] | None = None
    metadata: Metadata | None = None
    spec: AlertPolicySpec | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but a reference alone, or a whole object."""
        return _by_name_or_inline(fields, "alertPolicyRef")


class SLOSpec(StrictModel):
    """An indicator, its window and its targets; or targets with an indicator each: a composite SLO."""

    description: Description | None = None
    service: Name
    indicator: InlineSLI | None = None
    indicator_ref: Name | None = None
    time_window: Annotated[list[TimeWindowSpec], Field(min_length=1, max_length=1)] | None = None
    budgeting_method: Literal["Occurrences", "Timeslices", "RatioTimeslices"]
    objectives: Annotated[list[ObjectiveSpec], Field(min_length=1)]
    alert_policies: list[PolicyItem] = Field(default_factory=list)

    @property
    def is_composite(self) -> bool:
        """Whether its objectives have the indicators."""
        return self.indicator is None and self.indicator_ref is None

    @property
    def window(self) -> TimeWindowSpec | None:
        """The window, if it has one: the list has one item at most."""
        return None if self.time_window is None else self.time_window[0]

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield missing or needless parts of time-sliced objectives, and doubled or missing indicators."""
        method, objectives = fields.get("budgetingMethod"), fields.get("objectives")
        yield from _one_indicator_each(fields, objectives if isinstance(objectives, list) else [])
        needed = _SLICED.get(method if isinstance(method, str) else "")
        if needed is None or not isinstance(objectives, list):
            return
        for index, objective in enumerate(objectives):
            if not isinstance(objective, dict):
                continue
            for name in ("timeSliceTarget", "timeSliceWindow"):
                if name in needed and objective.get(name) is None:
                    yield (("objectives", index), f"found no {name}, expected it with {method}")
                if name not in needed and objective.get(name) is not None:
                    methods = " or ".join(method for method, names in _SLICED.items() if name in names)
                    yield (("objectives", index, name), f"found it with {method}, expected it with {methods}")


# What objectives have by the method of their budget.
_SLICED: Final[Mapping[str, tuple[str, ...]]] = {
    "Occurrences": (),
    "Timeslices": ("timeSliceTarget", "timeSliceWindow"),
    "RatioTimeslices": ("timeSliceWindow",),
}


def _one_indicator_each(fields: Mapping[str, Any], objectives: list[Any]) -> Iterator[Mismatch]:
    """Yield anything but one indicator of the SLO, or one of each objective."""
    names = ("indicator", "indicatorRef")
    if not any(isinstance(objective, dict) and given(objective, *names) for objective in objectives):
        yield from exactly_one(fields, *names)
        return
    for name in given(fields, *names):
        yield ((name,), f"found {name} beside those of objectives, expected either of the two forms")
    for index, objective in enumerate(objectives):
        if isinstance(objective, dict):
            for path, message in exactly_one(objective, *names):
                yield (("objectives", index, *path), message)


class DataSourceSpec(StrictModel):
    """How to reach a source of metrics."""

    description: Description | None = None
    type: Text
    connection_details: Any


class ServiceSpec(StrictModel):
    """What SLOs are grouped by."""

    description: Description | None = None


class OpenSLOObject(StrictModel):
    """What every document has."""

    api_version: ApiVersion
    metadata: Metadata


class Service(OpenSLOObject):
    """A service."""

    kind: Literal["Service"]
    spec: ServiceSpec | None = None


class SLO(OpenSLOObject):
    """A service level objective."""

    kind: Literal["SLO"]
    spec: SLOSpec


class SLI(OpenSLOObject):
    """A service level indicator."""

    kind: Literal["SLI"]
    spec: SLISpec


class DataSource(OpenSLOObject):
    """A source of metrics."""

    kind: Literal["DataSource"]
    spec: DataSourceSpec


class AlertPolicy(OpenSLOObject):
    """An alert policy."""

    kind: Literal["AlertPolicy"]
    spec: AlertPolicySpec


class AlertCondition(OpenSLOObject):
    """An alert condition."""

    kind: Literal["AlertCondition"]
    spec: AlertConditionSpec


class AlertNotificationTarget(OpenSLOObject):
    """A notification target."""

    kind: Literal["AlertNotificationTarget"]
    spec: AlertNotificationTargetSpec


OpenSLO = Service | SLO | SLI | DataSource | AlertPolicy | AlertCondition | AlertNotificationTarget

KINDS: Final[dict[str, type[OpenSLO]]] = {
    "Service": Service,
    "SLO": SLO,
    "SLI": SLI,
    "DataSource": DataSource,
    "AlertPolicy": AlertPolicy,
    "AlertCondition": AlertCondition,
    "AlertNotificationTarget": AlertNotificationTarget,
}
