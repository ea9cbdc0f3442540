# ruff: noqa: E501 - a warning stands on one line, however long
"""What is legal, but useless."""

from __future__ import annotations

import itertools
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


SUCCESS = "rawType: success, raw: {metricSource: {type: gradwatch, spec: {unit: run, measure: success}}}"
ROLLING = "{duration: 28d, isRolling: true}"


def slo(
    metric: str = f"ratioMetric: {{{SUCCESS}}}",
    *,
    window: str = ROLLING,
    method: str = "Occurrences",
    objective: str = "target: 0.9",
    more: str = "",
) -> str:
    return f"""\
apiVersion: openslo/v1
kind: SLO
metadata: {{name: mine}}
spec:
  service: training
  indicator: {{metadata: {{name: mine}}, spec: {{{metric}}}}}
  timeWindow: [{window}]
  budgetingMethod: {method}
  objectives: [{{{objective}}}]
{more}"""


def threshold(spec: str) -> str:
    return f"thresholdMetric: {{metricSource: {{type: gradwatch, spec: {{{spec}}}}}}}"


def faults(spec: str) -> str:
    return f"ratioMetric: {{rawType: failure, raw: {{metricSource: {{type: gradwatch, spec: {{{spec}}}}}}}}}"


def parts(name: str, part: str, total: str) -> str:
    """A ratio of what is ``part`` of ``total``, each by the fields that are chosen by."""
    sources = (
        f"{each}: {{metricSource: {{type: gradwatch, spec: {{unit: run, where: {{{where}}}}}}}}}"
        for each, where in ((name, part), ("total", total))
    )
    return f"ratioMetric: {{{', '.join(sources)}}}"


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("op: gt, value: 1", "found gt 1, expected what can be: memory_headroom goes from any number to 1, so every run is bad"),
        ("op: lte, value: 1", "found lte 1, expected what need not be: memory_headroom goes from any number to 1, so every run is good"),
        ("op: gte, value: 1", None),
        ("op: lt, value: -5", None),
    ],
)  # fmt: skip
def test_a_bound_that_every_run_meets_or_none_can_is_useless(bound: str, expected: str | None) -> None:
    text = slo(threshold("unit: run, measure: memory_headroom"), objective=f"{bound}, target: 0.9")
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
        ("        alertWhenBreaching: true\n", "        alertWhenResolved: true\n", ["spec.alertPolicies[0].spec: found neither alertWhenBreaching nor alertWhenNoData true, expected one of them: as it is the alert can never fire"]),
        ("        alertWhenBreaching: true\n", "        alertWhenNoData: true\n", []),
        ("        alertWhenBreaching: true\n", "", ["spec.alertPolicies[0].spec: found neither alertWhenBreaching nor alertWhenNoData true, expected one of them: as it is the alert can never fire"]),
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
    ("objective", "expected"),
    [
        ("targetPercent: 0.99", ["spec.objectives[0].targetPercent: found 0.99, expected a percentage; did you mean 99?"]),
        ("targetPercent: 0.50", ["spec.objectives[0].targetPercent: found 0.50, expected a percentage; did you mean 50?"]),
        ("targetPercent: 1", []),
        ("target: 0.009", []),
    ],
)  # fmt: skip
def test_a_share_for_a_percentage_is_useless(objective: str, expected: list[str]) -> None:
    assert warnings(slo(objective=objective)) == expected


@pytest.mark.parametrize(
    ("name", "is_nearly"),
    [
        ("Gradwatch", True),
        ("grad-watch", True),
        ("gradwach", True),
        ("gradwatch", False),
        ("CloudWatch", False),
    ],
)
def test_a_source_that_is_only_nearly_ours_is_useless(name: str, is_nearly: bool) -> None:
    told = f"found '{name}', expected a source that is evaluated here; did you mean 'gradwatch'?"
    by_itself = slo(f"ratioMetric: {{{SUCCESS.replace('gradwatch', name)}}}")
    at = "spec.indicator.spec.ratioMetric.raw.metricSource.type"
    assert warnings(by_itself) == ([f"{at}: {told}"] if is_nearly else [])
    by_name = slo(f"ratioMetric: {{{SUCCESS.replace('type: gradwatch', 'metricSourceRef: own')}}}")
    data_source = "apiVersion: openslo/v1\nkind: DataSource\nmetadata: {name: own}\n"
    data_source += f"spec: {{type: {name}, connectionDetails: }}\n"
    assert warnings(f"{data_source}---\n{by_name}") == ([f"spec.type: {told}"] if is_nearly else [])


def spent(says: str, units: str) -> list[str]:
    expected = "a lower target or a longer window: one failure spends the budget, as it takes"
    return [f"spec.objectives[0]: found {says}, expected {expected} {units} a second"]


@pytest.mark.parametrize(
    ("metric", "window", "target", "expected"),
    [
        (f"ratioMetric: {{{SUCCESS}}}", "1m", "target: 0.99", spent("0.99 over 1m", "100 runs to allow one, more than 1")),
        (f"ratioMetric: {{{SUCCESS}}}", "1m", "targetPercent: 99", spent("0.99 over 1m", "100 runs to allow one, more than 1")),
        (f"ratioMetric: {{{SUCCESS}}}", "1m", "target: 0.98", []),
        (f"ratioMetric: {{{SUCCESS}}}", "2m", "target: 0.99", []),
        (threshold("unit: run, measure: quality"), "1h", "op: gt, value: 1, target: 0.9999", spent("0.9999 over 1h", "10000 runs to allow one, more than 1")),
        (parts("good", "status: [succeeded]", ""), "1h", "target: 0.9999", spent("0.9999 over 1h", "10000 runs to allow one, more than 1")),
        (faults("unit: checkpoint, measure: failed"), "1h", "target: 0.9999", spent("0.9999 over 1h", "10000 checkpoints to allow one, more than 1")),
        (faults("unit: step, measure: nonfinite"), "1m", "target: 0.99999", spent("0.99999 over 1m", "100000 steps to allow one, more than 1000")),
        (faults("unit: step, measure: nonfinite"), "1m", "target: 0.9999", []),
        # How many of them there are nobody knows.
        (faults("unit: step, measure: nonfinite").replace("gradwatch", "Prometheus"), "1m", "target: 0.999999", []),
    ],
)  # fmt: skip
def test_a_window_too_short_for_its_target_is_useless(
    metric: str, window: str, target: str, expected: list[str]
) -> None:
    alerted = POLICY.replace("WHEN", "alertWhenBreaching: true")
    text = slo(metric, window=f"{{duration: {window}, isRolling: true}}", objective=target, more=alerted)
    assert [said for said in warnings(text) if said.startswith("spec.objectives[0]:")] == expected


STATUSES, TIERS = ("succeeded", "failed", "cancelled", "lost"), ("production", "experiment")
# A job may have any name, also one that no file has.
JOBS = ("a", "b", "any other")
choices = st.fixed_dictionaries(
    {},
    optional={
        name: st.lists(st.sampled_from(values), min_size=1, unique=True)
        for name, values in (("status", STATUSES), ("tier", TIERS), ("job", JOBS[:-1]))
    },
)


@given(choices, choices, st.sampled_from(["good", "bad"]))
def test_a_part_that_is_nothing_or_all_of_the_total_is_useless(
    part: dict[str, list[str]], total: dict[str, list[str]], name: str
) -> None:
    def matches(where: dict[str, list[str]], run: dict[str, str]) -> bool:
        return all(run[field] in values for field, values in where.items())

    runs = [
        run
        for values in itertools.product(STATUSES, TIERS, JOBS)
        if matches(total, run := dict(zip(("status", "tier", "job"), values, strict=True)))
    ]
    in_part = [matches(part, run) for run in runs]
    where = (", ".join(f"{field}: {values}" for field, values in each.items()) for each in (part, total))
    said = [warning.partition(": ")[2] for warning in warnings(slo(parts(name, *where)))]
    other = {"good": "bad", "bad": "good"}[name]
    if all(in_part):
        assert said == [f"found all of total, expected a part of it: so every run is {name}"]
    elif not any(in_part):
        assert said == [f"found none of total's, expected some: so every run is {other}"]
    else:
        assert said == []


def test_what_is_none_of_the_total_is_told_at_its_field() -> None:
    text = slo(parts("good", "job: [a], tier: [production]", "job: [a, b], tier: [experiment]"))
    (warning,) = warnings(text)
    assert warning.startswith("spec.indicator.spec.ratioMetric.good.metricSource.spec.where.tier: ")


@pytest.mark.parametrize(
    ("metric", "objective", "expected"),
    [
        (f"ratioMetric: {{{SUCCESS}}}", "target: 0.9, op: gt, value: 3", [
            f"spec.objectives[0].{name}: found it with a ratioMetric, expected it with a thresholdMetric: it is ignored" for name in ("op", "value")
        ]),
        (threshold("unit: run, measure: quality"), "target: 0.9, op: gt, value: 3", []),
        (f"ratioMetric: {{{SUCCESS}}}", "target: 0.9, compositeWeight: 2", [
            "spec.objectives[0].compositeWeight: found it with an indicator of the whole SLO, expected it in a composite SLO: it is ignored"
        ]),
    ],
)  # fmt: skip
def test_what_is_ignored_is_useless(metric: str, objective: str, expected: list[str]) -> None:
    assert warnings(slo(metric, objective=objective)) == expected


def test_an_slo_without_a_window_is_warned_of_all_else() -> None:
    alerted = POLICY.replace("WHEN", "alertWhenResolved: true").replace("1h", "100Y")
    text = slo(
        parts("good", "", ""),
        objective="target: 0, timeSliceWindow: 2m",
        method="RatioTimeslices",
        more=alerted,
    )
    without = text.replace(f"[{ROLLING}]", "")
    assert [warning.partition(": found")[0] for warning in warnings(without)] == [
        "spec.indicator.spec.ratioMetric.good.metricSource.spec",
        "spec.objectives[0].target",
        "spec.alertPolicies[0].spec",
        "spec.alertPolicies[0].spec.conditions[0].spec.condition.threshold",
    ]


COMPOSITE = COMPLETE[COMPLETE.rindex("---") :]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("target: 0.8\n", "target: 0.8\n      op: gt\n", ["spec.objectives[1].op: found it with a ratioMetric, expected it with a thresholdMetric: it is ignored"]),
        ("target: 0.8\n", "target: 0\n", ["spec.objectives[1].target: found 0, expected more: whatever happens, it is met"]),
        ("type: Prometheus", "type: Gradwatch", ["spec.objectives[1].indicator.spec.ratioMetric.bad.metricSource.type: found 'Gradwatch', expected a source that is evaluated here; did you mean 'gradwatch'?"]),
        # It burns as fast as all its objectives together.
        ("  budgetingMethod: Occurrences\n", "  budgetingMethod: Occurrences" + POLICY.replace("WHEN", "alertWhenBreaching: true").replace("threshold: 50", "threshold: 200"), []),
    ],
)  # fmt: skip
def test_composites_are_warned_of_by_their_objectives(before: str, after: str, expected: list[str]) -> None:
    assert before in COMPOSITE
    assert warnings(COMPOSITE.replace(before, after, 1)) == expected


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
    text = slo(
        faults("unit: step, measure: nonfinite"),
        window=f"{{duration: {window}, isRolling: true}}",
        objective=f"target: {target}",
        more=policy,
    )
    untold = (
        f"spec.objectives[0]: found {target} over {window}, expected a higher target, a longer window or an alert"
        " policy: no alert is made of it, so nobody is told"
    )
    assert (untold in warnings(text)) is not is_told
    file = tmp_path / "steps.yaml"
    file.write_text(text)
    rules = CliRunner().invoke(main, ["slo", "rules", "-f", str(file)])
    assert ("- alert:" in rules.stdout) is is_told
    assert rules.stderr == ("" if is_told else "warning: mine: no alert is made of it, so nobody is told\n")


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
        # Told of its slices, and not of its runs as well.
        ("{duration: 10m, isRolling: true}", "0.999", "1m", "one bad slice of the 9 in the window of 10m spends the budget, and with the target 0.999 it takes 1000 to allow one"),
        ("{duration: 20h, calendar: {startTime: '2025-01-01 00:00:00', timeZone: UTC}}", "0.95", "1h", None),
        ("{duration: 20h, isRolling: true}", "0.95", "1h", "one bad slice of the 19 in the window of 20h spends the budget, and with the target 0.95 it takes 20 to allow one"),
    ],
)  # fmt: skip
def test_slices_are_enough_for_a_verdict_and_a_bad_one(
    method: str, window: str, target: str, length: str, expected: str | None
) -> None:
    share = "timeSliceTarget: 0.9, " if method == "Timeslices" else ""
    objective = f"target: {target}, {share}timeSliceWindow: {length}"
    text = slo(window=window, method=method, objective=objective)
    found = f"spec.objectives[0].timeSliceWindow: found {length}, expected a shorter one"
    assert warnings(text) == ([] if expected is None else [f"{found}: {expected}"])


@pytest.mark.parametrize(
    ("window", "length", "policy", "is_told"),
    [
        ("28d", "36h", "", True),
        ("28d", "37h", "", False),
        # Of a week only the looks back over an hour and six are rules.
        ("7d", "3h", "", True),
        ("7d", "4h", "", False),
        ("28d", "2d", POLICY.replace("WHEN", "alertWhenBreaching: true").replace("1h", "4d"), True),
        ("28d", "2d", POLICY.replace("WHEN", "alertWhenBreaching: true"), False),
        ("28d", "2d", POLICY.replace("WHEN", "alertWhenNoData: true"), True),
    ],
)
def test_an_objective_whose_slices_are_too_long_for_any_alert_is_useless(
    tmp_path: Path, window: str, length: str, policy: str, is_told: bool
) -> None:
    text = slo(
        faults("unit: step, measure: nonfinite"),
        window=f"{{duration: {window}, isRolling: true}}",
        method="RatioTimeslices",
        objective=f"target: 0.99, timeSliceWindow: {length}",
        more=policy,
    )
    untold = (
        f"spec.objectives[0]: found 0.99 over {window}, expected shorter slices, a higher target, a longer window"
        " or an alert policy: no alert is made of it, so nobody is told"
    )
    assert (untold in warnings(text)) is not is_told
    file = tmp_path / "steps.yaml"
    file.write_text(text)
    rules = CliRunner().invoke(main, ["slo", "rules", "-f", str(file)])
    assert ("- alert:" in rules.stdout) is is_told
    assert rules.stderr == ("" if is_told else "warning: mine: no alert is made of it, so nobody is told\n")


@pytest.mark.parametrize("method", ["Timeslices", "RatioTimeslices"])
@pytest.mark.parametrize("metric", [f"ratioMetric: {{{SUCCESS}}}", faults("unit: step, measure: nonfinite")])
@pytest.mark.parametrize(
    ("look_back", "when", "expected"),
    [
        ("59m", "alertWhenBreaching: true", "it holds no whole slice, so the alert can never fire"),
        ("1h", "alertWhenBreaching: true", "it holds no whole slice, so the alert can never fire"),
        ("1h", "{alertWhenBreaching: true, alertWhenNoData: true}", "it holds no whole slice, so the alert always fires"),
        ("61m", "alertWhenBreaching: true", "at times it holds no whole slice"),
        ("119m", "alertWhenNoData: true", "at times it holds no whole slice"),
        ("2h", "{alertWhenBreaching: true, alertWhenNoData: true}", None),
    ],
)  # fmt: skip
def test_a_look_back_that_need_not_hold_a_whole_slice_is_useless(
    method: str, metric: str, look_back: str, when: str, expected: str | None
) -> None:
    share = "timeSliceTarget: 0.9, " if method == "Timeslices" else ""
    more = POLICY.replace("WHEN", when.strip("{}").replace(", ", "\n        "))
    text = slo(
        metric,
        method=method,
        objective=f"target: 0.99, {share}timeSliceWindow: 1h",
        more=more.replace("1h", look_back),
    )
    at = "spec.alertPolicies[0].spec.conditions[0].spec.condition.lookbackWindow"
    says = f"{at}: found {look_back}, expected at least twice the timeSliceWindow of 'mine', 1h"
    assert warnings(text) == ([] if expected is None else [f"{says}: {expected}"])
    # What others evaluate may look back in another way.
    assert warnings(text.replace("type: gradwatch", "type: Prometheus")) == []


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
