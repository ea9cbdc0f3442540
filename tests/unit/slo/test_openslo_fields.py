# ruff: noqa: E501 - a mistake and its message stand on one line, however long
"""Every field of every kind, misspelt, mistyped or left out: what is wrong is told where it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch_slo.lint import lint
from gradwatch_slo.objective import objectives_of
from gradwatch_slo.openslo import KINDS
from gradwatch_slo.problems import ObjectiveFileError, Problem
from gradwatch_slo.reader import parse_documents

COMPLETE = Path(__file__).with_name("complete.yaml").read_text()
LINES = COMPLETE.splitlines()


@dataclass(frozen=True)
class Field:
    """One line of the file: ``before`` the name of a field, and the ``value`` after it."""

    line: int
    before: str
    name: str
    value: str

    def replaced(self, name: str, value: str) -> str:
        lines = [*LINES]
        lines[self.line - 1] = f"{self.before}{name}: {value}"
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.line}-{self.name}"


FIELDS = [
    Field(number, match[1], match[2], match[3])
    for number, line in enumerate(LINES, 1)
    if (match := re.fullmatch(r"( *(?:- )?)([\w./]+): ?(.*)", line))
]
# Labels, annotations and the specs of other sources have the names that their writers gave them.
FREE = ("team: [vision, audio]", "org: acme", "acme.example/dashboard: https://acme.example")
OURS = [field for field in FIELDS if f"{field.name}: {field.value}" not in FREE]
# What may be any value at all.
ANYTHING = ("connectionDetails: {}", "spec: {query: good}", "spec: {query: total}", "spec: {query: latency}")
VALUES = [field for field in FIELDS if field.value and f"{field.name}: {field.value}" not in ANYTHING]


def problems(text: str) -> list[Problem]:
    with pytest.raises(ObjectiveFileError) as raised:
        objectives_of(parse_documents(text.encode(), "my.yaml"))
    return list(raised.value.problems)


def test_the_complete_file_is_right_and_nothing_in_it_is_useless() -> None:
    documents = parse_documents(COMPLETE.encode(), "my.yaml")
    assert {document.content.kind for document in documents} == set(KINDS)
    assert [each.name for each in objectives_of(documents).objectives] == [
        "by-reference/three nines",
        "by-reference/0.995",
        "inline",
    ]
    assert lint(documents) == []


@pytest.mark.parametrize("field", OURS, ids=str)
def test_a_misspelt_field_is_unknown_and_what_was_meant_is_suggested(field: Field) -> None:
    (unknown,) = [p for p in problems(field.replaced(field.name[:-1], field.value)) if "unknown" in p.message]
    assert unknown.line == field.line
    assert unknown.field.endswith(field.name[:-1])
    assert unknown.message.endswith(f"; did you mean '{field.name}'?")


@pytest.mark.parametrize("field", VALUES, ids=str)
@pytest.mark.parametrize(
    ("value", "found"), [("{x: 1}", "a mapping"), ("1.0e+999999999", "1.0E+999999999")], ids=["mapping", "huge"]
)
def test_a_value_of_another_kind_is_one_problem_in_its_place(field: Field, value: str, found: str) -> None:
    (problem,) = problems(field.replaced(field.name, value))
    assert (problem.line, problem.field.endswith(field.name)) == (field.line, True)
    assert problem.message.startswith(f"found {found}, expected ")


def fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every field that OpenSLO has the name of."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from fields(item, (*path, index))
    named_by_their_writers = path[-1:] in (("labels",), ("annotations",)) or path[-2:] == (
        "metricSource",
        "spec",
    )
    if isinstance(value, dict) and not named_by_their_writers:
        for name, inner in value.items():
            yield (*path, name)
            yield from fields(inner, (*path, name))


DOCUMENTS = list(yaml.safe_load_all(COMPLETE))


@pytest.mark.parametrize(
    ("document", "path"), [(document, path) for document in DOCUMENTS for path in fields(document)]
)
def test_a_field_with_nothing_after_it_is_one_that_was_left_out(
    document: dict[str, Any], path: tuple[str | int, ...]
) -> None:
    def read(edited: dict[str, Any]) -> object:
        try:
            return parse_documents(json.dumps(edited, default=str).encode(), "my.yaml")[0].content
        except ObjectiveFileError as error:
            return {problem.field for problem in error.problems}

    empty, without = copy.deepcopy(document), copy.deepcopy(document)
    *outer, name = path
    for edited in (empty, without):
        around: Any = edited
        for part in outer:
            around = around[part]
        if edited is empty:
            around[name] = None
        else:
            del around[name]
    if name == "connectionDetails":  # it must be there, and may be any value
        assert not isinstance(read(empty), set)
    else:
        assert read(empty) == read(without)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("name: by-reference", "name: -x", "metadata.name: found '-x', expected a name: up to 255 letters, digits and any of - . _ | / \\ between them"),
        ("org: acme", "-org: acme", "metadata.labels.-org: found the key '-org', expected up to 63 letters and digits, with any of - . _ between them"),
        ("org: acme", f"{'o' * 64}: acme", f"metadata.labels.{'o' * 64}: found the key '{'o' * 57}...', expected up to 63 letters and digits, with any of - . _ between them"),
        ("acme.example/d", "Acme_example/d", "metadata.annotations.Acme_example/dashboard: found the prefix 'Acme_example', expected a domain such as example.com"),
        ("acme.example/d", "/d", "metadata.annotations./dashboard: found the prefix '', expected a domain such as example.com"),
        ("/dashboard:", "/:", "metadata.annotations.acme.example/: found the key '', expected up to 63 letters and digits, with any of - . _ between them"),
        ("    kind: burnrate", "    kind: burn", "spec.condition.kind: found 'burn', expected 'burnrate'; did you mean 'burnrate'?"),
        ("alertAfter: 0m", "alertAfter: 0h", "spec.condition.alertAfter: found '0h', expected a duration such as 28d: a positive count and one of m, h, d, w, M, Q, Y"),
        ("severity: page", "severity: ''", "spec.severity: found '', expected a text that is not empty"),
        ("timeSliceTarget: 0.95", "timeSliceTarget: 0", "spec.objectives[0].timeSliceTarget: found 0, expected a number above 0"),
        ("timeSliceTarget: 0.95", "timeSliceTarget: 1.1", "spec.objectives[0].timeSliceTarget: found 1.1, expected a number of at most 1"),
        ("timeSliceTarget: 0.95", "timeSliceTarget: 0.1234567890123", "spec.objectives[0].timeSliceTarget: found 0.1234567890123, expected at most 12 decimal places"),
        ("timeSliceWindow: 5", "timeSliceWindow: 0", "spec.objectives[0].timeSliceWindow: found '0m', expected a duration such as 28d: a positive count and one of m, h, d, w, M, Q, Y"),
        ("value: 300", "value: 1.0e-31", "spec.objectives[0].value: found 1.0E-31, expected a number of at most 30 digits"),
        ("targetPercent: 99.5", "targetPercent: 100", "spec.objectives[1].targetPercent: found 100, expected a number below 100"),
        ("target: 0.9\n", "target: 1.0\n", "spec.objectives[0].target: found 1.0, expected a number below 1"),
        ("    - targetRef: OnCallMail\n", "", "spec.notificationTargets: found nothing, expected a list"),
        ("compositeWeight: 0.5", "compositeWeight: 0", "spec.objectives[0].compositeWeight: found 0, expected a number above 0"),
        ("      indicatorRef: latency\n", "", "spec.objectives[0]: found none of them, expected exactly one of indicator, indicatorRef"),
        ("      indicatorRef: latency\n", "      indicatorRef: latency\n      indicator: {metadata: {name: a}, spec: {thresholdMetric: {metricSource: {type: a, spec: {}}}}}\n", "spec.objectives[0].indicatorRef: found indicator and indicatorRef, expected exactly one of indicator, indicatorRef"),
        ("    - displayName: fast\n      op: lte\n", "    - displayName: fast\n", "spec.objectives[0]: found no op and value, expected both with a thresholdMetric"),
        ("metadata:\n  name: composite\nspec:\n", "metadata:\n  name: composite\nspec:\n  indicatorRef: latency\n", "spec.indicatorRef: found indicatorRef beside those of objectives, expected either of the two forms"),
        ("- conditionRef: fast-burn", "- {conditionRef: fast-burn, kind: AlertCondition}", "spec.conditions[0].kind: found kind beside conditionRef, expected it only with a spec"),
        ("            metadata:\n              name: slow-burn\n", "", "spec.alertPolicies[0].spec.conditions[0]: found no metadata, expected kind, metadata and spec together"),
        ("          - kind: AlertCondition\n            metadata", "          - metadata", "spec.alertPolicies[0].spec.conditions[0]: found no kind, expected kind, metadata and spec together"),
        ("- kind: AlertPolicy", "- kind: Policy", "spec.alertPolicies[0].kind: found 'Policy', expected 'AlertPolicy'; did you mean 'AlertPolicy'?"),
        # Names that lead nowhere
        ("alertPolicyRef: policy", "alertPolicyRef: polcy", "spec.alertPolicies[0].alertPolicyRef: found 'polcy', expected the name of an AlertPolicy in these files; did you mean 'policy'?"),
        ("conditionRef: fast-burn", "conditionRef: other", "spec.conditions[0].conditionRef: found 'other', expected the name of an AlertCondition in these files"),
        ("targetRef: OnCallMail", "targetRef: OncallMail", "spec.notificationTargets[0].targetRef: found 'OncallMail', expected the name of an AlertNotificationTarget in these files; did you mean 'OnCallMail'?"),
        ("metricSourceRef: own", "metricSourceRef: owm", "spec.ratioMetric.raw.metricSource.metricSourceRef: found 'owm', expected the name of a DataSource in these files; did you mean 'own'?"),
        ("indicatorRef: success", "indicatorRef: requets", "spec.indicatorRef: found 'requets', expected the name of an SLI in these files; did you mean 'requests'?"),
        ("      indicatorRef: latency", "      indicatorRef: latenci", "spec.objectives[0].indicatorRef: found 'latenci', expected the name of an SLI in these files; did you mean 'latency'?"),
        ("service: training\n  indicatorRef: success", "service: trainig\n  indicatorRef: success", "spec.service: found 'trainig', expected the name of a Service in these files; did you mean 'training'?"),
        ("  type: gradwatch\n  conn", "  type: Prometheus\n  conn", "spec.ratioMetric.raw.metricSource.type: found 'gradwatch', expected 'Prometheus' as the DataSource 'own' has it, or none"),
    ],
)  # fmt: skip
def test_a_mistake_between_fields_or_documents(before: str, after: str, expected: str) -> None:
    assert COMPLETE.count(before) >= 1
    assert [f"{p.field}: {p.message}" for p in problems(COMPLETE.replace(before, after, 1))] == [expected]


def test_what_names_lead_to_nowhere_is_told_in_the_order_of_the_lines() -> None:
    text = COMPLETE.replace("targetRef: OnCallMail", "targetRef: x").replace(
        "indicatorRef:", "indicatorRef: x  #"
    )
    assert [problem.line for problem in problems(text)] == sorted(p.line for p in problems(text))


def test_a_service_need_not_be_in_the_files() -> None:
    without = COMPLETE[COMPLETE.index("---\n") :]
    assert len(objectives_of(parse_documents(without.encode(), "my.yaml")).objectives) == 3


def test_an_alert_after_no_time_is_one_at_once() -> None:
    (at_once, _, inline) = objectives_of(parse_documents(COMPLETE.encode(), "my.yaml")).objectives
    assert [alert.alert_after for alert in (*at_once.alerts, *inline.alerts)] == [None, None]
    assert [alert.operator for alert in (*at_once.alerts, *inline.alerts)] == ["gte", "gt"]
