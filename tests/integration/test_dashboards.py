"""Every query of every dashboard, executed by a real Prometheus that scraped a collector."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from gradwatch import conventions as names
from tests.collector_process import collector, train
from tests.prometheus_servers import Configuration, Prometheus, answers, needs_prometheus, prometheus, wait_for

pytestmark = [pytest.mark.prometheus, needs_prometheus]

FILES = sorted((Path(__file__).parents[2] / "dashboards" / "grafana").glob("*.json"))
DEVICE_SERIES = {m.prometheus_name for m in names.RUN_GAUGES if names.DEVICE in m.attributes}
# What Grafana computes from the scrape interval of 2 s: four of them.
RATE_INTERVAL = "8s"


# Settings of the training processes; the first goes on training while the queries are executed.
RUNS = {
    "r-good": {"GRADWATCH_JOB": "digits", "GRADWATCH_DATASET": "ones", "GRADWATCH_TARGET": "val_loss<=0.5"},
    "r-nan": {"GRADWATCH_JOB": "gpt", "GRADWATCH_TEAM": "language", "FAULT": "nan"},
    "r-bad": {"GRADWATCH_JOB": "gpt", "FAULT": "raise"},
}


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


TRAINING = """
import itertools, os, time
import torch
import gradwatch

fault = os.environ.get("FAULT")
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.watch(model, optimizer)
for step in itertools.count():
    batch = torch.full((8, 4), float("nan") if fault == "nan" and step >= 20 else 1.0)
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    watch.log(val_loss=0.1)
    if fault == "raise" and step == 20:
        raise ValueError("planted")
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dashboards")


@pytest.fixture(scope="module")
def metrics_endpoint(folder: Path) -> Iterator[str]:
    """The host:port of a collector that hears of a healthy run, one that goes NaN and one that fails."""
    script = folder / "train.py"
    script.write_text(TRAINING, encoding="utf-8")
    with collector(f"sqlite:///{folder / 'gradwatch.db'}") as serving, ExitStack() as runs:
        wait_for(lambda: answers(f"{serving.url}/readyz"), what="the collector to be ready")
        protobuf = {"Content-Type": "application/x-protobuf"}
        refused = requests.post(f"{serving.url}/v1/metrics", b"?", headers=protobuf, timeout=10)
        assert refused.status_code == 400
        for run_id, settings in RUNS.items():
            process = runs.enter_context(train(script, serving, GRADWATCH_RUN_ID=run_id, **settings))
            runs.callback(process.terminate)
        yield serving.url.removeprefix("http://")


@pytest.fixture(scope="module")
def server(metrics_endpoint: str, folder: Path) -> Iterator[Prometheus]:
    configuration = Configuration.shipped(folder, collector=metrics_endpoint)
    finding = names.FINDING_ACTIVE.name
    everything_happened = (
        f'{finding}{{run_id="r-nan", rule="{names.RULE_NONFINITE}"}}',
        f'{finding}{{run_id="r-bad", rule="{names.RULE_RUN_FAILED}"}}',
        f'{names.LOSS.prometheus_name}{{run_id="r-good"}}',
        names.TIME_TO_TARGET.name,
        names.SLO_SLI.name,
        # Of the steps of a run that has ended and was summarised.
        names.SLO_BURN_RATE.name,
    )
    with prometheus(configuration, folder) as running:
        for expr in everything_happened:
            running.wait_for_series(expr)
        # A rate needs two scrapes of what came last.
        running.wait_for_series(f"timestamp({names.SLO_SLI.name}) > {time.time() + 4}")
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
