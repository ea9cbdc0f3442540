# ruff: noqa: E501 - a mistake and its message stand on one line, however long
from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import conventions
from gradwatch_slo import objectives as shipped
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import (
    COMPARISONS,
    RANGES,
    RUN_VALUES,
    UNIT_FAULTS,
    Convergence,
    CountRatio,
    Operator,
    RunValue,
    Selection,
    SuccessRate,
    Threshold,
    UnitFault,
    UnitRatio,
)
from gradwatch_slo.objective import ObjectiveSet, load_objectives, objectives_of
from gradwatch_slo.objectives import SHIPPED, default_documents, default_objectives
from gradwatch_slo.openslo import KINDS, SLO
from gradwatch_slo.problems import ObjectiveFileError, one_of
from gradwatch_slo.reader import parse_documents
from gradwatch_slo.slices import Slicing
from gradwatch_slo.source import ENDED_STATUSES, FAULTS, VALUES, Measure, RunStatus, Tier

HEAD = "apiVersion: openslo/v1\n"
RAW = "{rawType: success, raw: {metricSource: {type: gradwatch, spec: {unit: run, measure: success}}}}"


def slo(
    ratio: str = RAW,
    *,
    window: str = "{duration: 28d, isRolling: true}",
    target: str = "target: 0.99",
    more: str = "",
) -> str:
    """An SLO of ten lines: ``ratioMetric`` on line 7, the window on 8, the objective on 10."""
    return f"""\
{HEAD}kind: SLO
metadata: {{name: my-slo}}
spec:
  service: training
  indicator:
    {{metadata: {{name: my-sli}}, spec: {{ratioMetric: {ratio}}}}}
  timeWindow: [{window}]
  budgetingMethod: Occurrences
  objectives: [{{{target}}}]
{more}"""


def source(spec: str, kind: str = "gradwatch") -> str:
    return f"{{metricSource: {{type: {kind}, spec: {spec}}}}}"


def failing(spec: str) -> str:
    """An SLO of faults."""
    return slo(f"{{rawType: failure, raw: {source(spec)}}}")


def threshold(spec: str, *, objective: str = "op: gt, value: 0.1, target: 0.9") -> str:
    """An SLO of a value of runs."""
    return slo(target=objective).replace("ratioMetric: " + RAW, "thresholdMetric: " + source(spec))


def load(text: str) -> ObjectiveSet:
    return objectives_of(parse_documents(text.encode(), "my.yaml"))


def problems(text: str | bytes) -> list[str]:
    """What is wrong with a file, as it is printed."""
    with pytest.raises(ObjectiveFileError) as raised:
        objectives_of(parse_documents(text if isinstance(text, bytes) else text.encode(), "my.yaml"))
    assert str(raised.value).splitlines() == [str(problem) for problem in raised.value.problems]
    return [str(problem) for problem in raised.value.problems]


# --- What is right ---


def test_an_slo_becomes_an_objective() -> None:
    (objective,) = load(slo()).objectives
    assert (objective.name, objective.indicator, objective.target) == ("my-slo", "my-sli", Decimal("0.99"))
    assert objective.measure == SuccessRate(timedelta(0))
    assert (objective.window.duration, objective.window.calendar_start) == (Duration(28, "d"), None)


@given(st.decimals(0, "0.999999999999", places=12))
def test_a_target_is_exactly_the_number_in_the_file(target: Decimal) -> None:
    assert load(slo(target=f"target: {target:f}")).objectives[0].target == target
    percent = target * 100
    assert load(slo(target=f"targetPercent: {percent:f}")).objectives[0].target == target


def test_every_target_is_an_objective() -> None:
    loaded = load(slo(target="target: 0.9}, {targetPercent: 99.5}, {target: 0"))
    assert [objective.target for objective in loaded.objectives] == [Decimal("0.9"), Decimal("0.995"), 0]


def test_a_convergence_source_has_its_own_deadline_and_groups() -> None:
    spec = "{unit: run, measure: convergence, deadline: 2h, where: {job: [a, b, a]}, groupBy: [job, team]}"
    (objective,) = load(slo(f"{{rawType: success, raw: {source(spec)}}}")).objectives
    assert objective.measure == Convergence(timedelta(hours=2))
    assert objective.selection == Selection((("job", ("a", "b")),))
    assert objective.group_by == ("job", "team")


def test_convergence_may_be_held_against_a_run() -> None:
    spec = "{unit: run, measure: convergence, baseline: {run: digits-7}}"
    (objective,) = load(slo(f"{{rawType: success, raw: {source(spec)}}}")).objectives
    assert objective.measure == Convergence(baseline_run="digits-7")


@pytest.mark.parametrize("measure", COMPARISONS)
def test_a_value_that_compares_runs_may_be_held_against_one(measure: RunValue) -> None:
    spec = f"{{unit: run, measure: {measure}, baseline: {{run: digits-7}}}}"
    (objective,) = load(threshold(spec, objective="op: lte, value: 1.2, target: 0.9")).objectives
    assert objective.measure == Threshold(measure, "lte", Decimal("1.2"), baseline_run="digits-7")


def test_a_threshold_is_of_the_objective_and_a_value_of_the_source() -> None:
    spec = "{unit: run, measure: memory_headroom, where: {tier: [production]}, minDuration: 1m, groupBy: [job]}"
    (objective,) = load(threshold(spec, objective="op: gte, value: 0.10, target: 0.9")).objectives
    assert objective.measure == Threshold("memory_headroom", "gte", Decimal("0.1"), timedelta(minutes=1))
    assert (objective.unit, objective.group_by) == ("run", ("job",))
    assert objective.selection == Selection((("tier", ("production",)),))


def test_slos_that_share_a_threshold_indicator_have_their_own_bounds() -> None:
    sli = f"{HEAD}kind: SLI\nmetadata: {{name: headroom}}\nspec: {{thresholdMetric: "
    sli += source("{unit: run, measure: memory_headroom}") + "}\n"
    slos = [
        slo(target=f"op: gt, value: {value}, target: 0.9")
        .replace("  indicator:\n    {", "  indicatorRef: headroom\n#   {")
        .replace("my-slo", f"slo-{number}")
        for number, value in enumerate(("0.1", "0.2"))
    ]
    measures = [each.measure for each in load("---\n".join([sli, *slos])).objectives]
    assert measures == [Threshold("memory_headroom", "gt", Decimal(value)) for value in ("0.1", "0.2")]


@pytest.mark.parametrize(("unit", "fault"), [(unit, f) for unit, faults in UNIT_FAULTS.items() for f in faults])
def test_faults_are_the_failures_of_a_raw_ratio(unit: Literal["step", "checkpoint"], fault: UnitFault) -> None:
    (objective,) = load(failing(f"{{unit: {unit}, measure: {fault}}}")).objectives
    assert (objective.measure, objective.unit) == (UnitRatio(unit, fault), unit)


def test_good_of_total_counts_ended_runs() -> None:
    good = source("{unit: run, where: {status: [succeeded]}}")
    total = source("{unit: run, where: {tier: [production]}, minDuration: 1m, groupBy: [team]}")
    (objective,) = load(slo(f"{{counter: false, good: {good}, total: {total}}}")).objectives
    assert objective.measure == CountRatio(
        total=Selection((("tier", ("production",)), ("status", ENDED_STATUSES))),
        matching=Selection((("status", ("succeeded",)),)),
        min_duration=timedelta(minutes=1),
    )
    assert objective.group_by == ("team",)


def test_options_of_a_source_with_nothing_after_them_are_left_out() -> None:
    empty = "{unit: run, measure: success, where: {job: , tier: [production]}, minDuration: , baseline: , groupBy: }"
    assert load(raw(empty)) == load(raw("{unit: run, measure: success, where: {tier: [production]}}"))


def test_a_ratio_need_not_say_whether_it_counts() -> None:
    good, total = source("{unit: run, where: {status: [succeeded]}}"), source("{unit: run}")
    written, unsaid = (f"{{{counter}good: {good}, total: {total}}}" for counter in ("counter: true, ", ""))
    assert load(slo(unsaid)) == load(slo(written))


def test_a_calendar_window_is_aligned_in_utc() -> None:
    window = "{duration: 1M, calendar: {startTime: '2026-01-01 00:00:00', timeZone: UTC}}"
    rule = load(slo(window=window)).objectives[0].window
    assert str(rule.at(rule.calendar_start).start) == "2026-01-01 00:00:00+00:00"  # type: ignore[arg-type]  # it has one


ALL_KINDS = f"""\
{HEAD}kind: Service
metadata:
  name: training
  labels: {{team: [vision, audio], org: acme}}
  annotations: {{acme.example/dashboard: https://example.com}}
spec: {{description: All training.}}
---
{HEAD}kind: DataSource
metadata: {{name: own, displayName: Ours}}
spec: {{type: gradwatch, connectionDetails: {{anything: [1, 2.5, true, null]}}}}
---
{HEAD}kind: SLI
metadata: {{name: success}}
spec:
  ratioMetric: {{rawType: success, raw: {{metricSource: {{metricSourceRef: own, spec: {{unit: run, measure: success}}}}}}}}
---
{HEAD}kind: AlertNotificationTarget
metadata: {{name: OnCallMail}}
spec: {{target: email, description: Mail}}
---
{HEAD}kind: AlertCondition
metadata: {{name: fast-burn}}
spec: {{severity: page, condition: {{kind: burnrate, threshold: 13.44, lookbackWindow: 1h, alertAfter: 5m}}}}
---
{HEAD}kind: AlertPolicy
metadata: {{name: policy}}
spec:
  alertWhenBreaching: true
  conditions: [{{conditionRef: fast-burn}}]
  notificationTargets: [{{targetRef: OnCallMail}}]
---
{HEAD}kind: SLO
metadata: {{name: by-reference}}
spec:
  service: training
  indicatorRef: success
  timeWindow: [{{duration: 1Q, isRolling: true}}]
  budgetingMethod: Occurrences
  objectives: [{{target: 0.99}}]
  alertPolicies:
    - alertPolicyRef: policy
    - kind: AlertPolicy
      metadata: {{name: inline}}
      spec:
        alertWhenNoData: false
        conditions:
          - kind: AlertCondition
            metadata: {{name: slow-burn}}
            spec: {{severity: ticket, condition: {{threshold: 1, lookbackWindow: 3d}}}}
        notificationTargets:
          - kind: AlertNotificationTarget
            metadata: {{name: inline-target}}
            spec: {{target: slack}}
---
"""


def test_every_kind_validates_and_references_are_followed() -> None:
    documents = parse_documents(ALL_KINDS.encode(), "all.yaml")
    assert {document.content.kind for document in documents} == set(KINDS)
    (objective,) = objectives_of(documents).objectives
    assert (objective.name, objective.indicator, objective.measure) == (
        "by-reference",
        "success",
        SuccessRate(),
    )


def test_references_reach_across_files(tmp_path: Path) -> None:
    documents = ALL_KINDS.split("---\n")
    paths = [tmp_path / f"{index}.yaml" for index in range(len(documents))]
    for path, text in zip(paths, documents, strict=True):
        path.write_text(text or HEAD + "kind: Service\nmetadata: {name: other}\n")
    assert len(load_objectives(reversed(paths)).objectives) == 1


def test_anchors_and_byte_order_marks_are_plain_yaml() -> None:
    text = (
        slo(target="target: &t 0.9}, {displayName: x, targetPercent: 95") + f"---\n{slo(target='target: 0.8')}"
    )
    assert len(objectives_of(parse_documents(b"\xef\xbb\xbf" + text.encode(), "my.yaml")).objectives) == 3
    aliased = slo(target="displayName: &name x, target: 0.9}, {displayName: *name, target: 0.8")
    assert len(load(aliased).objectives) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            slo(f"{{rawType: success, raw: {source('{query: up}', 'Prometheus')}}}"),
            "metrics of the source type 'Prometheus' are out of reach, only gradwatch's own are evaluated",
        ),
        (
            slo(
                "{rawType: failure, raw: {metricSource: {metricSourceRef: elsewhere, type: Datadog, spec: {}}}}"
            ),
            "metrics of the source type 'Datadog' are out of reach, only gradwatch's own are evaluated",
        ),
        (
            slo(f"{{counter: true, good: {source('{unit: step}')}, total: {source('{unit: step}')}}}"),
            "units of kind step are evaluated by their faults, in a raw ratio",
        ),
        (
            slo()
            .replace("ratioMetric: " + RAW, "thresholdMetric: " + source("{unit: epoch}"))
            .replace("target: 0.99", "op: lte, value: 3, target: 0.99"),
            "units of kind epoch are not evaluated",
        ),
        (slo().replace("  timeWindow", "#"), "no timeWindow says which time it is about"),
        (
            slo(target="target: 0.9, indicatorRef: kept-elsewhere").replace("  indicator:\n    {", "#\n#"),
            "it is a composite of several indicators",
        ),
    ],
)
def test_what_is_valid_but_not_ours_to_evaluate_is_a_warning(text: str, reason: str) -> None:
    loaded = load(text)
    assert loaded.objectives == ()
    assert [str(each) for each in loaded.unevaluated] == [f"my-slo cannot be evaluated: {reason}"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("target: 0.9", ["my-slo"]),
        ("target: 0.9}, {target: 0.95", ["my-slo/0.9", "my-slo/0.95"]),
        ("target: 0.9, displayName: fast}, {target: 0.9, displayName: slow", ["my-slo/fast", "my-slo/slow"]),
        ("target: 0.9}, {target: 0.9", ["my-slo/1", "my-slo/2"]),
    ],
)
def test_each_of_several_objectives_has_a_name_of_its_own(targets: str, names: list[str]) -> None:
    assert [each.name for each in load(slo(target=targets)).objectives] == names


@pytest.mark.parametrize(
    ("method", "asked", "slicing"),
    [
        ("Occurrences", "", None),
        (
            "Timeslices",
            ", timeSliceTarget: 0.5, timeSliceWindow: 5",
            Slicing(Duration(5, "m"), Decimal("0.5")),
        ),
        ("RatioTimeslices", ", timeSliceWindow: 1d", Slicing(Duration(1, "d"))),
    ],
)
def test_budgeting_methods_slice_the_window(method: str, asked: str, slicing: Slicing | None) -> None:
    (only,) = load(slo(target=f"target: 0.9{asked}").replace("Occurrences", method)).objectives
    assert only.slicing == slicing


# --- The shipped objectives ---

LONGER = timedelta(minutes=10)


def threshold_of(text: str, min_duration: timedelta = timedelta(0)) -> Threshold:
    """A threshold as it is spoken."""
    value, sign, bound = text.split()
    operators: dict[str, Operator] = {">": "gt", ">=": "gte", "<=": "lte"}
    return Threshold(VALUES[value], operators[sign], Decimal(bound), min_duration)


def test_the_shipped_objectives_are_those_of_the_requirements() -> None:
    made = default_objectives()
    assert made.unevaluated == ()
    assert [
        (each.name, each.indicator, each.selection.fields, each.target, each.measure, str(each.window.duration))
        for each in made.objectives
    ] == [
        (name, name, (("tier", tiers),), Decimal(target), measure, "28d")
        for name, tiers, target, measure in [
            ("training-success-rate", ("production",), "0.99", SuccessRate(timedelta(seconds=60))),
            ("training-success-rate", ("experiment",), "0.9", SuccessRate(timedelta(0))),
            ("time-to-convergence", ("production", "experiment"), "0.9", Convergence()),
            *(
                (name, (tier,), target, measure)
                for name, measure, targets in [
                    ("gradient-health", UnitRatio("step", "unhealthy"), ("0.999", "0.99")),
                    ("finite-training", threshold_of("nonfinite_steps <= 0"), ("0.99", "0.9")),
                    ("gpu-utilization", threshold_of("gpu_utilization > 0.8", LONGER), ("0.9", "0.5")),
                    ("collective-latency", threshold_of("collective_p95_ratio <= 1.5"), ("0.9", "0.8")),
                    ("checkpoint-success", UnitRatio("checkpoint", "failed"), ("0.999", "0.99")),
                    ("memory-headroom", threshold_of("memory_headroom > 0.1"), ("0.99", "0.9")),
                    ("step-cost", threshold_of("step_cost_ratio <= 1.2"), ("0.9", "0.8")),
                    ("model-quality", threshold_of("quality_delta > 0"), ("0.5", "0.1")),
                    (
                        "effective-training-time",
                        threshold_of("effective_time_ratio >= 0.9", LONGER),
                        ("0.9", "0.5"),
                    ),
                ]
                for tier, target in zip(("production", "experiment"), targets, strict=True)
            ),
        ]
    ]
    assert all(each.group_by == ("tier",) for each in made.objectives)
    assert {each.name for each in made.objectives if each.unit != "run"} == {
        "gradient-health",
        "checkpoint-success",
    }


def test_the_shipped_objectives_bear_the_names_that_everything_else_uses() -> None:
    assert {each.name for each in default_objectives().objectives} >= {
        conventions.SLO_TRAINING_SUCCESS_RATE,
        conventions.SLO_TIME_TO_CONVERGENCE,
    }
    assert get_args(Measure) == ("success", "convergence", "count", *RUN_VALUES, *FAULTS)
    assert tuple(RANGES) == RUN_VALUES
    assert get_args(Tier) == (conventions.TIER_PRODUCTION, conventions.TIER_EXPERIMENT)
    assert get_args(RunStatus) == ENDED_STATUSES


def test_every_file_in_the_folder_is_shipped_and_names_a_shipped_service() -> None:
    folder = Path(shipped.__file__).parent
    assert sorted(SHIPPED) == sorted(path.name for path in folder.glob("*.yaml"))
    documents = [document.content for document in default_documents()]
    services = {content.metadata.name for content in documents if content.kind == "Service"}
    assert {content.spec.service for content in documents if isinstance(content, SLO)} == services


# --- What is wrong: one line each, with file, line, field, what was found and what was expected ---

NAMES = "spec.indicator.spec.ratioMetric"
SPEC = f"{NAMES}.raw.metricSource.spec"
SECOND = "metadata.name: found a second my-slo, expected another name, or a field of groupBy of which one selects a single value, and the other does not select it"
VALUE = "spec.indicator.spec.thresholdMetric.metricSource.spec"


def raw(spec: str) -> str:
    return slo(f"{{rawType: success, raw: {source(spec)}}}")


def of_tier(tiers: str, group_by: str) -> str:
    return raw(f"{{unit: run, measure: success, where: {{tier: [{tiers}]}}, groupBy: {group_by}}}")


def of_jobs(jobs: str) -> str:
    return raw(f"{{unit: run, measure: success, where: {{job: [{jobs}]}}, groupBy: [job]}}")


def test_slos_share_a_name_where_what_they_are_grouped_by_tells_them_apart() -> None:
    loaded = load(f"{of_tier('production', '[team, tier]')}---\n{of_tier('experiment', '[tier]')}")
    assert [(objective.name, objective.selection.fields[0][1]) for objective in loaded.objectives] == [
        ("my-slo", ("production",)),
        ("my-slo", ("experiment",)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # YAML itself
        ("", "1: found no document, expected OpenSLO documents"),
        ("# nothing\n---\n---\n", "1: found no document, expected OpenSLO documents"),
        (
            "a: [1,\nb: 2\n",
            "3: is not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
        ("a: 'open\n", "2: is not valid YAML: while scanning a quoted scalar found unexpected end of stream"),
        ("\n\ta: 1\n", "2: is not valid YAML: while scanning for the next token found character '\\t' that cannot start any token"),
        ("a: *nowhere\n", "1: is not valid YAML: found undefined alias 'nowhere'"),
        ("a: 1\nb: \x07\n", "2: found the control character '\\x07', expected plain text"),
        (b"\xef\xbb\xbfa: 1\nb: \xff\n", "2: found byte 0xff, expected UTF-8 text"),
        (b"a: 1\nb: \xff\n", "2: found byte 0xff, expected UTF-8 text"),
        ("[" * 3000, "1: found lists or mappings nested too deeply, expected OpenSLO documents"),
        ("&a [*a]\n", "1: [0]: found an alias of a value around it, expected no cycle"),
        (slo(more='  description: "\\ud800"\n'), "11: spec.description: found half a surrogate pair, expected Unicode text"),
        (slo(more='  "\\ud800": a\n'), "4: spec: found half a surrogate pair in a key, expected Unicode text"),
        (slo(more='  description: "a\\0b"\n'), "11: spec.description: found a null character, expected Unicode text"),
        (slo(more='  "\\0": a\n'), "4: spec: found a null character in a key, expected Unicode text"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "2: is not valid YAML: found a number that is too large"),
        ('a: 1\nb: "\\U00110000"\n', "2: is not valid YAML: found a number that is too large"),
        (f"%YAML 1.{'9' * 5000}\n---\na: 1\n", "1: is not valid YAML: found a number that is too large"),
        # Documents
        ("- a\n", "1: found a list, expected an OpenSLO document: a mapping"),
        (f"{slo()}---\njust words\n", "12: found 'just words', expected an OpenSLO document: a mapping"),
        (slo().replace("openslo/v1", "openslo/v1alpha"), "1: apiVersion: found 'openslo/v1alpha', expected 'openslo/v1'; did you mean 'openslo/v1'?"),
        (slo().replace("kind: SLO", "kind: slo"), f"2: kind: found 'slo', expected one of {', '.join(KINDS)}; did you mean 'SLO'?"),
        (HEAD, f"1: kind: found nothing, expected one of {', '.join(KINDS)}"),
        # Fields
        (slo(more="  descripton: x\n"), "11: spec.descripton: found an unknown field, expected one of description, service, indicator, indicatorRef, timeWindow, budgetingMethod, objectives, alertPolicies; did you mean 'description'?"),
        (slo(more="  service: other\n"), "11: spec.service: found the field twice (first on line 5), expected it once"),
        (slo(more="  <<: {a: 1}\n"), "11: spec.<<: found a merge key, expected the fields themselves"),
        (slo(more="  ? [a]\n  : b\n"), "4: spec: found a list or a mapping as a key, expected a word"),
        (slo(more="  description: !!binary aGk=\n"), "11: spec.description: found the YAML tag !!binary, expected a plain value"),
        (slo(more="  description: !!python/name:os.system x\n"), "11: spec.description: found the YAML tag !!python/name:os.system, expected a plain value"),
        (slo(target='target: !!float "0.99"'), "10: spec.objectives[0].target: found the YAML tag !!float, expected a plain value"),
        (slo(more="  description: !!str x\n"), "11: spec.description: found the YAML tag !!str, expected a plain value"),
        (slo(more="  description: ! x\n"), "11: spec.description: found the YAML tag !, expected a plain value"),
        (slo().replace("metadata: {", "metadata: !!map {", 1), "3: metadata: found the YAML tag !!map, expected a plain value"),
        (slo(more="  !!str description: x\n"), "4: spec: found the YAML tag !!str of a key, expected a plain word"),
        (slo(more="  description: !!set {a}\n"), "11: spec.description: found the YAML tag !!set, expected a plain value"),
        (slo(more=f"  description: {'x' * 1051}\n"), f"11: spec.description: found '{'x' * 57}...', expected at most 1050 characters"),
        (slo().replace("  service: training\n", ""), "4: spec.service: found nothing, expected this required field"),
        (slo().replace("name: my-slo", "name: my slo"), "3: metadata.name: found 'my slo', expected a name: up to 255 letters, digits and any of - . _ | / \\ between them"),
        (slo().replace("name: my-slo", "name: my-slo, labels: {a: 1}"), "3: metadata.labels.a: found 1, expected a text or a list of texts"),
        (slo().replace("Occurrences", "Occurences"), "9: spec.budgetingMethod: found 'Occurences', expected one of Occurrences, Timeslices, RatioTimeslices; did you mean 'Occurrences'?"),
        # Targets
        (slo(target="target: 1"), "10: spec.objectives[0].target: found 1, expected a number below 1"),
        (slo(target="target: -0.1"), "10: spec.objectives[0].target: found -0.1, expected a number of at least 0"),
        (slo(target="targetPercent: 100.0"), "10: spec.objectives[0].targetPercent: found 100.0, expected a number below 100"),
        (slo(target="target: '0.9'"), "10: spec.objectives[0].target: found '0.9', expected a number"),
        (slo(target="target: yes"), "10: spec.objectives[0].target: found true, expected a number"),
        (slo(target="target: .nan"), "10: spec.objectives[0].target: found .nan, expected a decimal number, or a text in quotes"),
        (slo(target="target: 1:30"), "10: spec.objectives[0].target: found 1:30, expected a decimal number, or a text in quotes"),
        (slo(target="target: 1.0e-999999999"), "10: spec.objectives[0].target: found 1.0E-999999999, expected at most 12 decimal places"),
        (slo(target="target: 1.0e+99999999999999999999"), "10: spec.objectives[0].target: found 1.0e+99999999999999999999, expected a decimal number, or a text in quotes"),
        (slo(target="target: 1.0e+999999999"), "10: spec.objectives[0].target: found 1.0E+999999999, expected a number below 1"),
        (slo(target="target: 0." + "9" * 50), "10: spec.objectives[0].target: found a very long number, expected at most 40 characters"),
        (slo(target="target: 0.9, targetPercent: 90"), "10: spec.objectives[0].targetPercent: found target and targetPercent, expected exactly one of target, targetPercent"),
        (slo(target="displayName: x"), "10: spec.objectives[0]: found none of them, expected exactly one of target, targetPercent"),
        (slo(target="target: 0.9, timeSliceWindow: 5m"), "10: spec.objectives[0].timeSliceWindow: found it with Occurrences, expected it with Timeslices or RatioTimeslices"),
        (slo().replace("Occurrences", "RatioTimeslices"), "10: spec.objectives[0]: found no timeSliceWindow, expected it with RatioTimeslices"),
        (slo().replace("[{target: 0.99}]", "[]"), "10: spec.objectives: found 0, expected at least 1 of them"),
        (slo().replace("[{target: 0.99}]", ""), "10: spec.objectives: found nothing, expected a list"),
        # Windows
        (slo(window="{duration: 28x, isRolling: true}"), "8: spec.timeWindow[0].duration: found '28x', expected a duration such as 28d: a positive count and one of m, h, d, w, M, Q, Y"),
        (slo(window="{duration: 28, isRolling: true}"), "8: spec.timeWindow[0].duration: found 28, expected a text such as 28d"),
        (slo(window="{duration: 1d, isRolling: 'yes'}"), "8: spec.timeWindow[0].isRolling: found 'yes', expected true or false"),
        (slo(window=""), "8: spec.timeWindow: found 0, expected at least 1 of them"),
        (slo(window="{duration: 28d}"), "8: spec.timeWindow[0]: found neither isRolling: true nor a calendar, expected one of them"),
        (slo(window="{duration: 28d, isRolling: true}, {duration: 7d, isRolling: true}"), "8: spec.timeWindow: found 2, expected only 1 of them"),
        (slo(window="{duration: 1M, isRolling: true, calendar: {startTime: 2026-01-01 00:00:00, timeZone: UTC}}"), "8: spec.timeWindow[0].calendar: found a calendar in a rolling window, expected one of isRolling and calendar"),
        (slo(window="{duration: 1M, calendar: {startTime: 2026-01-01, timeZone: UTC}}"), "8: spec.timeWindow[0].calendar.startTime: found '2026-01-01', expected a date and time without a zone, such as 2026-01-01 00:00:00"),
        (slo(window="{duration: 1M, calendar: {startTime: 2026-01-01T00:00:00Z, timeZone: UTC}}"), "8: spec.timeWindow[0].calendar.startTime: found '2026-01-01T00:00:00Z', expected a date and time without a zone, such as 2026-01-01 00:00:00"),
        (slo(window="{duration: 1M, calendar: {startTime: 2026-02-31 00:00:00, timeZone: UTC}}"), "8: spec.timeWindow[0].calendar.startTime: found '2026-02-31 00:00:00', expected a date and time without a zone, such as 2026-01-01 00:00:00"),
        (slo(window="{duration: 1M, calendar: {startTime: 2026-01-01 00:00:00, timeZone: Europe/Berln}}"), "8: spec.timeWindow[0].calendar.timeZone: found 'Europe/Berln', expected an IANA time zone such as UTC or Europe/Berlin; did you mean 'Europe/Berlin'?"),
        (slo(window="{duration: 1M, calendar: {startTime: 0001-01-01 00:00:00, timeZone: Asia/Tokyo}}"), "8: spec.timeWindow[0].calendar.startTime: found '0001-01-01 00:00:00', expected a year from 1970 to 2199"),
        (slo(window="{duration: 1M, calendar: {startTime: 9999-12-31 00:00:00, timeZone: UTC}}"), "8: spec.timeWindow[0].calendar.startTime: found '9999-12-31 00:00:00', expected a year from 1970 to 2199"),
        # Indicators
        (slo(more="  indicatorRef: my-sli\n"), "11: spec.indicatorRef: found indicator and indicatorRef, expected exactly one of indicator, indicatorRef"),
        (slo().replace("ratioMetric: " + RAW, "description: x"), "7: spec.indicator.spec: found none of them, expected exactly one of thresholdMetric, ratioMetric"),
        (slo(f"{{counter: true, total: {source('{}', 'x')}}}"), f"7: {NAMES}: found none of them, expected exactly one of good, bad"),
        (slo(f"{{counter: true, good: {source('{}', 'x')}}}"), f"7: {NAMES}: found no total, expected it with good or bad"),
        (slo(f"{{raw: {source('{}', 'x')}}}"), f"7: {NAMES}: found no rawType, expected raw and rawType together"),
        (slo(f"{{rawType: failure, raw: {source('{}', 'x')}, total: {source('{}', 'x')}}}"), f"7: {NAMES}.total: found total beside raw, expected either of the two forms"),
        (slo("{rawType: success, raw: {metricSource: {spec: {}}}}"), f"7: {NAMES}.raw.metricSource: found neither type nor metricSourceRef, expected at least one of them"),
        (slo(RAW.replace("rawType: success", "rawType: failure")), f"7: {NAMES}.rawType: found 'failure', expected 'success': gradwatch measures are good / counted"),
        (slo().replace("ratioMetric: " + RAW, "thresholdMetric: " + source("{}", "x")), "10: spec.objectives[0]: found no op and value, expected both with a thresholdMetric"),
        # The gradwatch source
        (raw("{measure: success}"), f"7: {SPEC}.unit: found nothing, expected this required field"),
        (raw("{unit: runs, measure: count}"), f"7: {SPEC}.unit: found 'runs', expected one of run, step, checkpoint, epoch, slice; did you mean 'run'?"),
        (raw("{unit: run, measure: sucess}"), f"7: {SPEC}.measure: found 'sucess', expected one of success, convergence, count, {', '.join((*RUN_VALUES, *FAULTS))}; did you mean 'success'?"),
        (raw("{unit: run}"), f"7: {SPEC}.measure: found 'count', expected one of success, convergence in a raw ratio"),
        (raw("{unit: step, measure: success}"), f"7: {SPEC}.measure: found success of the unit step, expected the unit run"),
        (raw("{unit: run, measure: success, sql: drop}"), f"7: {SPEC}.sql: found an unknown field, expected one of unit, where, measure, minDuration, deadline, baseline, groupBy"),
        (raw("{unit: run, measure: convergence, deadline: 2h, baseline: {run: a}}"), f"7: {SPEC}.baseline: found a baseline beside a deadline, expected one of them"),
        (raw("{unit: run, measure: success, baseline: {run: a}}"), f"7: {SPEC}.baseline: found a baseline, expected it only with the measure convergence or {' or '.join(COMPARISONS)}"),
        (raw("{unit: run, measure: convergence, baseline: a}"), f"7: {SPEC}.baseline: found 'a', expected a mapping such as {{run: RUN_ID}}"),
        (raw("{unit: run, measure: memory_headroom}"), f"7: {SPEC}.measure: found 'memory_headroom', expected one of success, convergence in a raw ratio"),
        (failing("{unit: run, measure: success}"), f"7: {NAMES}.rawType: found 'failure', expected 'success': gradwatch measures are good / counted"),
        (failing("{unit: step}"), f"7: {SPEC}.measure: found 'count', expected one of unhealthy, nonfinite in a raw ratio"),
        (raw("{unit: step, measure: unhealthy}"), f"7: {NAMES}.rawType: found 'success', expected 'failure': faults are what is bad of all steps"),
        (failing("{unit: checkpoint, measure: nonfinite}"), f"7: {SPEC}.measure: found nonfinite of the unit checkpoint, expected the unit step"),
        (failing("{unit: run, measure: failed}"), f"7: {SPEC}.measure: found failed of the unit run, expected the unit checkpoint"),
        (failing("{unit: step, measure: unhealthy, minDuration: 1m}"), f"7: {SPEC}.minDuration: found a minDuration, expected none with the measure unhealthy"),
        (failing("{unit: step, measure: unhealthy, where: {status: [lost]}}"), f"7: {SPEC}.where.status: found a choice by status, expected none: unhealthy judges it by itself"),
        (threshold("{unit: run, measure: success}"), f"7: {VALUE}.measure: found 'success', expected {one_of(RUN_VALUES)} in a thresholdMetric"),
        (threshold("{unit: step, measure: unhealthy}"), f"7: {VALUE}.measure: found 'unhealthy', expected {one_of(RUN_VALUES)} in a thresholdMetric"),
        (threshold("{unit: step, measure: memory_headroom}"), f"7: {VALUE}.measure: found memory_headroom of the unit step, expected the unit run"),
        (threshold("{unit: run, measure: memory_headroom}", objective="target: 0.9"), "10: spec.objectives[0]: found no op and value, expected both with a thresholdMetric"),
        (threshold("{unit: run, measure: memory_headroom}", objective="op: gt, value: 0.1, target: 0.9}, {op: gt, value: 0.2, target: 0.5"), "10: spec.objectives: found 2, expected only 1 with a thresholdMetric"),
        (raw("{unit: run, measure: success, where: {teir: [production]}}"), f"7: {SPEC}.where.teir: found an unknown field, expected one of job, model, dataset, team, tier, status, reason; did you mean 'tier'?"),
        (raw("{unit: run, measure: success, where: {tier: [prod]}}"), f"7: {SPEC}.where.tier[0]: found 'prod', expected one of production, experiment"),
        (raw("{unit: run, measure: success, where: {tier: production}}"), f"7: {SPEC}.where.tier: found 'production', expected a list"),
        (raw("{unit: run, measure: success, where: {job: []}}"), f"7: {SPEC}.where.job: found 0, expected at least 1 of them"),
        (raw("{unit: run, measure: success, where: {job: [no]}}"), f"7: {SPEC}.where.job[0]: found false, expected a text"),
        (raw("{unit: run, measure: success, where: {job: ['']}}"), f"7: {SPEC}.where.job[0]: found '', expected a text that is not empty"),
        (raw("{unit: run, measure: success, where: {status: [failed]}}"), f"7: {SPEC}.where.status: found a choice by status, expected none: success judges it by itself"),
        (raw("{unit: run, measure: success, deadline: 2h}"), f"7: {SPEC}.deadline: found a deadline, expected it only with the measure convergence"),
        (raw("{unit: run, measure: convergence, minDuration: 2h}"), f"7: {SPEC}.minDuration: found a minDuration, expected none with the measure convergence"),
        (raw("{unit: run, measure: success, minDuration: 1M}"), f"7: {SPEC}.minDuration: found '1M', expected a length of time such as 60s or 2h: a count and one of s, m, h, d, w"),
        (raw("{unit: run, measure: success, minDuration: 110000d}"), f"7: {SPEC}.minDuration: found '110000d', expected a length of time of at most 100 years"),
        (raw("{unit: run, measure: convergence, deadline: 999999999w}"), f"7: {SPEC}.deadline: found '999999999w', expected a length of time of at most 100 years"),
        (raw("{unit: run, measure: success, where: {job: [\"a\\0b\"]}}"), f"7: {SPEC}.where.job[0]: found a null character, expected Unicode text"),
        (raw("{unit: run, measure: success, groupBy: [job, job]}"), f"7: {SPEC}.groupBy[1]: found 'job' again, expected each field once"),
        (raw("{unit: run, measure: success, groupBy: [user]}"), f"7: {SPEC}.groupBy[0]: found 'user', expected one of job, model, dataset, team, tier"),
        (slo(f"{{counter: true, good: {source('{unit: run, measure: success}')}, total: {source('{unit: run}')}}}"), f"7: {NAMES}.good.metricSource.spec.measure: found 'success', expected 'count' here, or raw"),
        (slo(f"{{counter: true, bad: {source('{unit: run, groupBy: [job]}')}, total: {source('{unit: run}')}}}"), f"7: {NAMES}.bad.metricSource.spec.groupBy: found another groupBy than total's, expected the same or none"),
        # Between documents
        (slo().replace("  indicator:\n    {", "  indicatorRef: sucess\n#   {") + f"---\n{HEAD}kind: SLI\nmetadata: {{name: success}}\nspec: {{ratioMetric: {RAW}}}\n", "6: spec.indicatorRef: found 'sucess', expected the name of an SLI in these files; did you mean 'success'?"),
        (f"{slo()}---\n{slo()}", f"14: {SECOND}"),
        (f"{of_tier('production', '[]')}---\n{of_tier('experiment', '[]')}", f"14: {SECOND}"),
        (f"{of_tier('production', '[tier]')}---\n{of_tier('experiment', '[team]')}", f"14: {SECOND}"),
        (f"{of_tier('production', '[tier]')}---\n{of_tier('production, experiment', '[tier]')}", f"14: {SECOND}"),
        (f"{of_jobs('a, b')}---\n{of_jobs('c, d')}", f"14: {SECOND}"),
        (f"{of_tier('production', '[tier]')}---\n{raw('{unit: run, measure: success, groupBy: [tier]}')}", f"14: {SECOND}"),
        (f"{HEAD}kind: Service\nmetadata: {{name: a}}\n---\n{HEAD}kind: Service\nmetadata: {{name: a}}\n", "7: metadata.name: found a second Service 'a', expected each name once"),
        (ALL_KINDS.replace("unit: run", "unit: rnu"), "18: spec.ratioMetric.raw.metricSource.spec.unit: found 'rnu', expected one of run, step, checkpoint, epoch, slice; did you mean 'run'?"),
        (ALL_KINDS.replace("severity: ticket, ", ""), "56: spec.alertPolicies[1].spec.conditions[0].spec.severity: found nothing, expected this required field"),
        (ALL_KINDS.replace("conditionRef: fast-burn", "conditionRef: fast-burn}, {conditionRef: b"), "35: spec.conditions: found 2, expected only 1 of them"),
        (ALL_KINDS.replace("- alertPolicyRef: policy", "- {}"), "48: spec.alertPolicies[0]: found none of them, expected exactly one of alertPolicyRef, spec"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where_and_what(text: str | bytes, expected: str) -> None:
    assert expected.partition(": ")[0].isdigit()
    assert problems(text) == [f"my.yaml:{expected}"]


def test_all_mistakes_of_a_file_are_reported_in_the_order_of_its_lines() -> None:
    wrong = slo(window="{duration: 28x}", target="target: 2, targt: 1", more="  colour: red\n")
    found = problems(f"{wrong}---\n{wrong.replace('service: training', 'service: 5')}")
    assert [line.split(": ")[0:2] for line in found] == [
        ["my.yaml:8", "spec.timeWindow[0]"],
        ["my.yaml:8", "spec.timeWindow[0].duration"],
        ["my.yaml:10", "spec.objectives[0].target"],
        ["my.yaml:10", "spec.objectives[0].targt"],
        ["my.yaml:11", "spec.colour"],
        ["my.yaml:17", "spec.service"],
        ["my.yaml:20", "spec.timeWindow[0]"],
        ["my.yaml:20", "spec.timeWindow[0].duration"],
        ["my.yaml:22", "spec.objectives[0].target"],
        ["my.yaml:22", "spec.objectives[0].targt"],
        ["my.yaml:23", "spec.colour"],
    ]


def test_all_mistakes_of_all_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(slo(target="target: 1"))
    (tmp_path / "two.yaml").write_text("- no\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ObjectiveFileError) as raised:
        load_objectives(tmp_path / name for name in ("one.yaml", "two.yaml", "gone.yaml", "empty"))
    assert str(raised.value).splitlines() == [
        f"{tmp_path}/one.yaml:10: spec.objectives[0].target: found 1, expected a number below 1",
        f"{tmp_path}/two.yaml:1: found a list, expected an OpenSLO document: a mapping",
        f"{tmp_path}/gone.yaml:1: cannot be read: No such file or directory",
        f"{tmp_path}/empty:1: found no *.yaml or *.yml file in it, expected some",
    ]


def test_aliases_cannot_unfold_a_small_file_into_a_huge_one() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert any("found more than 100000 values" in line for line in problems("\n".join(lines)))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_content_whatsoever_is_a_traceback(content: bytes) -> None:
    with pytest.raises(ObjectiveFileError) as raised:
        parse_documents(content, "my.yaml")
    for problem in raised.value.problems:
        assert str(problem).startswith(f"my.yaml:{problem.line}: ")
        assert str(problem).isprintable()
    assert raised.value.problems


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.dates().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_no_value_in_the_place_of_another_is_a_traceback(data: st.DataObject) -> None:
    document = {
        "apiVersion": "openslo/v1",
        "kind": "SLO",
        "metadata": {"name": "a", "labels": {"b": "c"}},
        "spec": {
            "service": "s",
            "indicator": {"metadata": {"name": "i"}, "spec": {"ratioMetric": {"rawType": "success", "raw": {
                "metricSource": {"type": "gradwatch", "spec": {
                    "unit": "run", "measure": "success", "where": {"tier": ["production"]}, "groupBy": ["tier"]}}}}}},
            "timeWindow": [{"duration": "28d", "isRolling": True}],
            "budgetingMethod": "Occurrences",
            "objectives": [{"displayName": "x", "timeSliceWindow": None}],
        },
    }  # fmt: skip
    place = document
    while True:
        key = data.draw(
            st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
        )
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(yaml_values)
    with pytest.raises(ObjectiveFileError):  # it never has a target
        objectives_of(parse_documents(json.dumps(document).encode(), "my.yaml"))
