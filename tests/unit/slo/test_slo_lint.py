# ruff: noqa: E501 - a warning stands on one line, however long
"""What is legal, but useless."""

from __future__ import annotations

import operator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.cli import main
from gradwatch_slo.burn_rules import reachable
from gradwatch_slo.lint import fewest_events, lint, one_spends_all
from gradwatch_slo.objectives import default_documents
from gradwatch_slo.reader import parse_documents

COMPLETE = Path(__file__).with_name("complete.yaml").read_text()
targets = st.decimals("0", "0.9999", places=4)


def warnings(text: str) -> list[str]:
    documents = parse_documents(text.encode(), "my.yaml")
    return [f"{problem.field}: {problem.message}" for problem in lint(documents)]


def test_nothing_that_is_shipped_is_useless() -> None:
    assert lint(default_documents()) == []


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        ("op: gt, value: 1", "found gt 1, expected what can be: memory_headroom goes from any number to 1, so every run is bad"),
        ("op: lte, value: 1", "found lte 1, expected what need not be: memory_headroom goes from any number to 1, so every run is good"),
        ("op: gte, value: 1", None),
        ("op: lt, value: -5", None),
    ],
)  # fmt: skip
def test_a_bound_that_every_run_meets_or_none_can_is_useless(threshold: str, expected: str | None) -> None:
    source = "{type: gradwatch, spec: {unit: run, measure: memory_headroom}}"
    text = f"""\
apiVersion: openslo/v1
kind: SLO
metadata: {{name: headroom}}
spec:
  service: training
  indicator: {{metadata: {{name: headroom}}, spec: {{thresholdMetric: {{metricSource: {source}}}}}}}
  timeWindow: [{{duration: 28d, isRolling: true}}]
  budgetingMethod: Occurrences
  objectives: [{{{threshold}, target: 0.9}}]
"""
    said = [] if expected is None else [f"spec.objectives[0].value: {expected}"]
    assert warnings(text) == said


FAST = "spec.condition.threshold"
SLOW = "spec.alertPolicies[0].spec.conditions[0].spec.condition"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("threshold: 5.6", "threshold: 200.5", [f"{FAST}: found gte 200.5, expected what can be: with the target 0.995 of 'by-reference' burn rates go from 0 to 200, so the alert can never fire"]),
        ("threshold: 5.6", "threshold: 0", [f"{FAST}: found gte 0, expected what need not be: with the target {target} of 'by-reference' burn rates go from 0 to {most}, so the alert always fires" for target, most in (("0.999", 1000), ("0.995", 200))]),
        ("op: gte\n    threshold: 5.6", "op: lt\n    threshold: 0", [f"{FAST}: found lt 0, expected what can be: with the target {target} of 'by-reference' burn rates go from 0 to {most}, so the alert can never fire" for target, most in (("0.999", 1000), ("0.995", 200))]),
        ("threshold: 0.93", "threshold: 10", [f"{SLOW}.threshold: found gt 10, expected what can be: with the target 0.9 of 'inline' burn rates go from 0 to 10, so the alert can never fire"]),
        ("threshold: 0.93", "op: gte\n                threshold: 10", []),
        ("threshold: 5.6", "threshold: 9999999", [f"{FAST}: found gte 9999999, expected what can be: with the target {target} of 'by-reference' burn rates go from 0 to {most}, so the alert can never fire" for target, most in (("0.999", 1000), ("0.995", 200))]),
        ("target: 0.9\n", "target: 0.7\n", []),
        ("threshold: 0.93", "op: lte\n                threshold: 10", [f"{SLOW}.threshold: found lte 10, expected what need not be: with the target 0.9 of 'inline' burn rates go from 0 to 10, so the alert always fires"]),
        ("lookbackWindow: 3d", "lookbackWindow: 5w", [f"{SLOW}.lookbackWindow: found 5w, expected at most the window of 'inline', 28d"]),
        ("lookbackWindow: 6h", "lookbackWindow: 1Q", []),
        ("  alertPolicies:\n    - alertPolicyRef: policy\n", "", ["metadata.name: found an AlertPolicy 'policy' that nothing refers to, expected one that is used"]),
        ("- conditionRef: fast-burn", "- {kind: AlertCondition, metadata: {name: a}, spec: {severity: page, condition: {threshold: 2, lookbackWindow: 1h}}}", ["metadata.name: found an AlertCondition 'fast-burn' that nothing refers to, expected one that is used"]),
        ("- targetRef: OnCallMail", "- {kind: AlertNotificationTarget, metadata: {name: a}, spec: {target: mail}}", ["metadata.name: found an AlertNotificationTarget 'OnCallMail' that nothing refers to, expected one that is used"]),
        ("        metricSourceRef: own\n", "", ["metadata.name: found a DataSource 'own' that nothing refers to, expected one that is used"]),
        ("indicatorRef: requests", "indicatorRef: success", ["metadata.name: found an SLI 'requests' that nothing refers to, expected one that is used"]),
        ("        alertWhenBreaching: true\n", "", ["spec.alertPolicies[0].spec: found none of alertWhenBreaching, alertWhenResolved and alertWhenNoData true, expected one: as it is the alert can never fire"]),
        ("minDuration: 60s", "minDuration: 91d", ["spec.ratioMetric.raw.metricSource.spec.minDuration: found 91d, expected at most the window of 'by-reference', 1Q"]),
        ("deadline: 2h", "deadline: 29d", ["spec.indicator.spec.ratioMetric.raw.metricSource.spec.deadline: found 29d, expected at most the window of 'inline', 28d"]),
        ("timeSliceWindow: 5", "timeSliceWindow: 8d", ["spec.objectives[0].timeSliceWindow: found 8d, expected at most the window of 1w"]),
        ("target: 0.9\n", "targetPercent: 0\n", ["spec.objectives[0].targetPercent: found 0, expected more: whatever happens, it is met"]),
    ],
)  # fmt: skip
def test_what_is_legal_but_useless_is_a_warning(before: str, after: str, expected: list[str]) -> None:
    assert before in COMPLETE
    assert warnings(COMPLETE.replace(before, after, 1)) == expected


POLICY = """
  alertPolicies:
    - kind: AlertPolicy
      metadata: {name: mine}
      spec:
        WHEN
        conditions:
          - kind: AlertCondition
            metadata: {name: fast}
            spec: {severity: page, condition: {threshold: 50, lookbackWindow: 1h}}
        notificationTargets: [{kind: AlertNotificationTarget, metadata: {name: mail}, spec: {target: mail}}]
"""


@pytest.mark.parametrize(
    ("window", "target", "policy", "is_told"),
    [
        ("28d", "0.99", "", True),
        ("1d", "0.99", "", False),
        # Not even nothing but bad steps burns fast enough.
        ("90d", "0.5", "", False),
        ("1d", "0.99", POLICY.replace("WHEN", "alertWhenBreaching: true"), True),
        ("1d", "0.99", POLICY.replace("WHEN", "alertWhenNoData: true"), True),
        ("1d", "0.99", POLICY.replace("WHEN", "alertWhenResolved: true"), False),
    ],
)
def test_an_objective_of_which_no_alert_is_made_is_useless(
    tmp_path: Path, window: str, target: str, policy: str, is_told: bool
) -> None:
    text = f"""\
apiVersion: openslo/v1
kind: SLO
metadata: {{name: steps}}
spec:
  service: training
  indicator:
    metadata: {{name: nonfinite}}
    spec:
      ratioMetric:
        rawType: failure
        raw: {{metricSource: {{type: gradwatch, spec: {{unit: step, measure: nonfinite}}}}}}
  timeWindow: [{{duration: {window}, isRolling: true}}]
  budgetingMethod: Occurrences
  objectives: [{{target: {target}}}]
{policy}"""
    untold = (
        f"spec.objectives[0]: found {target} over {window}, expected a higher target, a longer window or an alert"
        " policy: no alert is made of it, so nobody is told"
    )
    assert (untold in warnings(text)) is not is_told
    file = tmp_path / "steps.yaml"
    file.write_text(text)
    rules = CliRunner().invoke(main, ["slo", "rules", "-f", str(file)])
    assert ("- alert:" in rules.stdout) is is_told
    assert rules.stderr == ("" if is_told else "warning: steps: no alert is made of it, so nobody is told\n")


@pytest.mark.parametrize("method", ["Timeslices", "RatioTimeslices"])
@pytest.mark.parametrize(
    ("window", "target", "length", "expected"),
    [
        # A rolling window begins and ends within slices.
        ("{duration: 5d, isRolling: true}", "0.5", "1d", "the window of 5d holds 4 whole slices, and a verdict needs 5"),
        ("{duration: 5h, calendar: {startTime: '2025-01-01 00:00:00', timeZone: UTC}}", "0.5", "1h", None),
        ("{duration: 1d, calendar: {startTime: '2025-01-01 00:00:00', timeZone: UTC}}", "0.5", "5h", "the window of 1d holds 4 whole slices, and a verdict needs 5"),
        ("{duration: 6d, isRolling: true}", "0.8", "1d", None),
        ("{duration: 1d, isRolling: true}", "0.5", "1d", "the window of 1d holds 0 whole slices, and a verdict needs 5"),
        ("{duration: 28d, isRolling: true}", "0.99", "1d", "one bad slice of the 27 in the window of 28d spends the budget, and with the target 0.99 it takes 100 to allow one"),
        ("{duration: 28d, isRolling: true}", "0.99", "4h", None),
        ("{duration: 20h, calendar: {startTime: '2025-01-01 00:00:00', timeZone: UTC}}", "0.95", "1h", None),
        ("{duration: 20h, isRolling: true}", "0.95", "1h", "one bad slice of the 19 in the window of 20h spends the budget, and with the target 0.95 it takes 20 to allow one"),
    ],
)  # fmt: skip
def test_slices_are_enough_for_a_verdict_and_a_bad_one(
    method: str, window: str, target: str, length: str, expected: str | None
) -> None:
    share = "timeSliceTarget: 0.9, " if method == "Timeslices" else ""
    text = f"""\
apiVersion: openslo/v1
kind: SLO
metadata: {{name: sliced}}
spec:
  service: training
  indicator:
    metadata: {{name: success}}
    spec:
      ratioMetric:
        rawType: success
        raw: {{metricSource: {{type: gradwatch, spec: {{unit: run, measure: success}}}}}}
  timeWindow: [{window}]
  budgetingMethod: {method}
  objectives: [{{target: {target}, {share}timeSliceWindow: {length}}}]
"""
    found = f"spec.objectives[0].timeSliceWindow: found {length}, expected a shorter one"
    assert warnings(text) == ([] if expected is None else [f"{found}: {expected}"])


@given(targets, st.decimals("-10", "20000", places=4))
def test_a_threshold_is_reached_if_some_share_of_bad_events_reaches_it(target: Decimal, bound: Decimal) -> None:
    rates = [share / (1 - Fraction(target)) for share in (Fraction(0), Fraction(1, 2), Fraction(1))]
    compare = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
    for name, holds in compare.items():
        # The rates between compare as their ends do.
        assert reachable(name, bound, target) is any(holds(rate, Fraction(bound)) for rate in rates)  # type: ignore[arg-type]


@given(targets, st.integers(1, 10**6))
def test_one_bad_event_spends_the_budget_of_fewer_events_than_are_needed(target: Decimal, events: int) -> None:
    assert one_spends_all(events, target) is (events < fewest_events(target))
    assert not one_spends_all(fewest_events(target), target)


@pytest.mark.parametrize(
    ("target", "fewest"), [("0", 1), ("0.9", 10), ("0.95", 20), ("0.99", 100), ("0.9925", 134)]
)
def test_as_many_events_are_needed_as_leave_room_for_a_bad_one(target: str, fewest: int) -> None:
    assert fewest_events(Decimal(target)) == fewest
