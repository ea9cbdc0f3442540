"""`gradwatch alerts export`: files for the servers, or objects for the Prometheus operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result

from gradwatch.cli import main
from tests.unit.alerts.shipped import ALERTMANAGER, ALERTS, RULES, assert_passes, load

# What the operator's custom resource definitions ask for, as far as we use it. Nothing else is allowed: what a
# definition does not know is dropped on the way into the cluster, without a word.
DURATION = {"type": "string", "pattern": r"^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 1}
TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 253}
METADATA = closed(["name"], name=NAME, labels=TEXTS)
RULE = closed(
    ["expr"],
    alert=TEXT,
    expr=TEXT,
    labels=TEXTS,
    annotations=TEXTS,
    keep_firing_for=DURATION,
    **{"for": DURATION},
)
MATCHERS = listed(closed(["name"], name=TEXT, value=TEXT, matchType={"enum": ["=", "!=", "=~", "!~"]}))
ROUTE: dict[str, Any] = closed(
    ["receiver"],
    receiver=TEXT,
    matchers=MATCHERS,
    groupBy=listed(TEXT),
    groupWait=DURATION,
    groupInterval=DURATION,
    repeatInterval=DURATION,
    routes=listed({"$ref": "#/definitions/route"}),
)
WEBHOOK = closed(["url"], url={"type": "string", "pattern": "^https?://.+$"}, sendResolved={"type": "boolean"})
SPECS = {
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        ["groups"], groups=listed(closed(["name"], name={"type": "string", "minLength": 1}, rules=listed(RULE)))
    ),
    ("monitoring.coreos.com/v1alpha1", "AlertmanagerConfig"): closed(
        ["route", "receivers"],
        route=ROUTE,
        inhibitRules=listed(closed([], sourceMatch=MATCHERS, targetMatch=MATCHERS, equal=listed(TEXT))),
        receivers=listed(closed(["name"], name=TEXT, webhookConfigs=listed(WEBHOOK))),
    ),
}


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["alerts", "export", *map(str, arguments)])


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exported") / "new"
    result = export(folder, "--format", "kubernetes")
    assert (result.exit_code, result.output) == (
        0,
        f"prometheus-rule.yaml and alertmanager-config.yaml written to {folder}\n",
    )
    return {content["kind"]: content for content in map(load, sorted(folder.iterdir()))}


@pytest.mark.parametrize(("version", "kind"), SPECS)
def test_objects_are_what_the_operator_takes(
    objects: dict[str, dict[str, Any]], version: str, kind: str
) -> None:
    schema = closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=SPECS[version, kind],
    )
    jsonschema.validate(objects[kind], {**schema, "definitions": {"route": ROUTE}})


def test_a_prometheus_rule_holds_all_the_rules(objects: dict[str, dict[str, Any]]) -> None:
    assert objects["PrometheusRule"]["spec"] == load(RULES)


@pytest.mark.prometheus
def test_prometheus_takes_the_rules_of_the_object(objects: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(objects["PrometheusRule"]["spec"]), encoding="utf-8")
    assert_passes("promtool", "check", "rules", rules)


def test_an_alertmanager_config_has_every_route_inhibition_and_receiver(
    objects: dict[str, dict[str, Any]],
) -> None:
    shipped, spec = load(ALERTMANAGER), objects["AlertmanagerConfig"]["spec"]
    assert [matchers(route["matchers"]) for route in spec["route"]["routes"]] == [
        spaceless(route["matchers"]) for route in shipped["route"]["routes"]
    ]
    assert [
        (matchers(rule["sourceMatch"]), matchers(rule["targetMatch"]), rule.get("equal"))
        for rule in spec["inhibitRules"]
    ] == [
        (spaceless(rule["source_matchers"]), spaceless(rule["target_matchers"]), rule.get("equal"))
        for rule in shipped["inhibit_rules"]
    ]
    assert [receiver["name"] for receiver in spec["receivers"]] == [
        receiver["name"] for receiver in shipped["receivers"]
    ]


def matchers(converted: list[dict[str, str]]) -> list[str]:
    return [f'{each["name"]}{each["matchType"]}"{each["value"]}"' for each in converted]


def spaceless(told: list[str]) -> list[str]:
    return [matcher.replace(" ", "") for matcher in told]


def test_an_alertmanager_config_takes_no_alerts_but_ours(objects: dict[str, dict[str, Any]]) -> None:
    assert matchers(objects["AlertmanagerConfig"]["spec"]["route"]["matchers"]) == ['alertname=~"Gradwatch.+"']
    for rule in objects["AlertmanagerConfig"]["spec"]["inhibitRules"]:
        for side in ("sourceMatch", "targetMatch"):
            assert {"alertname", "run_id"} & {matcher["name"] for matcher in rule[side]}


def test_files_for_the_servers_are_copied_without_what_builds_them(tmp_path: Path) -> None:
    assert export(tmp_path / "copy").output == f"alerts copied to {tmp_path / 'copy'}\n"
    copied = {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    parts = ("*.yaml", "rules/*.yaml", "runbooks/*.md", "templates/*.tmpl")
    assert copied == {path.relative_to(ALERTS) for part in parts for path in ALERTS.glob(part)}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = export(tmp_path / "file" / "folder", "--format", "kubernetes")
    assert result.exit_code == 1
    assert result.output == f"Error: cannot write {tmp_path / 'file' / 'folder'}: Not a directory\n"
