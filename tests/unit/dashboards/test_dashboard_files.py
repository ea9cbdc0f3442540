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
import yaml

from gradwatch import conventions as names

DASHBOARDS = Path(__file__).parents[3] / "dashboards"
FILES = sorted((DASHBOARDS / "grafana").glob("*.json"))
FILTERS = ("team", "tier", "training_job", "model", "dataset", "run_id")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

SERIES = {
    f"{family.name}{suffix}": family
    for family in names.FAMILIES
    for suffix in (("_bucket",) if family.kind == "histogram" else ("",))
}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def panels_of(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in load(path)["panels"] if panel["type"] != "row"]


def queries_of(path: Path) -> list[str]:
    exprs = [target["expr"] for panel in panels_of(path) for target in panel["targets"]]
    annotations = [a["expr"] for a in load(path)["annotations"].get("list", [])]
    variables = [v["query"]["query"] for v in load(path)["templating"]["list"] if v["type"] == "query"]
    return exprs + annotations + variables


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


def test_there_is_one_dashboard_each_for_executives_on_call_and_debuggers() -> None:
    assert [path.stem for path in FILES] == ["gradwatch-debug", "gradwatch-executive", "gradwatch-oncall"]


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
    assert "id" not in dashboard
    assert "__inputs" not in dashboard


@each_dashboard
def test_dashboards_lead_to_each_other_and_keep_time_and_filters(path: Path) -> None:
    dashboard = load(path)
    (link,) = dashboard["links"]
    assert (link["type"], link["keepTime"], link["includeVars"]) == ("dashboards", True, True)
    assert set(link["tags"]) <= set(dashboard["tags"])


@each_dashboard
def test_the_filters_are_the_same_everywhere_and_let_empty_labels_through(path: Path) -> None:
    datasource, *filters = load(path)["templating"]["list"]
    assert (datasource["type"], datasource["name"], datasource["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert tuple(f["name"] for f in filters)[: len(FILTERS)] == FILTERS
    for variable in filters:
        assert variable["type"] == "query"
        assert variable["datasource"] == DATASOURCE
        assert (variable["multi"], variable["includeAll"]) == (True, True)
        assert variable["allValue"] == ".*"
        assert variable["refresh"] == 2  # on time range change
        assert variable["current"]["value"] == ["$__all"]


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
    assert defaults["unit"]
    assert defaults["noValue"]
    assert defaults["thresholds"]["steps"][0]["value"] is None


@each_panel
def test_a_panel_asks_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == DATASOURCE
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["instant"] is (panel["type"] != "timeseries")


@each_panel
def test_a_panel_of_device_series_says_that_it_is_for_gpu_runs(panel: dict[str, Any]) -> None:
    device = {m.prometheus_name for m in names.RUN_GAUGES if names.DEVICE in m.attributes}
    shown = {name for target in panel["targets"] for name in re.findall(r"\w+", target["expr"])}
    assert bool(device & shown) == panel["description"].startswith("GPU runs only")


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
            for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", target["expr"]):
                expected = {f'{label}=~"${label}"' for label in FILTERS if label in SERIES[name].labels}
                assert expected <= set(matchers.split(", "))


def test_every_family_that_the_collector_shows_has_a_panel() -> None:
    shown = {name for path in FILES for expr in queries_of(path) for name in re.findall(r"\w+", expr)}
    assert {family.name for name, family in SERIES.items() if name not in shown} == set()


def test_findings_are_marked_on_the_time_lines_of_on_call_and_debug() -> None:
    marked = {path.stem: [a["expr"] for a in load(path)["annotations"].get("list", [])] for path in FILES}
    for uid in ("gradwatch-oncall", "gradwatch-debug"):
        (expr,) = marked[uid]
        assert names.FINDING_ACTIVE.name in expr


def test_provisioning_names_prometheus_and_a_read_only_folder() -> None:
    (source,) = yaml.safe_load(
        (DASHBOARDS / "provisioning" / "datasources" / "gradwatch.yaml").read_text("utf-8")
    )["datasources"]
    scrape = yaml.safe_load((DASHBOARDS.parent / "alerts" / "prometheus.yaml").read_text("utf-8"))["global"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    (provider,) = yaml.safe_load(
        (DASHBOARDS / "provisioning" / "dashboards" / "gradwatch.yaml").read_text("utf-8")
    )["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
