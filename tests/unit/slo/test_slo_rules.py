"""Prometheus rules made of objectives: what they are, and what they do over time."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from slo_reports import NOW

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_slo.burn_rules import BURN_RULES
from gradwatch_slo.durations import Duration
from gradwatch_slo.objective import Objective, load_objectives, objectives_of
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.reader import parse_documents
from gradwatch_slo.regrouping import grouped
from gradwatch_slo.report import reports_of
from gradwatch_slo.rules import ALERT_NAMES, burn_rules, look_backs, render_rules
from gradwatch_slo.slices import Slicing
from gradwatch_slo.windows import TimeWindow

HERE = Path(__file__).with_name("rules")


def of_runs() -> list[Objective]:
    return list(load_objectives([HERE / "runs.yaml"]).objectives)


def of_steps() -> list[Objective]:
    return list(load_objectives([HERE / "steps.yaml"]).objectives)


def of_slices() -> list[Objective]:
    return list(load_objectives([HERE / "slices.yaml"]).objectives)


def of_sliced_steps() -> list[Objective]:
    return list(load_objectives([HERE / "sliced_steps.yaml"]).objectives)


GOLDEN = {"runs": of_runs, "steps": of_steps, "slices": of_slices, "sliced_steps": of_sliced_steps}


def promtool(*arguments: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "duplicate" not in done.stdout + done.stderr


def rules(objectives: list[Objective]) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(render_rules(objectives))["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_rules_are_those_that_were_looked_at(name: str) -> None:
    assert render_rules(GOLDEN[name]()) == (HERE / f"{name}.rules.yaml").read_text()


def test_only_of_slices_that_may_be_bad_in_part_a_rule_reads_the_budget_too() -> None:
    (in_part,) = of_slices()
    whole = replace(in_part, slicing=Slicing(Duration(1, "d"), Decimal("0.9")))
    reads = [
        "budget_remaining" in rule["expr"]
        for each in (in_part, whole)
        for rule in rules([each])
        if "alert" in rule
    ]
    assert reads == [True, False]


@pytest.mark.prometheus
def test_promtool_accepts_the_rules_of_what_is_shipped(tmp_path: Path) -> None:
    output = tmp_path / "slo.rules.yaml"
    done = CliRunner().invoke(main, ["slo", "rules", "-o", str(output)])
    assert (done.exit_code, done.output) == (0, f"wrote {output}\n")
    assert output.read_text() == render_rules(default_objectives().objectives)
    promtool("check", "rules", output)


@pytest.mark.prometheus
@pytest.mark.parametrize("name", GOLDEN)
def test_the_rules_fire_stay_quiet_and_resolve(name: str) -> None:
    promtool("check", "rules", HERE / f"{name}.rules.yaml")
    promtool("test", "rules", HERE / f"{name}.test.yaml")


ALWAYS, NEVER = "vector(2)", "vector(1) > 1"
BREAKAGES = [
    pytest.param(name, index, expr, id=f"{name}-{index}-{'always' if expr == ALWAYS else 'never'}")
    for name in GOLDEN
    for index, rule in enumerate(rules(GOLDEN[name]()))
    if "alert" in rule
    for expr in (ALWAYS, NEVER)
]


@pytest.mark.prometheus
@pytest.mark.parametrize(("name", "index", "expr"), BREAKAGES)
def test_the_rule_tests_notice_a_rule_that_is_broken(tmp_path: Path, name: str, index: int, expr: str) -> None:
    broken = yaml.safe_load(render_rules(GOLDEN[name]()))
    [rule for group in broken["groups"] for rule in group["rules"]][index]["expr"] = expr
    (tmp_path / f"{name}.rules.yaml").write_text(yaml.safe_dump(broken))
    shutil.copy(HERE / f"{name}.test.yaml", tmp_path)
    with pytest.raises(AssertionError, match="alertname"):
        promtool("test", "rules", tmp_path / f"{name}.test.yaml")


def test_rules_read_only_series_that_the_collector_shows_and_link_to_runbooks_that_exist() -> None:
    known = {family.name: set(family.labels) for family in c.FAMILIES}
    recorded = set()
    for rule in rules([*of_runs(), *of_steps()]):
        if "record" in rule:
            recorded.add(rule["record"])
            assert rule["record"].split(":")[1] in known
            assert rule["record"].split(":")[1] in rule["expr"]
        else:
            assert rule["alert"] in ALERT_NAMES
            assert rule["annotations"]["runbook_url"] == c.runbook_url(rule["alert"])
            assert rule["labels"]["severity"] in ("page", "ticket")
            if rule["labels"]["severity"] == "page":
                assert rule["labels"]["tier"] == c.TIER_PRODUCTION
    assert {rule["alert"] for rule in rules([*of_runs(), *of_steps()]) if "alert" in rule} == set(ALERT_NAMES)
    assert recorded == {
        f"slo:{family.name}:max"
        for family in (c.SLO_SLI, c.SLO_BUDGET_REMAINING, c.SLO_EVENTS, c.SLO_P_VALUE, c.SLO_BURN_RATE)
    }


def test_the_links_lead_where_they_are_asked_to() -> None:
    done = CliRunner().invoke(
        main, ["slo", "rules", "--runbook-url", "https://wiki/books/", "--grafana-url", "https://grafana/"]
    )
    for rule in (rule for group in yaml.safe_load(done.stdout)["groups"] for rule in group["rules"]):
        if "alert" in rule:
            assert rule["annotations"]["runbook_url"] == f"https://wiki/books/{rule['alert']}.md"
            assert rule["annotations"]["dashboard_url"] == "https://grafana/d/gradwatch-executive"


@pytest.mark.parametrize("option", ["--runbook-url", "--grafana-url"])
@pytest.mark.parametrize(
    "url",
    [
        "{{",
        "https://a/{{ $labels.slo }}",
        "javascript:alert(1)",
        "https://",
        "https:///x",
        "wiki",
        "https://a\x00",
    ],
)
def test_what_is_no_address_of_a_page_is_refused(option: str, url: str) -> None:
    done = CliRunner().invoke(main, ["slo", "rules", option, url])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "expected an address such as" in done.stderr


# --- Burn rates ---


def many(target: str = "0.999", duration: str = "28d") -> Objective:
    return replace(of_steps()[0], target=Decimal(target), window=TimeWindow(Duration.parse(duration)))


def test_the_rates_are_the_workbooks_scaled_to_the_window() -> None:
    over_28_days = [rule.rate(timedelta(days=28)) for rule in BURN_RULES]
    assert over_28_days == [Fraction("13.44"), Fraction("5.6"), Fraction("2.8"), Fraction(14, 15)]
    assert [rule.rate(timedelta(days=30)) for rule in BURN_RULES] == [Fraction("14.4"), 6, 3, 1]
    assert [rule.short for rule in BURN_RULES] == [timedelta(minutes=m) for m in (5, 30, 120, 360)]


@given(st.sampled_from(BURN_RULES), st.integers(1, 400))
def test_a_rate_held_for_its_look_back_spends_its_share_of_the_budget(rule: Any, days: int) -> None:
    window = timedelta(days=days)
    # A rate of 1 spends the whole budget in the whole window.
    assert (
        rule.rate(window) * Fraction(rule.long // timedelta(minutes=1), window // timedelta(minutes=1))
        == rule.share
    )


@pytest.mark.parametrize(
    ("target", "duration", "expected"),
    [
        ("0.999", "28d", ["5m", "1h", "30m", "6h", "2h", "1d", "6h", "3d"]),
        ("0.999", "1M", ["5m", "1h", "30m", "6h", "2h", "1d", "6h", "3d"]),
        # Burning 13.44 times the budget of a tenth would be more than everything.
        ("0.9", "28d", ["30m", "6h", "2h", "1d", "6h", "3d"]),
        ("0.7", "28d", ["2h", "1d", "6h", "3d"]),
        # A tenth of a week's budget in a day is less than a seventh.
        ("0.999", "7d", ["5m", "1h", "30m", "6h"]),
        ("0.999", "1d", []),
        ("0", "28d", ["6h", "3d"]),
    ],
)
def test_rules_that_could_never_fire_or_would_tell_of_what_is_met_are_left_out(
    target: str, duration: str, expected: list[str]
) -> None:
    assert look_backs(many(target, duration)) == list(dict.fromkeys(expected))


@given(st.decimals("0", "0.9999", places=4), st.integers(1, 1000))
def test_every_rate_that_is_left_can_be_reached(target: Decimal, days: int) -> None:
    for rule in burn_rules(many(str(target), f"{days}d")):
        assert rule.rate(timedelta(days=days)) * (1 - Fraction(target)) < 1


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("2m", ["5m", "1h", "30m", "6h", "2h", "1d", "6h", "3d"]),
        ("3m", ["6m", "1h", "30m", "6h", "2h", "1d", "6h", "3d"]),
        ("30m", ["1h", "6h", "2h", "1d", "6h", "3d"]),
        ("31m", ["62m", "6h", "2h", "1d", "6h", "3d"]),
        ("12h", ["1d", "3d"]),
        ("1d", ["2d", "3d"]),
        ("36h", ["3d"]),
        ("2d", []),
        ("1M", []),
    ],
)
def test_rules_look_back_over_two_slices_at_least(length: str, expected: list[str]) -> None:
    for target in (Decimal("0.9"), None):
        sliced = replace(many(), slicing=Slicing(Duration.parse(length), target))
        assert look_backs(sliced) == list(dict.fromkeys(expected))


@pytest.mark.parametrize(("look_back", "is_made"), [("23h", False), ("1d", False), ("25h", True)])
def test_a_policy_that_looks_back_over_no_whole_slice_is_no_rule(look_back: str, is_made: bool) -> None:
    policy = replace(of_runs()[0].alerts[0], look_back=Duration.parse(look_back), when_breaching=True)
    sliced = replace(many(), slicing=Slicing(Duration(1, "d")), alerts=(policy,))
    assert ("GradwatchAlertPolicy" in {rule.get("alert") for rule in rules([sliced])}) is is_made


def test_runs_are_too_few_for_burn_rates_unless_a_policy_asks() -> None:
    production, experiments = of_runs()
    assert burn_rules(production) == []
    assert look_backs(production) == ["6h", "1h"]
    assert look_backs(experiments) == ["6h"]


# --- Several SLOs of one name ---

OF_ONE_NAME = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: finite}
spec:
  service: training
  indicator:
    metadata: {name: finite}
    spec:
      ratioMetric:
        rawType: failure
        raw:
          metricSource:
            type: gradwatch
            spec: {unit: step, measure: nonfinite, where: WHERE, groupBy: FIELDS}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.99}]
"""


def of_one_name(where: dict[str, list[str]], fields: list[str]) -> str:
    return OF_ONE_NAME.replace("WHERE", str(where)).replace("FIELDS", str(fields))


def some(*values: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), unique=True, min_size=1)


wheres = st.fixed_dictionaries(
    {}, optional={"job": some("a", "b", "c", "d"), "tier": some("production", "experiment")}
)


@given(st.lists(st.builds(of_one_name, wheres, some("job", "tier")), min_size=2, max_size=6))
@example([of_one_name({"job": jobs}, ["job"]) for jobs in (["a", "b"], ["c", "d"])])
def test_slos_may_share_a_name_only_if_alerts_and_rows_of_reports_tell_whose_they_are(files: list[str]) -> None:
    text = ""
    for file in files:
        try:
            objectives_of(parse_documents(f"{text}---{file}".encode(), "finite.yaml"))
        except ObjectiveFileError:
            continue
        text += f"---{file}"
    objectives = list(objectives_of(parse_documents(text.encode(), "finite.yaml")).objectives)
    alerts = [(rule.get("alert"), rule["labels"]) for rule in rules(objectives) if "alert" in rule]
    assert all(alerts.count(each) == 1 for each in alerts)
    for shown in (objectives, [grouped(each, ("team",)) for each in objectives]):
        groups = [each.group for one in shown for each in reports_of(one, one.window.at(NOW), {})]
        assert all(groups.count(each) == 1 for each in groups)


# --- Text in rules ---


@pytest.mark.prometheus
def test_no_name_of_a_job_breaks_a_rule(tmp_path: Path) -> None:
    odd = ('"quoted"', "back\\slash", "{{ brace }}", "new\nline", "ünïcode", "a|b", "x.y", "[a-z]")
    named = replace(
        of_runs()[0],
        name="odd\\name|x/y",
        selection=replace(of_runs()[0].selection, fields=(("job", odd),)),
    )
    single = replace(named, name="single", selection=replace(named.selection, fields=(("job", odd[2:3]),)))
    output = tmp_path / "rules.yaml"
    output.write_text(render_rules([named, single]))
    promtool("check", "rules", output)
    assert yaml.safe_load(output.read_text())["groups"][1]["rules"][-1]["labels"]["training_job"] == (
        '{{ "{{ brace }}" }}'
    )
