"""Every query of every dashboard, executed by a real Prometheus that scraped a collector."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_servers import (
    Configuration,
    MetricsSource,
    Prometheus,
    metrics_source,
    needs_prometheus,
    prometheus,
    wait_for,
)

from gradwatch import conventions as names

pytestmark = [pytest.mark.prometheus, needs_prometheus]

FILES = sorted((Path(__file__).parents[2] / "dashboards" / "grafana").glob("*.json"))
DEVICE_SERIES = {m.prometheus_name for m in names.RUN_GAUGES if names.DEVICE in m.attributes}
# What Grafana computes from the scrape interval of 2 s: four of them.
RATE_INTERVAL = "8s"


@dataclass(frozen=True, slots=True)
class Case:
    """One query of a panel: instant ones fill stats and tables, ranges fill time lines."""

    panel: str
    expr: str
    instant: bool


def _dashboards() -> list[tuple[str, dict[str, Any]]]:
    return [(path.stem.removeprefix("gradwatch-"), json.loads(path.read_text("utf-8"))) for path in FILES]


CASES = {
    f"{uid}: {panel['title']} {target['refId']}": Case(panel["title"], target["expr"], target["instant"])
    for uid, dashboard in _dashboards()
    for panel in dashboard["panels"]
    for target in panel.get("targets", [])
}
OF_RUNS = {name: case for name, case in CASES.items() if "$run_id" in case.expr}
ANNOTATIONS = [
    pytest.param(annotation["expr"], id=uid)
    for uid, dashboard in _dashboards()
    for annotation in dashboard["annotations"].get("list", [])
]
VARIABLES = [
    pytest.param(variable["query"]["query"], id=f"{uid}: {variable['name']}")
    for uid, dashboard in _dashboards()
    for variable in dashboard["templating"]["list"]
    if variable["type"] == "query"
]

each_query = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def interpolate(expr: str, **chosen: str) -> str:
    """Fill in the variables as Grafana does: everything is selected, unless something is ``chosen``."""
    expr = expr.replace("$__rate_interval", RATE_INTERVAL)
    return re.sub(r"\$(\w+)", lambda variable: chosen.get(variable[1], ".*"), expr)


def _serve_conventions(source: MetricsSource) -> None:
    """One healthy run, one that went NaN and one that failed, as a collector shows them."""
    now = time.time()
    jobs = {
        "r-good": {"training_job": "resnet", "model": "ResNet", "dataset": "cifar", "team": "vision"},
        "r-nan": {"training_job": "gpt", "model": "", "dataset": "", "team": ""},
        "r-bad": {"training_job": "gpt", "model": "", "dataset": "", "team": ""},
    }
    for run_id, job in jobs.items():
        run = {"run_id": run_id, "tier": names.TIER_EXPERIMENT, **job}
        for metric in names.RUN_GAUGES:
            source.set(names.family_of(metric), float("nan") if run_id == "r-nan" else 1.0, **run)
        source.set(names.family_of(names.NONFINITE), 3 if run_id == "r-nan" else 0, **run)
        source.set(names.RUN_STARTED_TIMESTAMP, now - 60, **run)
        source.set(names.RUN_LAST_SEEN_TIMESTAMP, now, **run)
        source.set(names.RUN_MEMORY_HEADROOM, 0.4, **run)
        ended = {"status": "failed", "reason": "ValueError"} if run_id == "r-bad" else {"status": "running"}
        source.set(names.RUN_INFO, 1, host="node-1", **ended, **run)
        job_labels = {label: run[label] for label in names.JOB_LABELS}
        source.set(names.RUNS_LIVE, 1, **job_labels)
        source.set(names.RUNS_ENDED, 2, status="succeeded", **job_labels)
        source.set(names.TIME_TO_TARGET, 40, **job_labels)
        source.set(names.LAST_METRIC, 0.3, name="val_loss", **job_labels)
        source.set(names.FINDINGS_OPENED, 1, rule=names.RULE_NONFINITE, **job_labels)
    finding = {"severity": "ticket", "team": "", "tier": names.TIER_EXPERIMENT, "training_job": "gpt"}
    source.set(names.FINDING_ACTIVE, 1, run_id="r-nan", rule=names.RULE_NONFINITE, **finding)
    source.set(names.FINDING_ACTIVE, 1, run_id="r-bad", rule=names.RULE_RUN_FAILED, **finding)
    objective = {"slo": names.SLO_TRAINING_SUCCESS_RATE, "tier": names.TIER_EXPERIMENT}
    source.set(names.SLO_VERDICT, 1, verdict="met", **objective)
    for family in (names.SLO_SLI, names.SLO_TARGET, names.SLO_BUDGET_REMAINING, names.SLO_P_VALUE):
        source.set(family, 0.9, **objective)
    for quality in ("good", "bad"):
        source.set(names.SLO_EVENTS, 4, quality=quality, **objective)
    for signal in ("metrics", "logs"):
        source.set(names.COLLECTOR_RECEIVED, 10, signal=signal)
        source.set(names.COLLECTOR_COMMITTED, 10, signal=signal)
    source.set(names.COLLECTOR_REJECTED, 0, reason="malformed")
    source.set(names.COLLECTOR_COMMIT_DURATION, 10)
    source.set(names.COLLECTOR_QUEUE_DEPTH, 0)
    source.set(names.COLLECTOR_EVALUATED_TIMESTAMP, now)


@pytest.fixture(scope="module")
def metrics_endpoint() -> Iterator[str]:
    """The host:port of something that shows a collector's /metrics."""
    with metrics_source() as source:
        _serve_conventions(source)
        yield source.address


@pytest.fixture(scope="module")
def server(metrics_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("dashboards")
    configuration = Configuration.shipped(folder, collector=metrics_endpoint)
    with prometheus(configuration, folder) as running:
        scrapes = f"count_over_time({names.COLLECTOR_EVALUATED_TIMESTAMP.name}[{RATE_INTERVAL}])"
        wait_for(lambda: [s for s in running.query(scrapes) if float(s["value"][1]) >= 3], what="three scrapes")
        yield running


def execute(server: Prometheus, case: Case) -> list[dict[str, Any]]:
    expr = interpolate(case.expr)
    if case.instant:
        return server.query(expr)
    now = time.time()
    return server.query_range(expr, start=now - 4, end=now, step=2)


@each_query
def test_every_query_of_every_panel_finds_what_the_collector_shows(server: Prometheus, case: Case) -> None:
    found = execute(server, case)
    if not found:
        wanted = DEVICE_SERIES & set(re.findall(r"\w+", case.expr))
        assert wanted, f"{case.panel!r} is empty"
        assert not any(server.query(name) for name in wanted), (
            f"{case.panel!r} is empty, and its series is there"
        )


@each_query
def test_no_query_shows_which_replica_of_the_collector_answered(server: Prometheus, case: Case) -> None:
    for series in execute(server, case):
        assert not set(names.REPLICA_LABELS) & series["metric"].keys()


@pytest.mark.parametrize("case", OF_RUNS.values(), ids=OF_RUNS.keys())
def test_a_query_about_runs_shows_only_the_run_that_is_chosen(server: Prometheus, case: Case) -> None:
    assert all(
        series["metric"].get("run_id", "r-good") == "r-good"
        for series in server.query(interpolate(case.expr, run_id="r-good"))
    )


@each_query
def test_while_no_collector_is_scraped_nothing_counts_as_zero(server: Prometheus, case: Case) -> None:
    assert server.query(interpolate(case.expr), at=time.time() - 3600) == []


@pytest.mark.parametrize("expr", ANNOTATIONS)
def test_findings_are_found_for_the_time_lines(server: Prometheus, expr: str) -> None:
    assert {s["metric"]["rule"] for s in server.query(interpolate(expr))} >= {names.RULE_NONFINITE}


@pytest.mark.parametrize("query", VARIABLES)
def test_every_filter_offers_the_values_of_its_label(server: Prometheus, query: str) -> None:
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert any(label in labels for labels in server.series_labels(interpolate(selector)))
