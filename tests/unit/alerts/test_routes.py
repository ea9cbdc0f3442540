"""Who is told of what, and what silences what: the shipped configuration of Alertmanager."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch import conventions as c
from tests.unit.alerts.shipped import ALERT_NAMES, ALERTMANAGER, all_rules, load, run

OUTAGES = {c.RULE_ALERTS[rule] for rule in (c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE)}

CONFIGURATION = load(ALERTMANAGER)
ROUTES: list[dict[str, Any]] = CONFIGURATION["route"]["routes"]

ROUTED = {
    "the dead man's switch": ("watchdog", "alertname=GradwatchWatchdog severity=none owner=ml-sre"),
    "a page of the platform": ("ml-sre-page", "owner=ml-sre severity=page tier=production run_id=r"),
    "a page of a model": ("ml-engineer-page", "owner=ml-engineer severity=page tier=production run_id=r"),
    "a ticket of the platform": ("ml-sre-ticket", "owner=ml-sre severity=ticket tier=production run_id=r"),
    "a ticket of a model": ("ml-engineer-ticket", "owner=ml-engineer severity=ticket tier=experiment run_id=r"),
    "an experiment that claims to page": (
        "ml-sre-ticket",
        "owner=ml-sre severity=page tier=experiment run_id=r",
    ),
    "a model's experiment that claims to page": (
        "ml-engineer-ticket",
        "owner=ml-engineer severity=page tier=experiment run_id=r",
    ),
    "the service's page": (
        "ml-sre-page",
        "alertname=GradwatchCollectorDown owner=ml-sre severity=page tier=production",
    ),
    "an objective's page, which has no owner": ("ml-sre-page", "slo=x severity=page tier=production"),
    "an objective's ticket, which has no owner": ("ml-sre-ticket", "slo=x severity=ticket"),
    **{
        f"{alert} as a {severity} of {tier}": (
            "ml-sre-page" if (severity, tier) == ("page", "production") else "ml-sre-ticket",
            f"alertname={alert} owner=ml-sre severity={severity} tier={tier} run_id=r",
        )
        for alert in sorted(OUTAGES)
        for severity, tier in (("page", "production"), ("ticket", "experiment"), ("page", "experiment"))
    },
}


def routed(configuration: Path, receiver: str, labels: str) -> bool:
    command = ["amtool", "config", "routes", "test", f"--config.file={configuration}"]
    return run(*command, f"--verify.receivers={receiver}", *labels.split()).returncode == 0


@pytest.mark.prometheus
@pytest.mark.parametrize(("receiver", "labels"), ROUTED.values(), ids=ROUTED.keys())
def test_an_alert_goes_to_whom_it_concerns(receiver: str, labels: str) -> None:
    assert routed(ALERTMANAGER, receiver, labels)


@pytest.mark.prometheus
@pytest.mark.parametrize("index", range(len(ROUTES)), ids=lambda index: f"route{index}")
def test_the_cases_above_notice_a_route_that_leads_elsewhere(tmp_path: Path, index: int) -> None:
    broken = load(ALERTMANAGER)
    broken["templates"] = []
    broken["receivers"].append({"name": "elsewhere"})
    broken["route"]["routes"][index]["receiver"] = "elsewhere"
    configuration = tmp_path / "alertmanager.yaml"
    configuration.write_text(yaml.safe_dump(broken), encoding="utf-8")
    assert not all(routed(configuration, *case) for case in ROUTED.values())


def test_every_owner_of_a_rule_has_a_route_for_pages_and_one_for_tickets() -> None:
    receivers = {receiver["name"] for receiver in CONFIGURATION["receivers"]}
    owners = {rule["labels"]["owner"] for rule in all_rules()}
    assert receivers == {f"{owner}-{kind}" for owner in owners for kind in ("page", "ticket")} | {"watchdog"}
    assert {route["receiver"] for route in (CONFIGURATION["route"], *ROUTES)} == receivers


def test_notifications_are_one_for_each_run_and_rule_but_for_outages_of_many_runs() -> None:
    assert CONFIGURATION["route"]["group_by"] == ["alertname", "run_id", "rule"]
    regrouped = [route for route in ROUTES if "group_by" in route]
    assert [route["group_by"] for route in regrouped] == [["alertname"]] * 2
    for route in regrouped:
        assert names_in(route["matchers"]) == OUTAGES


def names_in(matchers: list[str]) -> set[str]:
    """The alerts that matchers name one by one."""
    found = (re.fullmatch(r'alertname\s*(?:=|=~|!~|!=)\s*"(.*)"', matcher) for matcher in matchers)
    return {name for match in found if match for name in match[1].split("|") if name != "Gradwatch.+"}


def test_only_alerts_that_exist_are_named() -> None:
    parts = [*ROUTES, *CONFIGURATION["inhibit_rules"]]
    named = set().union(
        *(
            names_in(part.get(key, []))
            for part in parts
            for key in ("matchers", "source_matchers", "target_matchers")
        )
    )
    assert named
    assert named <= set(ALERT_NAMES)


@pytest.mark.parametrize("inhibit", CONFIGURATION["inhibit_rules"], ids=lambda rule: rule["source_matchers"][0])
def test_a_rule_about_runs_only_inhibits_alerts_about_runs(inhibit: dict[str, Any]) -> None:
    # Labels that are missing on both sides count as equal: without this a crash would silence the service.
    if inhibit.get("equal") == ["run_id"]:
        assert 'run_id != ""' in inhibit["source_matchers"]
        assert 'run_id != ""' in inhibit["target_matchers"]
    elif "equal" in inhibit:
        assert {"alertname", *c.SLO_LABELS} <= set(inhibit["equal"])
    else:
        assert names_in(inhibit["source_matchers"]) <= OUTAGES
        assert 'run_id != ""' in inhibit["target_matchers"]


def test_nothing_that_may_be_a_ticket_silences_what_may_be_a_page() -> None:
    pages = {rule["alert"] for rule in all_rules() if rule["labels"]["slo_severity"] == "page"}
    deaths = {c.RULE_ALERTS[c.RULE_RUN_FAILED], c.RULE_ALERTS[c.RULE_RUN_LOST]}
    for inhibit in CONFIGURATION["inhibit_rules"]:
        source, target = inhibit["source_matchers"], inhibit["target_matchers"]
        # Those of a run's death are as loud as anything that the run can have.
        if names_in(source) <= deaths and names_in(source):
            continue
        if 'severity = "page"' not in source and 'severity = "ticket"' not in target:
            assert not names_in(target) & pages
