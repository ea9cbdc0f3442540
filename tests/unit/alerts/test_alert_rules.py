"""The shipped rules agree with each other and with the names of the rest."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch import conventions as names
from tests.unit.alerts.shipped import ALERTMANAGER, ALERTS, RULES, all_rules, assert_passes, build, load, run

DASHBOARDS = ALERTS.parent / "dashboards" / "grafana"
RULE_TESTS = sorted((ALERTS / "tests").glob("*.yaml"))

FAMILIES = {
    f"{family.name}{suffix}": family
    for family in names.FAMILIES
    for suffix in (("_bucket",) if family.kind == "histogram" else ("",))
}


def test_the_committed_rules_are_what_the_code_builds() -> None:
    assert_passes(sys.executable, ALERTS / "build.py", "--check")


def test_a_rule_file_that_differs_from_what_the_code_builds_is_reported(tmp_path: Path) -> None:
    edited = tmp_path / "rules.yaml"
    edited.write_text(RULES.read_text(encoding="utf-8") + "# edited by hand\n", encoding="utf-8")
    result = build("--check", "--output", edited)
    assert result.returncode == 1
    assert result.stderr == f"{edited} is out of date: run python alerts/build.py\n"


def test_links_lead_to_the_addresses_that_are_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "rules.yaml"
    build("--runbook-url", "https://wiki/books/", "--grafana-url", "https://grafana/", "--output", output)
    for group in load(output)["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook_url"] == f"https://wiki/books/{rule['alert']}.md"
            assert rule["annotations"]["dashboard_url"].startswith("https://grafana/d/gradwatch-")


@pytest.mark.prometheus
def test_promtool_and_amtool_accept_what_is_shipped() -> None:
    assert_passes("promtool", "check", "rules", RULES)
    assert_passes("promtool", "check", "config", ALERTS / "prometheus.yaml")
    assert_passes("amtool", "check-config", ALERTMANAGER)


@pytest.mark.prometheus
def test_every_rule_fires_stays_quiet_and_resolves_as_its_tests_say() -> None:
    assert_passes("promtool", "test", "rules", *RULE_TESTS)


ALWAYS, NEVER = "vector(2)", "vector(1) > 1"
BREAKAGES = [
    pytest.param(index, expr, id=f"{rule['alert']}-{index}-{'always' if expr == ALWAYS else 'never'}")
    for index, rule in enumerate(all_rules())
    for expr in (ALWAYS, NEVER)
    # Those of findings are broken in test_finding_alerts.py.
    if rule["alert"] not in names.RULE_ALERTS.values()
    and (rule["alert"], expr) != ("GradwatchWatchdog", ALWAYS)
]


@pytest.mark.prometheus
@pytest.mark.parametrize(("index", "expr"), BREAKAGES)
def test_the_rule_tests_notice_a_rule_that_is_broken(tmp_path: Path, index: int, expr: str) -> None:
    broken = load(RULES)
    rule = [rule for group in broken["groups"] for rule in group["rules"]][index]
    rule["expr"] = expr
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / RULES.name).write_text(yaml.safe_dump(broken), encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (about,) = [path for path in RULE_TESTS if rule["alert"] in path.read_text(encoding="utf-8")]
    result = run("promtool", "test", "rules", shutil.copy(about, tmp_path / "tests"))
    assert result.returncode == 1
    assert f"alertname: {rule['alert']}" in result.stdout + result.stderr


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule["alert"])
def test_rules_use_only_series_and_labels_that_the_collector_shows(rule: dict[str, Any]) -> None:
    for family, matchers in re.findall(
        r"\b((?:gradwatch|training|hw|process)_\w+)\b(?:\{([^}]*)\})?", rule["expr"]
    ):
        assert family in FAMILIES
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert used <= set(FAMILIES[family].labels)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule["alert"])
def test_every_rule_says_what_to_read_and_where_to_look(rule: dict[str, Any]) -> None:
    annotations = rule["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url", "dashboard_url"}
    assert annotations["runbook_url"] == names.runbook_url(rule["alert"])
    uid = re.fullmatch(r"https?://[^/]+/d/([a-z-]+)(\?.*)?", annotations["dashboard_url"])
    assert uid is not None
    assert (DASHBOARDS / f"{uid[1]}.json").is_file()


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule["alert"])
def test_no_rule_labels_its_alert_with_the_names_of_a_scrape(rule: dict[str, Any]) -> None:
    assert not {"job", "instance", "pod"} & rule.get("labels", {}).keys()
    assert "{{ $labels.instance" not in str(rule)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule["alert"])
def test_a_rule_that_pages_by_itself_is_about_production(rule: dict[str, Any]) -> None:
    labels = rule.get("labels", {})
    if labels.get("severity") == "page":
        assert labels["tier"] == names.TIER_PRODUCTION


def test_the_page_about_alerts_lists_all_of_them_with_what_they_ask_for_and_whose_they_are() -> None:
    page = (ALERTS.parent / "docs" / "alerts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (page|ticket|none) \| `([a-z-]+)` \| (.*) \|$", page, re.MULTILINE)
    listed = {
        name: (asks, owner) for asks, owner, told in rows for name in re.findall(r"`(Gradwatch\w+)`", told)
    }
    assert listed == {
        rule["alert"]: (rule["labels"]["slo_severity"], rule["labels"]["owner"]) for rule in all_rules()
    }
