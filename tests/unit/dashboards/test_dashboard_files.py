"""The committed dashboards keep the rules that hold for every gradwatch dashboard."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as names

REPOSITORY = Path(__file__).parents[3]
DASHBOARDS = REPOSITORY / "dashboards"
RUNBOOKS = REPOSITORY / "alerts" / "runbooks"
FILES = sorted((DASHBOARDS / "grafana").glob("*.json"))
FILTERS = ("team", "tier", "training_job", "model", "dataset", "run_id")
PROMETHEUS = {"type": "prometheus", "uid": "${prometheus_datasource}"}
POSTGRES = {"type": "postgres", "uid": "${postgres_datasource}"}
OF_RUN = "gradwatch-run"

SERIES = {
    f"{family.name}{suffix}": family
    for family in names.FAMILIES
    for suffix in (("_bucket",) if family.kind == "histogram" else ("",))
}
# What dashboard-linter takes for a unit, as far as anything here has one of them.
UNITS = {"none", "string", "short", "percentunit", "sci", "bytes", "s", "cps", "dateTimeFromNow"}
# What `requirements` ask of each, by the titles of panels.
WANTED = {
    "gradwatch-executive": {
        "Training success rate", "Cost per epoch", "Model validation metric", "Active experiments",
        "Error budget left",
    },
    "gradwatch-oncall": {
        "Failing jobs", "Non-finite steps", "Memory headroom", "Collective latency", "Recent checkpoints",
        "Open findings",
    },
    "gradwatch-debug": {
        "Gradient norms by layer", "Loss", "Learning rate", "Non-finite batches", "GPU utilization",
        "Network latency",
    },
    "gradwatch-run": {
        "Status", "Loss", "Learning rate", "Gradient norms by layer", "Step time by phase", "Memory headroom",
        "Findings", "Recent checkpoints",
    },
}  # fmt: skip


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def panels_of(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in load(path)["panels"] if panel["type"] != "row"]


def variables_of(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {v["name"]: v for v in load(path)["templating"]["list"] if v["type"] == kind}


def queries_of(path: Path) -> list[str]:
    """What is asked of Prometheus."""
    exprs = [target["expr"] for panel in panels_of(path) for target in panel["targets"] if "expr" in target]
    annotations = [a["expr"] for a in load(path)["annotations"].get("list", []) if "expr" in a]
    filters = variables_of(path, "query").values()
    return exprs + annotations + [v["query"]["query"] for v in filters if v["datasource"] == PROMETHEUS]


def urls_in(told: Any) -> list[str]:
    """Every address that anything leads to."""
    if isinstance(told, dict):
        here = [told["url"]] if isinstance(told.get("url"), str) and told["url"] else []
        return here + [url for each in told.values() for url in urls_in(each)]
    return [url for each in told for url in urls_in(each)] if isinstance(told, list) else []


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DASHBOARDS / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


each_dashboard = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
each_panel = pytest.mark.parametrize(
    "panel",
    [
        pytest.param(panel, id=f"{path.stem.removeprefix('gradwatch-')}: {panel['title']}")
        for path in FILES
        for panel in panels_of(path)
    ],
)


def test_the_committed_dashboards_are_what_the_code_builds() -> None:
    result = build("--check")
    assert result.returncode == 0, result.stderr


def test_a_dashboard_that_differs_from_what_the_code_builds_is_reported(tmp_path: Path) -> None:
    assert build("--output", tmp_path).returncode == 0
    edited = tmp_path / FILES[0].name
    edited.write_text(edited.read_text(encoding="utf-8").replace('"title"', '"titel"'), encoding="utf-8")
    result = build("--check", "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"{edited} is out of date: run python dashboards/build.py\n"


def test_there_is_one_dashboard_each_for_executives_on_call_debuggers_and_a_run_with_what_they_ask_for() -> (
    None
):
    assert {path.stem for path in FILES} == WANTED.keys()
    for path in FILES:
        assert WANTED[path.stem] <= {panel["title"] for panel in panels_of(path)}


# Version 1 is the model that files can provision into every Grafana in use.
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
@each_dashboard
def test_a_dashboard_fits_grafana_s_own_model(path: Path) -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    text = path.read_text(encoding="utf-8")
    assert JSONEncoder(sort_keys=True, indent=2).encode(Dashboard.from_json(json.loads(text))) + "\n" == text


@each_dashboard
def test_a_dashboard_has_a_fixed_address_and_cannot_be_edited_in_place(path: Path) -> None:
    dashboard = load(path)
    assert dashboard["uid"] == path.stem
    assert dashboard["editable"] is False
    assert dashboard["title"].startswith("gradwatch / ")
    assert dashboard["description"]
    assert dashboard["refresh"]
    assert dashboard["time"]["to"] == "now"
    assert "id" not in dashboard
    assert "__inputs" not in dashboard


# --- Variables -----------------------------------------------------------------------------------------


@each_dashboard
def test_the_data_sources_can_be_chosen_and_have_the_names_that_dashboard_linter_wants(path: Path) -> None:
    found = {name: (v["query"], v["label"]) for name, v in variables_of(path, "datasource").items()}
    assert found == {
        "prometheus_datasource": ("prometheus", "Prometheus data source"),
        "postgres_datasource": ("postgres", "Postgres data source"),
    }


@each_dashboard
def test_the_filters_are_the_same_everywhere_and_let_empty_labels_through(path: Path) -> None:
    filters = variables_of(path, "query")
    assert tuple(filters)[: len(FILTERS)] == FILTERS
    for variable in filters.values():
        assert variable["datasource"] == (POSTGRES if path.stem == OF_RUN else PROMETHEUS)
        assert (variable["multi"], variable["includeAll"]) == (True, True)
        assert variable["allValue"] == ".*"
        assert variable["refresh"] == 2  # on time range change
        assert variable["current"]["value"] == ["$__all"]


@each_dashboard
def test_each_filter_is_narrowed_by_all_wider_ones(path: Path) -> None:
    for index, (label, variable) in enumerate(list(variables_of(path, "query").items())[: len(FILTERS)]):
        asked = set(re.findall(r"\$\{?(\w+)", variable["definition"]))
        assert asked == set(FILTERS[:index]), label


@each_dashboard
def test_every_variable_is_there_for_something_and_none_is_missing(path: Path) -> None:
    dashboard = load(path)
    text = json.dumps({**dashboard, "templating": {}}) + json.dumps([*variables_of(path, "query").values()])
    used = {name for name in re.findall(r"\$\{?([a-z]\w*)", text) if not name.startswith("__")}
    there = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert used - there == set()
    assert there - used == set()


@each_dashboard
def test_links_lead_to_addresses_that_nobody_can_put_into_a_link(path: Path) -> None:
    found = variables_of(path, "constant")
    assert all(variable["skipUrlSync"] for variable in found.values())
    constants = {name: variable["query"] for name, variable in found.items()}
    assert constants == {"collector": "http://127.0.0.1:4318", "runbooks": names.RUNBOOK_BASE_URL}


# --- Links ---------------------------------------------------------------------------------------------


@each_dashboard
def test_dashboards_lead_to_each_other_and_keep_time_and_filters(path: Path) -> None:
    dashboard = load(path)
    (link,) = dashboard["links"]
    assert (link["type"], link["keepTime"], link["includeVars"]) == ("dashboards", True, True)
    assert set(link["tags"]) <= set(dashboard["tags"])


@each_dashboard
def test_every_link_leads_to_a_dashboard_a_run_or_a_runbook_that_there_is(path: Path) -> None:
    run = r"\$\{__(?:value\.raw|field\.labels\.run_id):percentencode\}"
    kept = re.escape(
        "&${__url_time_range}&${prometheus_datasource:queryparam}&${postgres_datasource:queryparam}"
    )
    for url in urls_in(load(path)):
        if found := re.fullmatch(rf"/d/([a-z-]+)\?var-run_id={run}{kept}", url):
            assert found[1] in WANTED
        elif found := re.fullmatch(r"\$\{runbooks:raw\}/(.+)\.md", url):
            assert found[1] == "${__value.text}" or (RUNBOOKS / f"{found[1]}.md").is_file()
        else:
            assert re.fullmatch(rf"\$\{{collector:raw\}}/runs/{run}", url), url


def override(panel: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        each["id"]: each["value"]
        for found in panel["fieldConfig"]["overrides"]
        if found["matcher"]["options"] == name
        for each in found["properties"]
    }


@each_panel
def test_whatever_is_about_a_run_leads_to_it_and_whatever_is_about_a_rule_to_its_runbook(
    panel: dict[str, Any],
) -> None:
    if panel["type"] == "table":
        assert {link["title"] for link in override(panel, "run_id")["links"]} == {
            "This run", "Debug this run", "Run page of the collector",
        }  # fmt: skip
        rule = override(panel, "rule")
        (mapping,) = rule["mappings"]
        assert {name: told["text"] for name, told in mapping["options"].items()} == names.RULE_ALERTS
        assert [link["title"] for link in rule["links"]] == ["Runbook"]
        for alert in names.RULE_ALERTS.values():
            assert (RUNBOOKS / f"{alert}.md").is_file()
    elif panel["type"] == "timeseries":
        legends = [target.get("legendFormat", "") for target in panel["targets"]]
        by_run = any(
            "run_id" in each for each in [*legends, panel["fieldConfig"]["defaults"].get("displayName", "")]
        )
        assert ("links" in override(panel, "number")) is by_run


# --- Panels --------------------------------------------------------------------------------------------


@each_dashboard
def test_panels_have_numbers_of_their_own_and_do_not_overlap(path: Path) -> None:
    panels = load(path)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


@each_panel
def test_a_panel_says_what_it_shows_in_which_unit_and_what_no_data_means(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert defaults["unit"] in UNITS
    assert defaults["noValue"]
    assert defaults["thresholds"]["steps"][0]["value"] is None
    for found in panel["fieldConfig"]["overrides"]:
        assert {each["value"] for each in found["properties"] if each["id"] == "unit"} <= UNITS


@pytest.mark.parametrize("uid", ["gradwatch-debug", "gradwatch-run"])
def test_a_heat_map_shows_negative_decades_and_turns_rows_into_layers_over_steps(uid: str) -> None:
    (panel,) = (p for p in panels_of(DASHBOARDS / "grafana" / f"{uid}.json") if p["type"] == "heatmap")
    assert panel["options"]["calculate"] is False
    assert panel["options"]["filterValues"]["le"] < -12  # as cold as a cell gets
    matrix, converted = panel["transformations"]
    row, column, value = (matrix["options"][f"{field}Field"] for field in ("row", "column", "value"))
    assert re.search(rf"AS {row}, name AS {column}, max\(norm\) AS {value}\n", panel["targets"][0]["rawSql"])
    assert matrix["options"]["emptyValue"] == "null"
    assert converted["options"]["conversions"] == [
        {"targetField": f"{row}\\{column}", "destinationType": "number"}
    ]


@each_panel
def test_a_panel_asks_one_of_the_chosen_data_sources(panel: dict[str, Any]) -> None:
    source = panel["datasource"]
    assert source in (PROMETHEUS, POSTGRES)
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == source
        if source == PROMETHEUS:
            assert target["instant"] is (panel["type"] != "timeseries")
        else:
            assert target["format"] == ("time_series" if panel["type"] == "timeseries" else "table")
            assert (target["rawQuery"], target["editorMode"]) == (True, "code")
            assert "PostgreSQL" in panel["fieldConfig"]["defaults"]["noValue"] or panel["type"] in (
                "stat",
                "table",
            )


@each_panel
def test_a_panel_of_device_series_says_that_it_is_for_gpu_runs(panel: dict[str, Any]) -> None:
    device = {m.prometheus_name for m in names.RUN_GAUGES if names.DEVICE in m.attributes}
    stored = {m.name for m in names.RUN_GAUGES if names.DEVICE in m.attributes}
    shown = {
        name
        for target in panel["targets"]
        for name in re.findall(r"[\w.]+", target.get("expr") or target["rawSql"])
    }
    assert bool((device | stored) & shown) == panel["description"].startswith("GPU runs only")


@each_panel
def test_names_of_senders_reach_sql_only_where_they_cannot_end_what_they_are_in(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        sql = target.get("rawSql", "")
        for found in re.finditer(r"\$\{?([a-z]\w*)", sql):
            if not found[1].startswith("__"):
                before, after = sql[: found.start()], sql[found.start() :]
                between_dollars = before.endswith(r"$$\A(") and re.match(r"\$\{\w+:regex\}\)\\Z\$\$", after)
                assert between_dollars or re.match(r"\$\{\w+:sqlstring\}", after), after[:40]


# --- PromQL --------------------------------------------------------------------------------------------


@each_dashboard
def test_queries_use_only_series_and_labels_that_the_collector_shows(path: Path) -> None:
    for expr in queries_of(path):
        found = re.findall(r"\b((?:gradwatch|training|hw|process)_\w+)(?:\{([^}]*)\}|\[|\)|$| )", expr)
        series = [(name, matchers) for name, matchers in found if name not in FILTERS]
        assert series, expr
        for name, matchers in series:
            assert name in SERIES, expr
            assert set(re.findall(r"(\w+)(?:=~|!=|!~|=)", matchers)) <= set(SERIES[name].labels), expr


@each_dashboard
def test_counters_are_only_seen_as_rates_over_grafana_s_interval(path: Path) -> None:
    for expr in queries_of(path):
        ranges = re.findall(r"\[([^\]]+)\]", expr)
        assert set(ranges) <= {"$__rate_interval"}, expr
        for name, family in SERIES.items():
            uses = len(re.findall(rf"\b{name}\b", expr))
            if family.kind != "gauge":
                rated = rf"(?:rate|increase)\({name}(?:\{{[^}}]*\}})?\[\$__rate_interval\]\)"
                assert len(re.findall(rated, expr)) == uses, expr


@each_dashboard
def test_panels_about_runs_and_jobs_obey_every_filter_their_series_have(path: Path) -> None:
    for panel in panels_of(path):
        for target in panel["targets"]:
            for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", target.get("expr", "")):
                expected = {f'{label}=~"${label}"' for label in FILTERS if label in SERIES[name].labels}
                assert expected <= set(matchers.split(", "))


@each_dashboard
def test_panels_of_stored_runs_obey_every_filter(path: Path) -> None:
    for panel in panels_of(path):
        for target in panel["targets"]:
            if "rawSql" in target:
                assert set(FILTERS) <= set(re.findall(r"\$\{(\w+):regex\}", target["rawSql"]))


def test_every_family_that_the_collector_shows_has_a_panel() -> None:
    shown = {name for path in FILES for expr in queries_of(path) for name in re.findall(r"\w+", expr)}
    assert {family.name for name, family in SERIES.items() if name not in shown} == set()


@pytest.mark.parametrize("uid", ["gradwatch-oncall", "gradwatch-debug", "gradwatch-run"])
def test_findings_and_checkpoints_are_marked_on_the_time_lines(uid: str) -> None:
    marks = load(DASHBOARDS / "grafana" / f"{uid}.json")["annotations"]["list"]
    assert [mark["name"] for mark in marks] == ["Findings", "Checkpoints"]
    assert all(mark["enable"] for mark in marks)
