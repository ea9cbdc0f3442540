"""OpenSLO v1 (https://github.com/OpenSLO/OpenSLO): all seven kinds, validated whole.

What gradwatch evaluates is a part of it (see :mod:`gradwatch_slo.objective`); what it does not, it still
checks, so that a file that passes here is a file other OpenSLO tools take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

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
    shown,
)

API_VERSION: Final = "openslo/v1"

Description = Annotated[str, Field(max_length=1050)]
ApiVersion = Literal["openslo/v1"]


def _moment(value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is not None:
        expected = "a date and time without a zone in quotes, such as '2026-01-01 00:00:00'"
        raise PydanticCustomError(
            "gradwatch", "{message}", {"message": f"found {shown(value)}, expected {expected}"}
        )
    return moment


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
    message = f"found {shown(value)}, expected an IANA time zone such as UTC or Europe/Berlin{hint}"
    raise PydanticCustomError("gradwatch", "{message}", {"message": message})


def _slice_window(value: Any) -> Any:
    # A bare number counts minutes.
    return f"{value}m" if isinstance(value, int) and not isinstance(value, bool) else value


class Metadata(StrictModel):
    """Name, and what else describes an object."""

    name: Name
    display_name: str | None = None
    labels: dict[str, Any] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield labels that are neither a text nor a list of texts."""
        labels = fields.get("labels")
        for key, value in labels.items() if isinstance(labels, dict) else ():
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                yield (("labels", key), f"found {shown(value)}, expected a text or a list of texts")


class MetricSource(StrictModel):
    """Where a metric comes from. ``spec`` of type ``gradwatch`` is a :class:`GradwatchSource`."""

    metric_source_ref: str | None = None
    type: str | None = None
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
            if fields.get("counter") is None:
                yield ((), "found no counter, expected true or false with good or bad")


class SLISpec(StrictModel):
    """How an indicator is measured."""

    description: Description | None = None
    threshold_metric: Metric | None = None
    ratio_metric: RatioMetric | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one metric."""
        return exactly_one(fields, "thresholdMetric", "ratioMetric")


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
    """One target. Exact: ``ratio`` is the number that was written, or a hundredth of ``targetPercent``."""

    display_name: str | None = None
    op: Literal["lte", "gte", "lt", "gt"] | None = None
    value: Number | None = None
    target: Annotated[Number, Field(ge=0, lt=1)] | None = None
    target_percent: Annotated[Number, Field(ge=0, lt=100)] | None = None
    time_slice_target: Annotated[Number, Field(gt=0, le=1)] | None = None
    time_slice_window: Annotated[ShorthandDuration, BeforeValidator(_slice_window)] | None = None

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
        for name in given(fields, "target", "targetPercent"):
            value = fields[name]
            if isinstance(value, Decimal) and value.is_finite() and value.as_tuple().exponent < -12:  # type: ignore[operator]  # finite: an int
                yield ((name,), f"found {shown(value)}, expected at most 12 decimal places")


class AlertConditionRule(StrictModel):
    """When an alert condition holds."""

    kind: Literal["burnrate"] = "burnrate"
    threshold: Number
    lookback_window: ShorthandDuration
    # OpenSLO's default is `0m`, which its own shorthand cannot say: absent means at once.
    alert_after: ShorthandDuration | None = None
    op: Literal["lte", "gte", "lt", "gt"] | None = None


class AlertConditionSpec(StrictModel):
    """Severity and rule of an alert."""

    description: Description | None = None
    severity: str
    condition: AlertConditionRule


class AlertNotificationTargetSpec(StrictModel):
    """Where a notification goes."""

    description: Description | None = None
    target: str


class ConditionItem(StrictModel):
    """An alert condition by name or inline."""

    condition_ref: Name | None = None
    api_version: ApiVersion | None = None
    kind: Literal["AlertCondition"] | None = None
    metadata: Metadata | None = None
    spec: AlertConditionSpec | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one of reference and spec."""
        return exactly_one(fields, "conditionRef", "spec")


class TargetItem(StrictModel):
    """A notification target by name or inline."""

    target_ref: Name | None = None
    api_version: ApiVersion | None = None
    kind: Literal["AlertNotificationTarget"] | None = None
    metadata: Metadata | None = None
    spec: AlertNotificationTargetSpec | None = None

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield anything but exactly one of reference and spec."""
        return exactly_one(fields, "targetRef", "spec")


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
        """Yield anything but exactly one of reference and spec."""
        return exactly_one(fields, "alertPolicyRef", "spec")


class SLOSpec(StrictModel):
    """An indicator, its window and its targets."""

    description: Description | None = None
    service: Name
    indicator: InlineSLI | None = None
    indicator_ref: Name | None = None
    time_window: Annotated[list[TimeWindowSpec], Field(min_length=1, max_length=1)]
    budgeting_method: Literal["Occurrences", "Timeslices", "RatioTimeslices"]
    objectives: Annotated[list[ObjectiveSpec], Field(min_length=1)]
    alert_policies: list[PolicyItem] = Field(default_factory=list)

    @classmethod
    def mismatches(cls, fields: Mapping[str, Any]) -> Iterator[Mismatch]:
        """Yield missing or needless parts of time-sliced objectives, and a doubled indicator."""
        yield from exactly_one(fields, "indicator", "indicatorRef")
        method, objectives = fields.get("budgetingMethod"), fields.get("objectives")
        needed = {
            "Occurrences": (),
            "Timeslices": ("timeSliceTarget", "timeSliceWindow"),
            "RatioTimeslices": ("timeSliceWindow",),
        }.get(method if isinstance(method, str) else "")
        if needed is None or not isinstance(objectives, list):
            return
        for index, objective in enumerate(objectives):
            if not isinstance(objective, dict):
                continue
            for name in ("timeSliceTarget", "timeSliceWindow"):
                if name in needed and objective.get(name) is None:
                    yield (("objectives", index), f"found no {name}, expected it with {method}")
                if name not in needed and objective.get(name) is not None:
                    yield (("objectives", index, name), f"found it with {method}, expected it with Timeslices")


class DataSourceSpec(StrictModel):
    """How to reach a source of metrics."""

    description: Description | None = None
    type: str
    connection_details: Any = None


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
