"""Every rule of findings, over time: it is told of, with the right labels, and resolves.

What is told is the same for all, so that the tests are made from the table below, and judged by promtool.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch import conventions as c
from gradwatch_collector.findings import RULES as DETECTED
from gradwatch_collector.findings import Severity
from tests.unit.alerts.shipped import RULES, all_rules, assert_passes, run

# Whom a rule asks to get up in production; all others never do.
PAGES = {
    c.RULE_RUN_FAILED, c.RULE_RUN_LOST, c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE, c.RULE_STALLED,
    c.RULE_CHECKPOINT_CORRUPT, c.RULE_NONFINITE,
}  # fmt: skip
# What machines, networks, storage or the platform are at fault in; all others are the model's people's.
PLATFORM = {
    c.RULE_RUN_FAILED, c.RULE_RUN_LOST, c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE, c.RULE_STALLED,
    c.RULE_SLOW_COLLECTIVE, c.RULE_STRAGGLER, c.RULE_CHECKPOINT_CORRUPT, c.RULE_CHECKPOINT_FAILED,
    c.RULE_CHECKPOINT_STALE, c.RULE_STEP_TIME_REGRESSION,
}  # fmt: skip
# An outage of many is told within this, before each of its runs is.
HELD = {c.RULE_STALLED, c.RULE_SLOW_COLLECTIVE, c.RULE_STRAGGLER}

TOLD = sorted(c.RULE_ALERTS.keys() - c.RULES_WITHOUT_ALERT)
BY_ALERT = {rule["alert"]: rule for rule in all_rules()}


def series(rule: str, run_id: str, severity: str, tier: str, values: str, **scrape: str) -> dict[str, str]:
    labels = {
        "run_id": run_id, "rule": rule, "severity": severity, "team": "vision", "tier": tier,
        "training_job": "resnet", "job": "gradwatch-collector", **scrape,
    }  # fmt: skip
    told = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    return {"series": f"{c.FINDING_ACTIVE.name}{{{told}}}", "values": values}


def alert(rule: str, run_id: str, severity: str, tier: str) -> dict[str, Any]:
    annotations = BY_ALERT[c.RULE_ALERTS[rule]]["annotations"]
    # What promtool renders is compared with this: Go's template language, as far as these texts need it.
    said = {"$labels.run_id | urlquery": run_id, "$labels.run_id": run_id, "$labels.training_job": "resnet"}
    for told, value in said.items():
        annotations = {name: text.replace(f"{{{{ {told} }}}}", value) for name, text in annotations.items()}
    annotations["summary"] = re.sub(
        r"{{ if eq .* }}(.*){{ else }}(.*){{ end }}",
        r"\1" if severity == "page" else r"\2",
        annotations["summary"],
    )
    # The reason of a run that failed is on a series that is not there.
    annotations["description"] = re.sub(r"{{ with printf .*{{ end }}", "", annotations["description"])
    return {
        "exp_labels": {
            "severity": severity,
            "slo_severity": "page" if rule in PAGES else "ticket",
            "owner": "ml-sre" if rule in PLATFORM else "ml-engineer",
            "run_id": run_id,
            "rule": rule,
            "team": "vision",
            "tier": tier,
            "training_job": "resnet",
        },
        "exp_annotations": annotations,
    }


def over_time(rule: str) -> dict[str, Any]:
    """A production run's finding on two replicas, an experiment's, and two that are for information."""
    loud = "page" if rule in PAGES else "ticket"
    both = [alert(rule, "r1", loud, c.TIER_PRODUCTION), alert(rule, "r2", "ticket", c.TIER_EXPERIMENT)]
    begins = "34s" if rule in HELD else "4s"
    name = c.RULE_ALERTS[rule]
    return {
        "name": f"{rule} is told once for each run, not when it is for information, and resolves",
        "interval": "2s",
        "input_series": [
            series(rule, "r1", loud, c.TIER_PRODUCTION, "_ _ 1x19 stale", instance="a:4318"),
            series(rule, "r1", loud, c.TIER_PRODUCTION, "_ _ 1x19 stale", instance="b:4318", pod="b"),
            series(rule, "r2", "ticket", c.TIER_EXPERIMENT, "_ _ 1x19 stale"),
            series(rule, "r3", "info", c.TIER_PRODUCTION, "1x120"),
            series(f"not_{rule}", "r4", loud, c.TIER_PRODUCTION, "1x120"),
        ],
        "alert_rule_test": [
            {"eval_time": "2s", "alertname": name, "exp_alerts": []},
            *([{"eval_time": "30s", "alertname": name, "exp_alerts": []}] if rule in HELD else []),
            {"eval_time": begins, "alertname": name, "exp_alerts": both},
            {"eval_time": "2m40s", "alertname": name, "exp_alerts": both},
            {"eval_time": "2m48s", "alertname": name, "exp_alerts": []},
        ],
    }


def rule_tests(rules: list[str], about: Path = RULES) -> str:
    document = {
        "rule_files": [str(about)],
        "evaluation_interval": "2s",
        "tests": [over_time(rule) for rule in rules],
    }
    return yaml.safe_dump(document, sort_keys=False)


@pytest.mark.prometheus
def test_every_finding_is_told_of_with_its_labels_and_resolves(tmp_path: Path) -> None:
    tests = tmp_path / "tests.yaml"
    tests.write_text(rule_tests(TOLD), encoding="utf-8")
    assert_passes("promtool", "test", "rules", tests)


@pytest.mark.prometheus
@pytest.mark.parametrize("expr", ["vector(2)", "vector(1) > 1"], ids=["always", "never"])
@pytest.mark.parametrize("rule", TOLD)
def test_a_rule_of_findings_that_is_broken_is_noticed(tmp_path: Path, rule: str, expr: str) -> None:
    alone = {**BY_ALERT[c.RULE_ALERTS[rule]], "expr": expr}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [alone]}]}))
    tests = tmp_path / "tests.yaml"
    tests.write_text(rule_tests([rule], tmp_path / "rules.yaml"), encoding="utf-8")
    result = run("promtool", "test", "rules", tests)
    assert result.returncode == 1
    assert f"alertname: {c.RULE_ALERTS[rule]}" in result.stdout + result.stderr


def test_every_rule_of_findings_has_one_alert_but_those_for_information() -> None:
    alerts = [rule["alert"] for rule in all_rules()]
    assert {rule: alerts.count(alert) for rule, alert in c.RULE_ALERTS.items()} == {
        rule: int(rule not in c.RULES_WITHOUT_ALERT) for rule in c.RULE_ALERTS
    }


@pytest.mark.parametrize("rule", DETECTED.values(), ids=lambda rule: rule.name)
def test_what_alerts_expect_of_a_rule_is_what_its_detector_gives(rule: Any) -> None:
    assert (rule.severity is Severity.PAGE) == (rule.name in PAGES)
    if rule.severity is Severity.TICKET:
        assert rule.name not in c.RULES_WITHOUT_ALERT
