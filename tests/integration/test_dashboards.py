"""Every query of every dashboard, executed by a real Prometheus and a real PostgreSQL that real runs filled."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import Connection, create_engine, make_url, text

from gradwatch import conventions as names
from tests.collector_process import Collector, collector, free_port, train
from tests.fuzzing.samples import events_request
from tests.grafana import View
from tests.otlp_clients import ProtobufClient, gauge, metrics_request
from tests.postgresql import tool
from tests.prometheus_servers import Configuration, Prometheus, answers, needs_prometheus, prometheus, wait_for

pytestmark = [pytest.mark.postgresql, pytest.mark.prometheus, needs_prometheus]

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
FILES = sorted((DASHBOARDS / "grafana").glob("*.json"))

# Settings of the training processes. The first goes on training while the queries are executed; the second has
# two ranks, and ends well.
RUNS: dict[str, dict[str, str]] = {
    "r-good": {"GRADWATCH_JOB": "digits", "GRADWATCH_DATASET": "ones", "GRADWATCH_TARGET": "val_loss<=0.5"},
    "r-done": {
        "GRADWATCH_JOB": "digits",
        "GRADWATCH_EVERY": "1",
        "GRADWATCH_COLLECTIVES": "true",
        "STEPS": "200",
        "WORLD_SIZE": "2",
    },
    "r-nan": {
        "GRADWATCH_JOB": "gpt",
        "GRADWATCH_TEAM": "o'neill $$ (language)",
        "FAULT": "nan",
        "GRADWATCH_EVERY": "1",
    },
    "r-bad": {"GRADWATCH_JOB": "gpt", "FAULT": "raise"},
    # Over before it is scraped twice.
    "r-brief": {"GRADWATCH_JOB": "gpt", "FAULT": "nan", "GRADWATCH_EVERY": "1", "STEPS": "30"},
}
# Losses of these are NaN, and shown as such.
WENT_BAD = {"r-nan", "r-brief"}
# No process here has a GPU: what one sends is sent for it.
GPU_RUN = "r-gpu"
RUN_IDS = (*RUNS, GPU_RUN)
# Columns of tables that nothing here fills.
SELDOM_KNOWN = {
    "acknowledged_by", "cause_rank", "commit", "error", "gpu_utilization", "quality", "quality_delta", "rank",
    "skipped_steps",
}  # fmt: skip
LAYERS = ["0.weight", "0.bias", "2.weight", "2.bias"]

TRAINING = """
import itertools, os, time
import torch
import torch.distributed as dist
import gradwatch

fault, steps = os.environ.get("FAULT"), int(os.environ.get("STEPS", 0))
model = watched = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.watch(model, optimizer)
data = torch.utils.data.DataLoader(torch.ones(400_000, 4), batch_size=8)
for step, batch in enumerate(data):
    if fault == "nan" and step == 20:
        model[2].weight.register_hook(lambda gradient: gradient * float("nan"))
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    if watched is not model:
        dist.all_reduce(loss.detach())
    watch.log(val_loss=0.1)
    if step == 20 and watched is model:
        watch.save_checkpoint(model.state_dict(), os.environ["CHECKPOINTS"] + "/last.pt")
    if fault == "raise" and step == 40:
        raise ValueError("planted")
    if step == steps - 1:
        break
    time.sleep(0.01)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One query of a panel: instant ones fill stats and tables, ranges fill time lines."""

    panel: str
    query: str
    instant: bool


def _dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in FILES:
        yield path.stem.removeprefix("gradwatch-"), json.loads(path.read_text("utf-8"))


def _panels(key: str) -> dict[str, Case]:
    return {
        f"{uid}: {panel['title']} {target['refId']}": Case(
            panel["title"], target[key], panel["type"] != "timeseries"
        )
        for uid, dashboard in _dashboards()
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        if key in target
    }


def _annotations(in_sql: bool) -> list[Any]:
    return [
        pytest.param(
            annotation["target"]["rawSql"] if in_sql else annotation["expr"], id=f"{uid}: {annotation['name']}"
        )
        for uid, dashboard in _dashboards()
        for annotation in dashboard["annotations"].get("list", [])
        if ("target" in annotation) is in_sql
    ]


def _variables(in_sql: bool) -> list[Any]:
    return [
        pytest.param(
            variable["query"] if in_sql else variable["query"]["query"],
            variable["name"],
            id=f"{uid}: {variable['name']}",
        )
        for uid, dashboard in _dashboards()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query" and isinstance(variable["query"], str) is in_sql
    ]


PROMQL, SQL = _panels("expr"), _panels("rawSql")
OF_RUNS = {name: case for name, case in PROMQL.items() if "$run_id" in case.query}

each_promql = pytest.mark.parametrize("case", PROMQL.values(), ids=PROMQL.keys())
each_sql = pytest.mark.parametrize("case", SQL.values(), ids=SQL.keys())


# --- What there is to be seen -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dashboards")


@pytest.fixture(scope="module")
def database_of_runs(new_postgresql: Callable[[str | None], str], template: Callable[[str], str]) -> str:
    return new_postgresql(template("postgresql"))


def tell_of_a_gpu(url: str) -> None:
    resource = {names.SERVICE_NAME: "big", names.RUN_ID: GPU_RUN, names.RANK: 0, names.MODEL: "moe"}
    device = {names.DEVICE: "cuda:0"}
    now = time.time_ns()
    values = {
        names.DEVICE_MEMORY_ALLOCATED: 40e9,
        names.DEVICE_MEMORY_PEAK: 60e9,
        names.DEVICE_MEMORY_LIMIT: 80e9,
        names.DEVICE_MEMORY_HEADROOM: 0.25,
        names.HW_GPU_UTILIZATION: 0.9,
    }
    with ProtobufClient(url, "") as client:
        assert client.send(events_request(resource, [names.RUN_STARTED], now)).code == 0
        for metric, value in values.items():
            assert client.send(metrics_request(resource, gauge(metric.name, (now, value), **device))).code == 0


@pytest.fixture(scope="module")
def serving(database_of_runs: str, folder: Path) -> Iterator[Collector]:
    """A collector that hears of healthy runs, of one that goes NaN and of one that fails."""
    script, prices = folder / "train.py", folder / "prices.yaml"
    script.write_text(TRAINING, encoding="utf-8")
    prices.write_text("currency: EUR\ncpuHost: 0.38\n", encoding="utf-8")
    with collector(database_of_runs, "--prices", str(prices)) as serving, ExitStack() as running:
        wait_for(lambda: answers(f"{serving.url}/readyz"), what="the collector to be ready")
        protobuf = {"Content-Type": "application/x-protobuf"}
        refused = requests.post(f"{serving.url}/v1/metrics", b"?", headers=protobuf, timeout=10)
        assert refused.status_code == 400
        tell_of_a_gpu(serving.url)
        for run_id, settings in RUNS.items():
            port = str(free_port())
            for rank in range(int(settings.get("WORLD_SIZE", 1))):
                ranked = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                process = running.enter_context(
                    train(
                        script,
                        serving,
                        GRADWATCH_RUN_ID=run_id,
                        CHECKPOINTS=str(folder),
                        **settings,
                        **(ranked if "WORLD_SIZE" in settings else {}),
                    )
                )
                running.callback(process.terminate)
        yield serving


@pytest.fixture(scope="module")
def server(serving: Collector, folder: Path) -> Iterator[Prometheus]:
    configuration = Configuration.shipped(folder, collector=serving.url.removeprefix("http://"))
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


def went_bad(run: dict[str, Any]) -> bool:
    told = [event for event in run["events"] if event["name"] == names.NONFINITE_STEP.name]
    return len(told) >= 10 and names.RULE_NONFINITE in {finding["rule"] for finding in run["findings"]}


@pytest.fixture(scope="module")
def stored(serving: Collector, database_of_runs: str) -> Iterator[Connection]:
    """The database as Grafana's role sees it, once everything happened."""
    url = make_url(database_of_runs)
    libpq = url.set(drivername="postgresql").render_as_string(hide_password=False)
    for _ in range(2):  # it may be run again
        granted = subprocess.run(
            [
                tool("psql"),
                "--set=password=it's",
                "--set=ON_ERROR_STOP=1",
                f"--file={DASHBOARDS / 'reader.sql'}",
                libpq,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert granted.returncode == 0, granted.stderr
    serving.await_status("r-done", "succeeded")
    serving.await_status("r-bad", "failed")
    serving.await_status("r-brief", "succeeded")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        summarised = text("SELECT count(*) FROM run_summary WHERE step_cost IS NOT NULL")
        wait_for(lambda: connection.scalar(summarised) == 3, seconds=60, what="summaries of what ended")
        wait_for(lambda: went_bad(serving.show("r-nan")), seconds=60, what="ten bad batches and their finding")
        connection.execute(text("SET ROLE grafana"))
        yield connection
    engine.dispose()


def of_now(**chosen: str) -> View:
    now = time.time()
    return View(now - 300, now, chosen={"epoch_steps": "1000", **chosen})


# --- Prometheus -------------------------------------------------------------------------------------------


def execute(server: Prometheus, case: Case, **chosen: str) -> list[dict[str, Any]]:
    expr = of_now(**chosen).promql(case.query)
    if case.instant:
        return server.query(expr)
    now = time.time()
    return server.query_range(expr, start=now - 4, end=now, step=2)


def numbers_of(series: dict[str, Any]) -> list[float]:
    return [float(value) for _, value in series.get("values", [series.get("value")])]


@each_promql
def test_every_query_of_prometheus_finds_what_the_collector_shows(server: Prometheus, case: Case) -> None:
    found = execute(server, case)
    assert found, f"{case.panel!r} is empty"
    healthy = [series for series in found if series["metric"].get("run_id") not in WENT_BAD]
    assert all(math.isfinite(number) for series in healthy for number in numbers_of(series))


@each_promql
def test_no_query_shows_which_replica_of_the_collector_answered(server: Prometheus, case: Case) -> None:
    for series in execute(server, case):
        assert not set(names.REPLICA_LABELS) & series["metric"].keys()


@pytest.mark.parametrize("case", OF_RUNS.values(), ids=OF_RUNS.keys())
def test_a_query_about_runs_shows_only_the_run_that_is_chosen(server: Prometheus, case: Case) -> None:
    assert all(
        series["metric"].get("run_id", "r-good") == "r-good"
        for series in server.query(of_now(run_id="r-good").promql(case.query))
    )


@each_promql
def test_while_no_collector_is_scraped_nothing_counts_as_zero(server: Prometheus, case: Case) -> None:
    assert server.query(of_now().promql(case.query), at=time.time() - 3600) == []


@pytest.mark.parametrize("expr", _annotations(in_sql=False))
def test_open_findings_are_found_for_the_time_lines(server: Prometheus, expr: str) -> None:
    found = server.query(of_now().promql(expr))
    assert {series["metric"]["rule"] for series in found} >= {names.RULE_NONFINITE}


@pytest.mark.parametrize(("query", "label"), _variables(in_sql=False))
def test_every_filter_offers_the_values_of_its_label(server: Prometheus, query: str, label: str) -> None:
    selector, of = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert of == label or label == "metric"
    assert any(of in labels for labels in server.series_labels(of_now().promql(selector)))


# --- PostgreSQL -------------------------------------------------------------------------------------------


def rows(stored: Connection, query: str, **chosen: str) -> list[dict[str, Any]]:
    found = stored.execute(text(of_now(**chosen).sql(query).replace(":", r"\:")))
    return [dict(row) for row in found.mappings()]


@each_sql
def test_every_query_of_postgresql_finds_what_is_stored_of_the_run_that_is_chosen(
    stored: Connection, case: Case
) -> None:
    found = {run_id: rows(stored, case.query, run_id=run_id) for run_id in RUN_IDS}
    assert any(found.values()), f"{case.panel!r} is empty"
    for run_id, told in found.items():
        for row in told:
            assert row.get("run_id", run_id) == run_id
            if not case.instant:
                assert {"time", "value"} <= row.keys()
            if run_id not in WENT_BAD:
                assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    columns = next(iter(told for told in found.values() if told))[0].keys()
    for column in columns - SELDOM_KNOWN:
        values = [row[column] for told in found.values() for row in told]
        assert any(value is not None for value in values), f"{column} of {case.panel!r} is always unknown"


@each_sql
def test_with_every_filter_at_all_a_query_of_postgresql_is_one_that_it_takes(
    stored: Connection, case: Case
) -> None:
    rows(stored, case.query)


@each_sql
def test_a_query_of_postgresql_shows_nothing_of_other_teams(stored: Connection, case: Case) -> None:
    team = RUNS["r-nan"]["GRADWATCH_TEAM"]
    assert {row.get("run_id", "r-nan") for row in rows(stored, case.query, team=team)} <= {"r-nan"}
    told = rows(stored, case.query, team="'); DROP TABLE run; --")
    assert not told or told == [{"open": 0}]


@pytest.mark.parametrize("uid", ["debug", "run"])
def test_the_heat_map_has_every_layer_in_every_column_of_steps_as_wide_as_the_next(
    stored: Connection, uid: str
) -> None:
    found = rows(stored, SQL[f"{uid}: Gradient norms by layer A"].query, run_id="r-done")
    steps = sorted({row["step"] for row in found})
    assert len(steps) > 1
    assert len({after - before for before, after in pairwise(steps)}) == 1
    assert steps[-1] < int(RUNS["r-done"]["STEPS"])
    for step in steps:
        assert [row["layer"] for row in found if row["step"] == step] == LAYERS
    known = [row["norm"] for row in found if row["norm"] is not None]
    assert len(known) > len(found) / 2
    assert all(-12 <= norm < 3 for norm in known)


def test_the_log_of_bad_batches_names_step_layer_and_birthplace(stored: Connection) -> None:
    found = rows(stored, SQL["debug: Non-finite batches A"].query, run_id="r-nan")
    assert [row["step"] for row in found[-10:]] == [str(step) for step in range(29, 19, -1)]
    assert (found[-1]["layer"], found[-1]["born_in"]) == ("2.weight", "backward")


@pytest.mark.parametrize("uid", ["oncall", "debug"])
def test_a_run_that_was_over_before_it_was_scraped_is_in_the_log_of_bad_batches(
    stored: Connection, uid: str
) -> None:
    of_all = rows(stored, SQL[f"{uid}: Non-finite batches A"].query, training_job="gpt")
    told = [row["step"] for row in of_all if row["run_id"] == "r-brief"]
    assert told == [str(step) for step in range(29, 19, -1)]


def test_collectives_are_told_apart_by_rank_and_kind(stored: Connection) -> None:
    found = rows(stored, SQL["debug: Network latency A"].query, run_id="r-done")
    assert {row["rank"] for row in found} == {"0", "1"}
    assert "all_reduce" in {row["operation"] for row in found}


def test_of_several_runs_that_are_let_through_the_newest_is_shown(stored: Connection) -> None:
    (shown,) = rows(stored, SQL["run: Run A"].query, training_job="gpt")
    started = {
        run["run_id"]: run["started"] for run in rows(stored, SQL["run: Runs of this selection A"].query)
    }
    assert shown["run_id"] == max(("r-nan", "r-bad", "r-brief"), key=lambda run_id: started[run_id])


@pytest.mark.parametrize("query", _annotations(in_sql=True))
def test_an_annotation_has_what_grafana_looks_for(stored: Connection, query: str) -> None:
    found = [row for run_id in RUN_IDS for row in rows(stored, query, run_id=run_id)]
    assert found
    for row in found:
        assert {"time", "text", "tags"} <= row.keys()
        assert row["text"]


@pytest.mark.parametrize(("query", "label"), _variables(in_sql=True))
def test_every_filter_of_stored_runs_offers_what_is_stored(stored: Connection, query: str, label: str) -> None:
    offered = [next(iter(row.values())) for row in rows(stored, query)]
    known = {
        "team": {RUNS["r-nan"]["GRADWATCH_TEAM"]},
        "tier": {names.TIER_EXPERIMENT},
        "training_job": {"digits", "gpt", "big"},
        "model": {"Sequential", "moe"},
        "dataset": {"ones"},
        "run_id": set(RUN_IDS),
    }
    assert set(offered) == known[label]
    assert len(offered) == len(known[label])


@pytest.mark.parametrize("table", ["token", "audit", "frame"])
def test_grafana_s_role_reads_nothing_else(stored: Connection, table: str) -> None:
    known = stored.scalar(text(f"SELECT to_regclass('{table}') IS NOT NULL"))
    assert known
    assert stored.scalar(text(f"SELECT has_table_privilege('grafana', '{table}', 'SELECT')")) is False
