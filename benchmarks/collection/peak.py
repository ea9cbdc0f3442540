"""How much the collector can take: durable datapoints a second, beside MLflow's tracking server."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from collection.figures import Figure, at_least
from collection.load import Load, Shape, connect, generate, layer_name
from collection.servers import Server, collector, mlflow, new_database

ASKED: Final = {"SQLite": 1_000_000, "PostgreSQL": 700_000}
# MLflow's own limit for one request.
_METRICS_AT_ONCE: Final = 1_000


def figures(
    servers: dict[str, str], folder: Path, mlflow_python: Path | None, *, seconds: float, rounds: int
) -> Iterator[Figure]:
    """Measure each in turn, ``rounds`` times; every round in a new database on the same disk."""
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    for round_ in range(rounds):
        for name, server in servers.items():
            with collector(new_database(server, f"peak{round_}")) as serving:
                load = generate(serving.address, seconds)
            assert not load.refused, f"{load.refused} requests were refused"
            rates.setdefault(name, []).append(load.rate * Shape().points)
            latencies.setdefault(name, []).extend(load.latencies)
        if mlflow_python is not None:
            here = folder / f"mlflow{round_}"
            here.mkdir()
            with mlflow(mlflow_python, here) as serving:
                load = _log_batches(serving, seconds)
            rates.setdefault("MLflow", []).append(load.rate * _METRICS_AT_ONCE)
    for name in servers:
        middle = statistics.median(rates[name])
        spread = f" [{min(rates[name]):,.0f}, {max(rates[name]):,.0f}]"
        yield at_least(f"{name}, durable datapoints a second", ASKED[name], middle, note=spread)
        yield _latency(name, latencies[name])
        if "MLflow" in rates:
            times = middle / statistics.median(rates["MLflow"])
            yield at_least(f"{name}, times MLflow's tracking server", 100, times)
    if "MLflow" in rates:
        yield Figure("MLflow on SQLite, metrics a second", "", f"{statistics.median(rates['MLflow']):,.0f}")


def _latency(name: str, latencies: Sequence[float]) -> Figure:
    middle, late = np.quantile(latencies, [0.5, 0.99]) * 1e3
    return Figure(f"{name}, latency of a request, median / p99", "", f"{middle:.1f} / {late:.1f} ms")


def _log_batches(server: Server, seconds: float, connections: int = 8) -> Load:
    """Send batches of metrics as MLflow's client does, a run for each connection."""
    experiment = _post(server, "experiments/create", {"name": "bench"})["experiment_id"]
    runs = [
        _post(server, "runs/create", {"experiment_id": experiment, "start_time": 0})["run"]["info"]["run_id"]
        for _ in range(connections)
    ]
    loads: list[Load] = []
    threads = [
        threading.Thread(target=lambda run=run: loads.append(_log(server, run, seconds))) for run in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(
        [latency for load in loads for latency in load.latencies],
        sum(load.refused for load in loads),
        max(load.busy for load in loads),
    )


def _log(server: Server, run: str, seconds: float) -> Load:
    connection = connect(server.address)
    began = time.monotonic()
    latencies: list[float] = []
    refused = step = 0
    while (started := time.monotonic()) < began + seconds:
        metrics = [
            {"key": layer_name(layer), "value": layer / 7, "timestamp": step, "step": step}
            for layer in range(_METRICS_AT_ONCE)
        ]
        body = json.dumps({"run_id": run, "metrics": metrics})
        connection.request("POST", "/api/2.0/mlflow/runs/log-batch", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status == 200:
            latencies.append(time.monotonic() - started)
        else:
            refused += 1
        step += 1
    connection.close()
    return Load(latencies, refused, time.monotonic() - began)


def _post(server: Server, path: str, body: dict[str, object]) -> dict[str, dict[str, dict[str, str]]]:
    connection = connect(server.address)
    connection.request(
        "POST", f"/api/2.0/mlflow/{path}", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer: dict[str, dict[str, dict[str, str]]] = json.loads(connection.getresponse().read())
    connection.close()
    return answer
